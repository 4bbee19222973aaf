"""Segments that see a prefix beside themselves: two calls merged, against one with a dense mask."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import flash_attention
from mud_puppy.kernels.attention.plan import Options, Plan, segment_ranges
from mud_puppy.model import attention
from tests.kernels import contract
from tests.kernels.attention.calls import inputs
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
def test_two_calls_are_one(implementation: str, case: str) -> None:
    got, want, dtype = compared(case)
    # The parts are rounded to the dtype before they are merged.
    assert max(differences(got, want)) < 2 * tolerance(dtype, 72 * 8)


WRONG = {
    "the mean of both": lambda own, other: (own[0] + other[0]) / 2,
    "the prefix alone": lambda own, other: other[0],
    "no prefix": lambda own, other: own[0],
}


@pytest.mark.parametrize("name", WRONG)
def test_another_merge_differs(monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(attention, "_merged", WRONG[name])
    got, want, _ = compared("plain")
    assert max(differences(got, want)) > 1e-2


def test_the_kernels_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        attention, "flash_attention", partial(flash_attention, implementation="pallas")
    )
    got, want, dtype = compared("latent, softcap, sinks, scale")
    assert max(differences(got, want)) < 2 * tolerance(dtype, 72 * 8)


def test_what_sees_no_prefix_is_as_without(implementation: str) -> None:
    """To the bit, gradients too: a part that no key is in weighs nothing."""
    arrays, (d_out, _) = inputs(B=3, T=72, sinks=True)
    segments, prefixes = layouts(3, 72)
    plain = contract.compiled(partial(attend, segments, None, {}), (arrays,), d_out)
    none = contract.compiled(partial(attend, segments, 0 * prefixes, {}), (arrays,), d_out)
    assert all(np.array_equal(a, b) for a, b in zip(none, plain, strict=True))
    shared = contract.compiled(partial(attend, segments, prefixes, {}), (arrays,), d_out)
    reads = np.asarray(prefixes) < 0
    assert np.array_equal(shared[0][~reads], plain[0][~reads])
    assert not np.array_equal(shared[0][reads], plain[0][reads])


def test_blocks_that_do_not_meet_are_skipped(monkeypatch: Any) -> None:
    """The second call looks at the blocks of readers and their prefix, and at no others."""
    calls = []

    def recorded(q: Any, k: Any, v: Any, **options: Any) -> Any:
        calls.append(options)
        return q, q[..., 0]

    monkeypatch.setattr(attention, "flash_attention", recorded)
    block, prefix, answer, groups = 16, 128, 64, 4
    segments, prefixes = [], []
    for g in range(groups):
        segments += [2 * g + 1] * (prefix + answer) + [2 * g + 2] * answer
        prefixes += [g + 1] * prefix + [0] * answer + [-g - 1] * answer
    T = len(segments)
    arrays, _ = inputs(B=1, T=T)
    ids, prefix_ids = (jnp.asarray([x], jnp.int32) for x in (segments, prefixes))
    attend(ids, prefix_ids, {}, arrays)
    _, second = calls
    plan = Plan(Options(second.get("causal", True), None, 1.0), T, T, block, block, 4, 1)
    for by_key in (False, True):
        found = segment_ranges(plan, second["segment_ids"], second["kv_segment_ids"], by_key=by_key)
        visited = np.maximum(found["end"] - found["first"], 0).sum()
        assert visited == found["same"].sum() == groups * (prefix // block) * (answer // block)
