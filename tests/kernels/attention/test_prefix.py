"""Segments that see a prefix beside themselves, against a dense mask."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import flash_attention
from mud_puppy.kernels.attention import tile
from mud_puppy.kernels.attention.plan import Options, Plan
from mud_puppy.kernels.attention.prepare import inputs_of
from mud_puppy.model import attention
from tests.kernels import contract
from tests.kernels.attention.calls import inputs, qkv
from tests.kernels.contract import differences, tolerance


def layout(rng: np.random.Generator, T: int) -> tuple[np.ndarray, np.ndarray]:
    """(segment_ids, prefix_ids) [T] of groups: a prefix, what follows it in its segment, and 0 to 3
    segments that see it; groups without a prefix among them, and padding at the end."""
    segments, prefixes = np.zeros(T, np.int32), np.zeros(T, np.int32)
    at = segment = group = 0
    while at < T - 4:
        group += 1
        prefix = int(rng.integers(0, 14))
        for reader in range(1 + int(rng.integers(0, 4))):
            segment += 1
            length = int(rng.integers(1, 9)) + (0 if reader else prefix)
            segments[at : at + length] = segment
            if prefix and reader:
                prefixes[at : at + length] = -group
            elif prefix:
                prefixes[at : at + prefix] = group
            at += length
    return segments, prefixes


def layouts(B: int, T: int) -> tuple[Any, Any]:
    found = [layout(np.random.default_rng(seed), T) for seed in range(B)]
    return tuple(jnp.asarray(np.stack(x)) for x in zip(*found, strict=True))  # pyright: ignore


def visible(segments: Any, prefixes: Any) -> np.ndarray:
    """[B, T, T], by the definition of `Inputs`."""
    segments, prefixes = np.asarray(segments), np.asarray(prefixes)
    causal = np.tril(np.ones((segments.shape[1],) * 2, bool))
    own = (segments[:, :, None] == segments[:, None]) & causal
    return own | ((prefixes[:, None] > 0) & (prefixes[:, :, None] == -prefixes[:, None]))


def dense(mask: np.ndarray, options: dict, arrays: dict) -> Any:
    bias = jnp.where(mask, 0.0, -1e31)[:, None]
    call = partial(flash_attention, causal=False, implementation="reference", **options)
    return call(arrays["q"], arrays["k"], arrays["v"], bias=bias, sinks=arrays.get("sinks"))


def attend(segments: Any, prefixes: Any, options: dict, arrays: dict) -> Any:
    q, k, v = (arrays[name] for name in "qkv")
    return attention.attend(q, k, v, segments, prefixes, sinks=arrays.get("sinks"), **options)


CASES = {
    "plain": ({}, {}),
    "one key head, softcap": ({"K": 1}, {"softcap": 1.5}),
    "sinks": ({"sinks": True}, {}),
    "latent, softcap, sinks, scale": (
        {"K": 4, "D": 12, "Dv": 8, "sinks": True},
        {"softcap": 2.0, "scale": 0.7},
    ),
    "bfloat16": ({"dtype": jnp.bfloat16, "sinks": True}, {}),
}


@pytest.fixture(params=["xla", pytest.param("pallas", marks=pytest.mark.slow)])
def implementation(request: Any, monkeypatch: Any) -> str:
    chosen = partial(flash_attention, implementation=request.param)
    monkeypatch.setattr(attention, "flash_attention", chosen)
    return request.param


def compared(case: str) -> tuple[list, list, Any]:
    """(got, wanted, dtype): output and gradients of all arrays."""
    shape, options = CASES[case]
    T = 72
    arrays, (d_out, _) = inputs(B=3, T=T, **shape)
    segments, prefixes = layouts(3, T)
    assert (prefixes < 0).any() and (segments == 0).any()
    want = contract.in_float64(
        partial(dense, visible(segments, prefixes), options), (arrays,), d_out
    )
    got = contract.compiled(partial(attend, segments, prefixes, options), (arrays,), d_out)
    return got, want, arrays["q"].dtype


@pytest.mark.parametrize("case", CASES)
def test_readers_see_their_prefix(implementation: str, case: str) -> None:
    got, want, dtype = compared(case)
    assert max(differences(got, want)) < tolerance(dtype, 72 * 8)


WRONG = {
    "no prefix": lambda ids: jnp.zeros_like(ids),
    "the next group's prefix": lambda ids: jnp.where(ids < 0, ids - 1, ids),
    "a prefix that is one token longer": lambda ids: jnp.where(
        (ids == 0) & (jnp.roll(ids, 1, 1) > 0), jnp.roll(ids, 1, 1), ids
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_ids_differ(monkeypatch: Any, name: str) -> None:
    def wrong(*arrays: Any, prefix_ids: Any, **options: Any) -> Any:
        return flash_attention(*arrays, prefix_ids=WRONG[name](prefix_ids), **options)

    monkeypatch.setattr(attention, "flash_attention", wrong)
    got, want, _ = compared("plain")
    assert max(differences(got, want)) > 1e-2


def test_the_kernels_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        attention, "flash_attention", partial(flash_attention, implementation="pallas")
    )
    got, want, dtype = compared("latent, softcap, sinks, scale")
    assert max(differences(got, want)) < tolerance(dtype, 72 * 8)


def test_what_sees_no_prefix_is_as_without(implementation: str) -> None:
    """To the bit, gradients too."""
    arrays, (d_out, _) = inputs(B=3, T=72, sinks=True)
    segments, prefixes = layouts(3, 72)
    plain = contract.compiled(partial(attend, segments, None, {}), (arrays,), d_out)
    none = contract.compiled(partial(attend, segments, 0 * prefixes, {}), (arrays,), d_out)
    assert all(np.array_equal(a, b) for a, b in zip(none, plain, strict=True))
    shared = contract.compiled(partial(attend, segments, prefixes, {}), (arrays,), d_out)
    reads = np.asarray(prefixes) < 0
    assert np.array_equal(shared[0][~reads], plain[0][~reads])
    assert not np.array_equal(shared[0][reads], plain[0][reads])


def test_blocks_that_do_not_meet_are_skipped() -> None:
    """A query visits its own segment's blocks and its prefix's, not what stands between them."""
    block, prefix, answer, groups = 16, 128, 64, 4
    segments, prefixes = [], []
    for g in range(groups):
        segments += [2 * g + 1] * (prefix + answer) + [2 * g + 2] * answer
        prefixes += [g + 1] * prefix + [0] * answer + [-g - 1] * answer
    T = len(segments)
    q, k, v = qkv(B=1, T=T)
    ids, prefix_ids = (jnp.asarray([x], jnp.int32) for x in (segments, prefixes))
    both = jnp.maximum(-prefix_ids, 0), jnp.where(prefix_ids > 0, prefix_ids, -1)
    extra = {"bias": None, "q_ids": ids, "k_ids": ids, "prefixes": both}
    plan = Plan(Options(True, None, 1.0), T, T, block, block, 4, 1)
    for by_key in (False, True):
        refs = inputs_of(plan, q, k, v, extra, by_key=by_key)
        visited = 0
        for n in range(T // block):
            low, full_low, full_high, high, same = tile.ranges(plan, refs, 1, 0, n, by_key=by_key)
            visited += max(0, int(high - low))
            hides_nothing = min(full_high, same[1]) - max(full_low, same[0])
            assert high <= low or hides_nothing == high - low
        assert visited == groups * (prefix // block) * (answer // block)


def test_what_cannot_be_asked() -> None:
    q, k, v = qkv(B=1, T=16)
    ids = jnp.ones((1, 16), jnp.int32)
    with pytest.raises(ValueError, match="prefix_ids need segment_ids"):
        flash_attention(q, k, v, prefix_ids=ids)
    with pytest.raises(ValueError, match="T = S"):
        flash_attention(
            q[:, :8], k, v, segment_ids=ids[:, :8], kv_segment_ids=ids, prefix_ids=ids[:, :8]
        )
    with pytest.raises(ValueError, match="a bias and prefixes come together"):
        bias = jnp.zeros((1, 1, 16, 16))
        flash_attention(
            q, k, v, segment_ids=ids, prefix_ids=ids, bias=bias, implementation="pallas"
        )
