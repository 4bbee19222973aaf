"""Generation by products of integers, on the CPU: what the pass without a cache would choose."""

from importlib import import_module

import numpy as np

from mud_puppy.sampling import Options, generate, generate_tokens
from mud_puppy.weights import fake_quant, finish_fake_quant

STEPS = 12


def test_greedy_replies_are_those_of_the_trained_pass(tiny_model, prompts, tokenizer, monkeypatch):
    tiny = tiny_model("llama")
    fake = fake_quant(tiny.params, "int8", activations="int8")
    done = finish_fake_quant(fake)
    products = []
    module = import_module("mud_puppy.weights.int8_dynamic")
    integers = module.qgemm
    monkeypatch.setattr(
        module, "qgemm", lambda *a, **k: products.append(a[0].dtype) or integers(*a, **k)
    )
    replies = generate_tokens(tiny.model, done, prompts[:4], Options(STEPS))
    assert {dtype.name for dtype in products} == {"int8"}, "the products are of integers"
    whole = [p + r.tokens for p, r in zip(prompts[:4], replies, strict=True)]
    logps = tiny.logps(whole, fake)
    plain = tiny.logps(whole)
    differs = 0.0
    for row, other, prompt, reply in zip(logps, plain, prompts, replies, strict=False):
        at = np.arange(len(prompt) - 1, len(prompt) - 1 + STEPS)
        # A last bit of float32 may move a code, and a code the log-probability; never by this much.
        chosen = row[at, reply.tokens]
        np.testing.assert_allclose(reply.logps, chosen, atol=0.05)
        assert (row[at].max(-1) - chosen).max() < 0.1
        differs = max(differs, float(np.abs(other[at, reply.tokens] - chosen).max()))
    assert differs > 0.1, "the mutation: without quantization the numbers are others"
    texts = generate(tiny.model, done, tokenizer, ["ab"], max_new_tokens=4)
    assert len(texts) == 1
