"""A tiny llama with random params, and random packed batches for it; TRL's warning that GKD is
experimental, off."""

import os

import numpy as np
import pytest

from tests.tiny import SIZES, tiny_model

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
V, T = SIZES["vocab_size"], 32


@pytest.fixture(scope="session")
def tiny():
    """(model, params): 2 layers of 32, 4 heads, 2 kv heads, float32."""
    return tiny_model()


def random_batch(seed: int, accumulation: int, rows: int, examples: int = 2) -> dict:
    """[A, B, T] arrays: each row holds `examples` examples of random lengths and some padding."""
    rng = np.random.default_rng(seed)
    shape = (accumulation, rows, T)
    batch = {
        "tokens": rng.integers(0, V, shape).astype(np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "targets": rng.integers(0, V, shape).astype(np.int32),
        "weights": np.zeros(shape, np.float32),
    }
    for a in range(accumulation):
        for b in range(rows):
            cuts = np.sort(rng.choice(np.arange(4, T), examples, replace=False))
            for i, (lo, hi) in enumerate(zip([0, *cuts], cuts, strict=False)):
                batch["positions"][a, b, lo:hi] = np.arange(hi - lo)
                batch["segment_ids"][a, b, lo:hi] = i + 1
                batch["weights"][a, b, lo : hi - 1] = rng.random(hi - lo - 1) < 0.7
    batch["targets"][..., :-1] = batch["tokens"][..., 1:]
    return batch


@pytest.fixture(scope="session", name="random_batch")
def _random_batch():
    return random_batch
