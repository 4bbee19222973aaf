"""One contract for every attention: forward and VJP against the definition in float64.

Blocks are 16 tokens here, so that these short sequences take several. Every case runs XLA's and the
Pallas kernels, those in Pallas's interpreter where there is no card.
"""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import flash_attention
from tests.kernels.attention.calls import check, inputs, results, segments, shuffled, wanted
from tests.kernels.contract import differences, tolerance

IDS = segments(2, 40)
CASES = {
    "causal": ({}, {}),
    "full": ({}, {"causal": False}),
    "window": ({}, {"window": 7}),
    "window of one": ({}, {"window": 1}),
    "window of a block": ({"D": 32}, {"window": 17}),
    "one key head": ({"H": 4, "K": 1}, {}),
    "odd sizes": ({"T": 37, "D": 5, "H": 3, "K": 3}, {}),
    "one token": ({"T": 1}, {}),
    "packed": ({"D": 32}, {"segment_ids": IDS}),
    "packed, window": ({}, {"segment_ids": IDS, "window": 5}),
    "unordered segments": ({}, {"segment_ids": shuffled(2, 40)}),
    "unordered segments, full, odd": (
        {"T": 37},
        {"segment_ids": shuffled(2, 37), "causal": False},
    ),
    "last queries of a longer sequence": ({"T": 9, "S": 50}, {"window": 20}),
    "queries before any key": ({"T": 50, "S": 20, "sinks": True}, {}),
    "cross, segments without keys": (
        {"T": 21, "S": 45},
        {"causal": False, "segment_ids": segments(2, 21), "kv_segment_ids": segments(2, 45) % 3},
    ),
    "scale, softcap": ({}, {"scale": -0.7, "softcap": 1.5}),
    "sinks": ({"sinks": True, "D": 32}, {"segment_ids": IDS}),
    "bias": ({"bias": (2, 4)}, {}),
    "bias of all heads": ({"bias": (2, 1), "D": 32}, {"softcap": 2.0}),
    "bias of all rows": ({"bias": (1, 4)}, {"window": 9}),
    "one bias": ({"bias": (1, 1), "T": 37}, {"causal": False}),
    "dropout": ({"D": 32}, {"dropout": 0.3, "dropout_seed": 5}),
    "all": (
        {"D": 48, "Dv": 20, "K": 1, "sinks": True, "bias": (1, 1), "T": 37, "S": 45},
        {
            "softcap": 3.0,
            "dropout": 0.2,
            "dropout_seed": 5,
            "window": 30,
            "segment_ids": segments(2, 37),
            "kv_segment_ids": segments(2, 45),
        },
    ),
    "bfloat16": ({"dtype": jnp.bfloat16}, {"segment_ids": IDS, "window": 9}),
    "float16": (
        {"dtype": jnp.float16, "D": 32, "sinks": True},
        {"dropout": 0.2, "dropout_seed": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case):
    check(*CASES[case])


DROPPED = {"dropout": 0.3, "dropout_seed": 5}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"window": 7}, [{"window": 8}, {"window": 6}]),
        ({}, [{"causal": False}, {"softcap": 2.0}, {"scale": 0.3}]),
        ({"segment_ids": IDS}, [{}, {"segment_ids": segments(2, 40, seed=1)}]),
        (DROPPED, [DROPPED | {"dropout_seed": 6}, DROPPED | {"dropout": 0.31}, {}]),
    ],
)
def test_the_comparison_can_fail(right, wrong):
    args, cotangents = inputs()
    got = [results(name, args, cotangents, **right) for name in ("xla", "pallas")]
    for options in wrong:
        want = wanted(args, cotangents, **options)
        for each in got:
            # Dropout leaves lse as it is.
            found = [d for i, d in enumerate(differences(each, want)) if i != 1 or right != DROPPED]
            assert min(found) > 100 * tolerance(jnp.float32, 40)


@pytest.mark.parametrize("name", ["sinks", "bias", "q"])
def test_the_comparison_sees_each_array(name):
    args, cotangents = inputs(sinks=True, bias=(1, 4))
    changed = args | {name: args[name] * 1.1}
    want = wanted(changed, cotangents)
    for implementation in ("xla", "pallas"):
        got = results(implementation, args, cotangents)
        assert min(differences(got, want)) > 10 * tolerance(jnp.float32, 40)


def test_the_gradient_of_lse_counts():
    args, (d_out, d_lse) = inputs(sinks=True)
    want = wanted(args, (d_out, jnp.zeros_like(d_lse)))
    for name in ("xla", "pallas"):
        dk, dq, d_sinks, dv = list(differences(results(name, args, (d_out, d_lse)), want))[2:]
        assert min(dq, dk, d_sinks) > 0.01 and dv < tolerance(jnp.float32, 40)


@st.composite
def calls(draw):
    K = draw(st.sampled_from([1, 2]))
    H = K * draw(st.sampled_from([1, 3]))
    shape = {
        "T": draw(st.sampled_from([1, 5, 16, 33])),
        "S": draw(st.sampled_from([16, 33])),
        "H": H,
        "K": K,
        "D": draw(st.sampled_from([4, 16, 32, 40])),
        "Dv": draw(st.sampled_from([4, 16, 48])),
        # One sink's gradient is one number, and nothing when its terms cancel.
        "sinks": draw(st.booleans()) and H > 1,
        "bias": draw(st.sampled_from([None, None, (1, 1), (2, H)])),
    }
    causal = draw(st.booleans())
    window = draw(st.sampled_from([None, 1, 6, 20])) if causal else None
    make = draw(st.sampled_from([None, segments, shuffled]))
    ids = {}
    if make:
        ids = {"segment_ids": make(2, shape["T"]), "kv_segment_ids": make(2, shape["S"])}
    dropped = draw(st.sampled_from([{}, {}, {"dropout": 0.4, "dropout_seed": 3}]))
    softcap = draw(st.sampled_from([None, 1.5]))
    return shape, {"causal": causal, "window": window, "softcap": softcap, **dropped, **ids}


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(calls())
def test_some_shapes(call):
    check(*call)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(calls())
def test_any_shape(call):
    check(*call)


def test_parts_merge_by_their_lse():
    args, _ = inputs(T=40, sinks=True)
    q, k, v, sinks = (args[name] for name in ("q", "k", "v", "sinks"))
    options = {"causal": False, "implementation": "pallas", "return_lse": True}
    whole, lse = flash_attention(q, k, v, sinks=sinks, **options)
    parts = [
        flash_attention(q, k[:, :16], v[:, :16], sinks=sinks, **options),
        flash_attention(q, k[:, 16:], v[:, 16:], **options),
    ]
    merged = jnp.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * jnp.exp(part - merged)[..., None] for o, part in parts)
    np.testing.assert_allclose(merged, lse, atol=1e-5)
    np.testing.assert_allclose(out, whole, atol=1e-5)
    assert jnp.abs(parts[0][0] - whole).max() > 0.1
