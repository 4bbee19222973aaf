"""Greedy generation against transformers, and a batch against its rows alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers

from mud_puppy.export import save_hf
from mud_puppy.model.arch import Layer
from mud_puppy.sampling import Options, generate_tokens

NEW = 64
torch.set_num_threads(1)  # more is of no use to models of this size


def reference(tiny, prompts, folder) -> list[list[int]]:
    """What transformers generates greedily from the same weights, without padding."""
    save_hf(tiny.model, tiny.params, folder, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    replies = {}
    for length in {len(prompt) for prompt in prompts}:
        ids = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        replies.update({tuple(row[:length]): row[length:] for row in out.tolist()})
    return [replies[tuple(prompt)] for prompt in prompts]


def greedy(model, params, prompts, new: int = NEW, batch_size: int = 8) -> list[list[int]]:
    replies = generate_tokens(model, params, prompts, Options(new), batch_size=batch_size)
    return [reply.tokens for reply in replies]


def mutant(family: str, model, params):
    """The model with one thing of its family wrong."""
    arch = model.arch
    if family == "mistral":
        return replace(model, arch=arch.replace(kinds=(Layer(),) * arch.layers)), params
    if family == "dynamic":
        return replace(
            model, arch=arch.replace(ropes=(replace(arch.ropes[0], dynamic=None),))
        ), params
    swapped = jax.tree.map(lambda leaf: leaf[::-1], params["layers"])
    return model, {**params, "layers": swapped}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "dynamic"])
def test_greedy_is_that_of_transformers(family, tiny_model, prompts, tmp_path):
    tiny = tiny_model(family)
    want = reference(tiny, prompts, tmp_path / "model")
    assert greedy(tiny.model, tiny.params, prompts) == want
    assert all(len(reply) == NEW for reply in want)
    assert len({tuple(reply[-8:]) for reply in want}) > 4, "replies too alike to compare"
    assert greedy(*mutant(family, tiny.model, tiny.params), prompts) != want


def test_a_row_does_not_depend_on_its_batch(tiny_model, prompts):
    """Dynamic rope, whose frequencies change with a row's length, is where it could."""
    tiny = tiny_model("dynamic")
    together = greedy(tiny.model, tiny.params, prompts)
    assert greedy(tiny.model, tiny.params, prompts, batch_size=4) == together
    assert greedy(tiny.model, tiny.params, prompts[3:4]) == together[3:4]


def test_a_long_prompt_equals_the_model_run_without_a_cache(tiny_model):
    """Beyond one chunk of decode_attention's queries, and a prompt that fills its bucket."""
    tiny = tiny_model("mistral")
    for length in (192, 150):
        prompt = np.random.default_rng(0).integers(3, 300, length).tolist()
        (reply,) = greedy(tiny.model, tiny.params, [prompt], new=3)
        again = tiny.logps([prompt + reply])[0].argmax(-1)
        assert again[length - 1 : length + 2].tolist() == reply
