"""Ends, stop texts, seeds, log-probabilities, compiles, memory and meshes."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.model.module import Model, axes
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.sampling import Options, generate, generate_tokens, tokenize
from mud_puppy.sampling.batches import batches
from mud_puppy.sampling.choose import chooser
from mud_puppy.sampling.engine import start
from mud_puppy.sampling.generate import begin

GREEDY = Options(64)
SAMPLED = Options(64, temperature=1.0, seed=5)


def tokens_of(replies) -> list[list[int]]:
    return [reply.tokens for reply in replies]


def test_an_eos_ends_its_row_and_belongs_to_the_reply(tiny_model, prompts):
    tiny = tiny_model("llama")
    free = tokens_of(generate_tokens(tiny.model, tiny.params, prompts, GREEDY))
    eos = (free[0][5], free[1][9])
    ended = tokens_of(generate_tokens(tiny.model, tiny.params, prompts, GREEDY, eos))

    def cut(reply):
        return next((reply[: i + 1] for i, t in enumerate(reply) if t in eos), reply)

    assert ended == [cut(reply) for reply in free]
    assert len(ended[0]) <= 6 and max(map(len, ended)) == 64


def test_decoding_stops_when_every_row_has_ended(tiny_model, prompts):
    tiny = tiny_model("llama")
    (batch,) = batches(prompts[:7], 8)
    assert -1 in batch.rows, "a row that only fills up must not keep the others going"
    free = begin(tiny.model, tiny.params, batch, None, GREEDY, (), 64)
    assert int(free.count) == 64
    eos = set(np.asarray(free.tokens)[batch.rows >= 0, 3].tolist())
    state = begin(tiny.model, tiny.params, batch, None, GREEDY, tuple(eos), 64)
    assert int(state.count) <= 4


def test_generate_wraps_a_text_as_chat_and_hides_the_eos(tiny_model, tokenizer):
    tiny = tiny_model("llama")
    messages = [{"role": "user", "content": "one"}]
    asked = ["one", messages, "two"]
    texts = generate(tiny.model, tiny.params, tokenizer, asked)
    assert texts[0] == texts[1] != texts[2]
    assert generate(tiny.model, tiny.params, tokenizer, []) == []
    # An EOS that is an ordinary token is hidden too.
    tokens = tokenize(tokenizer, asked)
    letter = generate_tokens(tiny.model, tiny.params, tokens, GREEDY)[0].tokens[4]
    (reply, *_) = generate_tokens(tiny.model, tiny.params, tokens, GREEDY, (letter,))
    assert reply.tokens[-1] == letter and len(reply.tokens) <= 5
    config = json.dumps({**json.loads(tiny.model.arch.config), "eos_token_id": [letter]})
    ended = replace(tiny.model, arch=tiny.model.arch.replace(config=config))
    cut = generate(ended, tiny.params, tokenizer, asked)
    assert cut[0] == tokenizer.decode(reply.tokens[:-1], skip_special_tokens=True)


def test_a_reply_ends_before_the_first_stop_text(tiny_model, tokenizer):
    tiny = tiny_model("llama")
    options = {"max_new_tokens": 64, "temperature": 1.0}
    asked = ["one", "two", "three"]
    free = generate(tiny.model, tiny.params, tokenizer, asked, **options)
    stop = [free[0][20:22], free[1][3:5]]
    stopped = generate(tiny.model, tiny.params, tokenizer, asked, **options, stop=stop)
    assert stopped == [text[: min(map(text.find, filter(text.count, stop)), default=None)]
                       if any(map(text.count, stop)) else text for text in free]  # fmt: skip
    assert len(stopped[0]) <= 20 and len(stopped[1]) <= 3
    with pytest.raises(UserError, match="stop holds an empty text"):
        generate(tiny.model, tiny.params, tokenizer, asked, stop=("",))


def test_a_stop_saves_the_work_behind_it(tiny_model, prompts):
    tiny = tiny_model("llama")
    seen = []

    def stopped(tokens):
        seen.append(len(tokens))
        return True

    replies = generate_tokens(tiny.model, tiny.params, prompts, GREEDY, stopped=stopped)
    assert seen == [16] * 8 == [len(reply.tokens) for reply in replies]


def test_the_seed_decides_and_the_batch_does_not(tiny_model, prompts):
    tiny = tiny_model("llama")

    def sampled(options, batch_size=16):
        asked = [prompts[3], prompts[4], prompts[3]]
        return tokens_of(
            generate_tokens(tiny.model, tiny.params, asked, options, batch_size=batch_size)
        )

    first = sampled(SAMPLED)
    assert sampled(SAMPLED) == first == sampled(SAMPLED, batch_size=1)
    assert sampled(replace(SAMPLED, seed=6)) != first
    assert first[0] != first[2], "rows of one prompt draw their own numbers"


ROWS = 8192


def test_samples_follow_the_models_distribution(tiny_model):
    """Chi-square of the first token of many rows of one prompt."""
    tiny = tiny_model("llama")
    params = {**tiny.params, "head": tiny.params["head"] * 0.5}
    prompt = [17, 5, 250]
    options = Options(1, temperature=1.0, seed=2)
    replies = generate_tokens(tiny.model, params, [prompt] * ROWS, options, batch_size=ROWS)
    counts = np.bincount([reply.tokens[0] for reply in replies], minlength=300)

    def statistic(logits: np.ndarray) -> float:
        """Standardised: chi-square with many bins is normal, mean = dof, variance = 2 dof."""
        want = np.exp(np.float64(logits))
        want *= ROWS / want.sum()
        common = want >= 5
        want = np.append(want[common], want[~common].sum())
        have = np.append(counts[common], counts[~common].sum())
        dof = len(want) - 1
        return float((((have - want) ** 2 / want).sum() - dof) / np.sqrt(2 * dof))

    logits = tiny.logps([prompt] * 8, params)[0, 2]
    assert abs(statistic(logits)) < 4
    assert statistic(logits * 1.3) > 4  # mutation partner: another temperature


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logps_are_those_of_the_model_without_a_cache(tiny_model, prompts, options):
    tiny = tiny_model("mistral")
    replies = generate_tokens(tiny.model, tiny.params, prompts, options)
    tables = tiny.logps([p + reply.tokens for p, reply in zip(prompts, replies, strict=True)])
    for prompt, reply, table in zip(prompts, replies, tables, strict=True):
        at = len(prompt) - 1 + np.arange(64)
        np.testing.assert_allclose(reply.logps, table[at, reply.tokens], atol=2e-4)
        shifted = table[at + 1, reply.tokens]  # mutation partner
        assert np.abs(reply.logps - shifted).max() > 0.1


def test_the_second_call_of_a_bucket_does_not_trace(tiny_model, monkeypatch):
    tiny = tiny_model("qwen3")
    traced = []
    forward = Model.forward

    def counting(self, params, inputs, cache=None, *rest):
        traced.append(inputs.tokens.shape)
        return forward(self, params, inputs, cache, *rest)

    monkeypatch.setattr(Model, "forward", counting)

    def run(lengths, options):
        asked = [[9] * n for n in lengths]
        return generate_tokens(tiny.model, tiny.params, asked, options, eos=(299,))

    run((50, 60, 33), Options(40, temperature=0.5, top_k=9, seed=1))
    assert len(traced) >= 2
    traced.clear()
    run((64, 1, 2), Options(45, temperature=2.0, top_p=0.4, seed=2))
    assert traced == []
    run((65,), Options(40))
    assert traced, "mutation partner: another bucket does trace"


def test_logits_of_the_prompt_are_never_held(tiny_model):
    """Only the last position's: no array [B, T, V] in the program."""
    tiny = tiny_model("llama")
    (batch,) = batches([[5] * 90] * 4, 4)
    B, T = batch.tokens.shape
    arrays = (batch.tokens, batch.lengths, batch.rows)
    rest = (np.uint32(0), np.int32(4), np.array([], np.int32), chooser(Options()))
    program = start.lower(tiny.model, 16, None, tiny.params, *arrays, *rest).as_text()
    held = re.compile(rf"tensor<({B}x{T}|{B * T})x300x")
    assert f"tensor<{B}x1x300x" in program and not held.search(program)
    assert held.search(jax.jit(tiny.model).lower(tiny.params, jnp.asarray(batch.tokens)).as_text())


def test_sharded_params_generate_the_same(tiny_model, prompts):
    tiny = tiny_model("qwen2")
    mesh = make_mesh("data=2,fsdp=4")
    split = jax.device_put(tiny.params, shardings(mesh, axes(tiny.model.arch), tiny.params))
    assert not split["embed"].sharding.is_fully_replicated
    want = tokens_of(generate_tokens(tiny.model, tiny.params, prompts[:7], SAMPLED))
    assert tokens_of(generate_tokens(tiny.model, split, prompts[:7], SAMPLED)) == want
    (batch,) = batches(prompts[:7], 16, 8)
    state = begin(tiny.model, split, batch, mesh, SAMPLED, (), 1)
    k = state.cache.k
    assert k.addressable_shards[0].data.shape[1] == k.shape[1] // 8, "the cache is split too"
