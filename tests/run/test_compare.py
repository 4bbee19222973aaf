"""Perplexity and KL against numpy, and the verb that prints them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.cli import main
from mud_puppy.run.compare import compare


def by_hand(model, params, other, batch):
    sums = np.zeros(3)
    for b in range(batch["tokens"].shape[1]):
        row = {key: jnp.asarray(x[0, b : b + 1]) for key, x in batch.items()}
        p, q = (
            np.asarray(jax.nn.log_softmax(model(w, *map(row.get, ORDER))), np.float64)
            for w in (params, other)
        )
        for t in np.flatnonzero(batch["weights"][0, b]):
            kl = (np.exp(p[0, t]) * (p[0, t] - q[0, t])).sum()
            sums += -q[0, t, batch["targets"][0, b, t]], kl, 1
    return sums[:2] / sums[2], sums[2]


ORDER = "tokens", "positions", "segment_ids"


@pytest.fixture(scope="module")
def tiny(chat_model):
    return mp.load(chat_model, dtype="float32")


def test_equals_numpy(tiny):
    model, params = tiny
    r = np.random.default_rng(0)
    tokens = r.integers(0, 200, (1, 3, 24)).astype(np.int32)
    segments = np.where(np.arange(24) < 20, np.arange(24) // 10 + 1, 0)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, -1),
        "positions": np.broadcast_to(np.arange(24) % 10, tokens.shape).astype(np.int32),
        "segment_ids": np.broadcast_to(segments, tokens.shape).astype(np.int32),
        "weights": np.broadcast_to((segments > 0) & (np.arange(24) % 10 < 9), tokens.shape) * 1.0,
    }
    codes = mp.quantize(params, "int4", group=16)
    found = compare(model, params, codes, [batch])
    (loss, kl), count = by_hand(model, params, codes, batch)
    assert found.tokens == count
    np.testing.assert_allclose((found.loss, found.kl), (loss, kl), rtol=2e-4)
    assert found.kl > 1e-4 and found.perplexity == pytest.approx(np.exp(loss), rel=1e-3)
    same = compare(model, params, None, [batch])
    assert same.kl == 0 and same.loss != pytest.approx(found.loss, rel=1e-5)
    # split into batches, and with the reference's loss swapped for its own
    halves = [{key: x[:, part] for key, x in batch.items()} for part in ([0], [1, 2])]
    assert compare(model, params, codes, halves).kl == pytest.approx(found.kl, rel=1e-4)
    back = compare(model, codes, params, [batch])
    assert back.loss == pytest.approx(same.loss, rel=1e-5) and back.kl != pytest.approx(found.kl)


def test_the_verb(chat_model, chats, tmp_path, capsys):
    run = ["eval", str(chat_model), "--dataset", str(chats), "--max-seq-length", "64"]
    run += ["--precision", "fp32", "--group", "16"]
    codes = str(tmp_path / "q")
    assert main(["quantize", str(chat_model), "--to", "int8", "--output", codes,
                 "--precision", "fp32"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main([*run, "--against", f"int8,int4,mxfp4,{codes}"]) == 2  # rows of 48 are no 32s
    told = capsys.readouterr()
    assert "mlp/down_proj/weight cannot be quantized" in told.err and not told.out
    assert main([*run, "--against", f"int8,int4,{codes}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(chat_model), "int8", "int4", codes]
    kl = [float(line.split("KL ")[1].split(",")[0]) for line in lines]
    assert kl[0] == 0 and 0 < kl[1] < kl[2]
    assert lines[0].split(", ")[-1] == lines[3].split(", ")[-1]
    for against, words in {
        "nf4,int5": "int5: neither a folder here",
        "mxfp4": "--group: is",
    }.items():
        assert main([*run, "--against", against]) == 2
        assert words in capsys.readouterr().err
