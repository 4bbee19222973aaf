"""Greedy generation against transformers, and a batch against its rows alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from mud_puppy.sampling import Options, generate_tokens

NEW = 64


def reference(pair, prompts) -> list[list[int]]:
    """What transformers generates greedily, without padding."""
    replies = {}
    for length in {len(prompt) for prompt in prompts}:
        ids = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
        out = pair.torch.generate(
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
        return replace(model, arch=arch.replace(windows=(None,) * arch.layers)), params
    if family == "dynamic":
        return replace(model, arch=arch.replace(rope=replace(arch.rope, dynamic=None))), params
    swapped = jax.tree.map(lambda leaf: leaf[::-1], params["layers"])
    return model, {**params, "layers": swapped}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "dynamic"])
def test_greedy_is_that_of_transformers(family, pair, prompts):
    tiny = pair(family)
    want = reference(tiny, prompts)
    assert greedy(tiny.model, tiny.params, prompts) == want
    assert all(len(reply) == NEW for reply in want)
    assert len({tuple(reply[-8:]) for reply in want}) > 4, "replies too alike to compare"
    assert greedy(*mutant(family, tiny.model, tiny.params), prompts) != want


def test_a_row_does_not_depend_on_its_batch(pair, prompts):
    """Dynamic rope, whose frequencies change with a row's length, is where it could."""
    tiny = pair("dynamic")
    together = greedy(tiny.model, tiny.params, prompts)
    assert greedy(tiny.model, tiny.params, prompts, batch_size=4) == together
    assert greedy(tiny.model, tiny.params, prompts[3:4]) == together[3:4]


def test_a_long_prompt_equals_the_model_run_without_a_cache(pair):
    """Beyond one chunk of decode_attention's queries, and a prompt that fills its bucket."""
    tiny = pair("mistral")
    for length in (192, 150):
        prompt = np.random.default_rng(0).integers(3, 300, length).tolist()
        (reply,) = greedy(tiny.model, tiny.params, [prompt], new=3)
        again = tiny.logps([prompt + reply])[0].argmax(-1)
        assert again[length - 1 : length + 2].tolist() == reply
