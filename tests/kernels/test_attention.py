"""One contract for every attention: forward and VJP against the definition in float64.

Blocks are 16 tokens here, so that these short sequences take several.
"""

import inspect
import logging
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mud_puppy.kernels import attention as dispatch
from mud_puppy.kernels import decode_attention, flash_attention
from mud_puppy.kernels.attention import cudnn, decode, reference, xla


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "CPU_BLOCK", 16)
        patch.setattr(decode, "CHUNK", 16)
        yield


def inputs(B=2, T=40, S=None, H=4, K=2, D=8, dtype=jnp.float32):
    r = np.random.default_rng(0)
    S = T if S is None else S
    shapes = [(B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D), (B, T, H)]
    q, k, v, d_out, d_lse = (jnp.asarray(r.normal(size=s), dtype) for s in shapes)
    return (q, k, v), (d_out, d_lse.astype(jnp.float32))


def segments(B, T, seed=0):
    """Rows of 1..n ascending with 0 at the end, as packing makes them."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, T, (B, 4)), axis=1)
    ids = 1 + (np.arange(T)[None, :, None] >= cuts[:, None, :]).sum(-1)
    return jnp.asarray(np.where(ids == 5, 0, ids), jnp.int32)


def run(f, args, cotangents):
    """(out, lse), (dq, dk, dv)"""
    y, pull = jax.vjp(f, *args)
    return *y, *pull(jax.tree.map(lambda g, y: g.astype(y.dtype), cotangents, y))


def xla_results(args, cotangents, **options):
    def f(*args):
        return flash_attention(*args, implementation="xla", return_lse=True, **options)

    return jax.jit(lambda *args: run(f, *args))(args, cotangents)


def reference_results(args, cotangents, causal=True, window=None, segment_ids=None, **kv):
    """In float64, from the same rounded inputs."""
    ids = segment_ids, kv.get("kv_segment_ids", segment_ids)
    ids = [x if x is None else jnp.asarray(x) for x in ids]
    with jax.enable_x64(True):
        wide = [
            tuple(jnp.asarray(np.asarray(x, np.float64)) for x in xs) for xs in (args, cotangents)
        ]
        scale = args[0].shape[-1] ** -0.5

        def f(*args):
            return reference.attention(*args, *ids, causal=causal, window=window, scale=scale)

        return [np.asarray(x) for x in jax.jit(lambda *args: run(f, *args))(*wide)]


def tolerance(dtype, length):
    """Sums of `length` terms in float32, inputs of products and results rounded to dtype."""
    half = 0 if dtype == jnp.float32 else 3 * float(jnp.finfo(dtype).eps)
    return 4 * float(jnp.finfo(jnp.float32).eps) * length**0.5 + half


def differences(got, want):
    """The largest difference of each result, relative to its size; -inf must meet -inf."""
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.array_equal(np.isneginf(g), np.isneginf(w))
        g, w = g[np.isfinite(w)], w[np.isfinite(w)]
        yield np.abs(g - w).max() / max(np.abs(w).max(), 1e-3)


CASES = {
    "causal": ({}, {}),
    "full": ({}, {"causal": False}),
    "window": ({}, {"window": 7}),
    "window of one": ({}, {"window": 1}),
    "window of a block": ({}, {"window": 17}),
    "one key head": ({"H": 4, "K": 1}, {}),
    "no groups": ({"H": 3, "K": 3}, {}),
    "odd sizes": ({"T": 37, "D": 5, "H": 3, "K": 1}, {}),
    "one token": ({"T": 1}, {}),
    "single block": ({"T": 13}, {}),
    "packed": ({}, {"segment_ids": segments(2, 40)}),
    "packed, window": ({}, {"segment_ids": segments(2, 40), "window": 5}),
    "packed, full, odd": ({"T": 37}, {"segment_ids": segments(2, 37), "causal": False}),
    "last queries of a longer sequence": ({"T": 9, "S": 50}, {"window": 20}),
    "one pair, the last": ({"T": 1, "S": 50}, {"window": 2}),
    "queries before any key": ({"T": 50, "S": 20}, {}),
    "cross": ({"T": 21, "S": 45}, {"causal": False}),
    "cross, segments without keys": (
        {"T": 21, "S": 45},
        {"causal": False, "segment_ids": segments(2, 21), "kv_segment_ids": segments(2, 45) % 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_xla_equals_the_definition(case):
    shape, options = CASES[case]
    args, cotangents = inputs(**shape)
    got = xla_results(args, cotangents, **options)
    want = reference_results(args, cotangents, **options)
    assert max(differences(got, want)) < tolerance(jnp.float32, args[1].shape[1])
    assert got[0].dtype == jnp.float32 and got[1].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    args, cotangents = inputs(dtype=dtype)
    options = {"segment_ids": segments(2, 40), "window": 9}
    got = xla_results(args, cotangents, **options)
    assert [x.dtype for x in got] == [dtype, jnp.float32, dtype, dtype, dtype]
    want = reference_results(args, cotangents, **options)
    assert max(differences(got, want)) < tolerance(dtype, 40)
    wrong = reference_results(args, cotangents, **{**options, "window": 8})
    assert min(differences(got, wrong)) > tolerance(dtype, 40)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"window": 7}, {"window": 8}),
        ({"window": 7}, {"window": 6}),
        ({}, {"causal": False}),
        ({"segment_ids": segments(2, 40)}, {}),
        ({"segment_ids": segments(2, 40)}, {"segment_ids": segments(2, 40, seed=1)}),
    ],
)
def test_the_comparison_can_fail(right, wrong):
    args, cotangents = inputs()
    got = xla_results(args, cotangents, **right)
    want = reference_results(args, cotangents, **wrong)
    assert min(differences(got, want)) > 100 * tolerance(jnp.float32, 40)


def test_the_gradient_of_lse_counts():
    args, (d_out, d_lse) = inputs()
    got = xla_results(args, (d_out, d_lse))
    without = reference_results(args, (d_out, jnp.zeros_like(d_lse)))
    dq, dk, dv = list(differences(got, without))[2:]
    assert min(dq, dk) > 0.01 and dv < tolerance(jnp.float32, 40)


@st.composite
def calls(draw):
    K = draw(st.sampled_from([1, 2]))
    shape = {
        "T": draw(st.sampled_from([5, 16, 33])),
        "S": draw(st.sampled_from([16, 33])),
        "H": K * draw(st.sampled_from([1, 3])),
        "K": K,
        "D": draw(st.sampled_from([4, 7])),
    }
    causal = draw(st.booleans())
    window = draw(st.sampled_from([None, 1, 6, 20])) if causal else None
    ids = {"segment_ids": segments(2, shape["T"]), "kv_segment_ids": segments(2, shape["S"])}
    packed = draw(st.booleans())
    return shape, {"causal": causal, "window": window, **(ids if packed else {})}


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(calls())
def test_any_shape(call):
    shape, options = call
    args, cotangents = inputs(**shape)
    got = xla_results(args, cotangents, **options)
    want = reference_results(args, cotangents, **options)
    assert max(differences(got, want)) < tolerance(jnp.float32, shape["S"])


def test_pairs_skip_what_no_query_sees():
    def pairs(**options):
        plan = {"T": 64, "S": 64, "q_block": 16, "k_block": 16, "causal": True, "window": None}
        return xla._Plan(**{**plan, "scale": 1.0, **options}).pairs().tolist()

    assert len(pairs()) == 10 and len(pairs(causal=False)) == 16
    assert pairs(window=1) == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert pairs(window=2) == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    assert pairs(T=16) == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert pairs(T=1, window=2) == [[0, 3]]


def temp_bytes(f, T):
    q = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    return jax.jit(f).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_is_linear(direction):
    def growth(implementation):
        def f(*args):
            return flash_attention(*args, implementation=implementation)

        if direction == "backward":
            f = jax.grad(lambda *args, f=f: (f(*args) ** 2).sum(), (0, 1, 2))
        return temp_bytes(f, 2048) / temp_bytes(f, 512)

    assert growth("xla") < 5 < 12 < growth("reference")


def test_batch_shards_stay_apart():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    (q, k, v), _ = inputs(B=8)
    ids = segments(8, 40)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def grads(q, k, v, ids):
        def loss(*args):
            return (flash_attention(*args, segment_ids=ids) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    def lowered(f):
        return jax.jit(f).lower(*jax.device_put((q, k, v, ids), rows)).compile()

    f = lowered(grads)
    assert "all-gather" not in f.as_text()
    got = f(*jax.device_put((q, k, v, ids), rows))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(grads(q, k, v, ids)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def merged(q, k, v, ids):  # what must not happen: B folded into another axis
        def whole(x):
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))

        return grads(whole(q), whole(k), whole(v), ids)

    assert "all-gather" in lowered(merged).as_text()


def test_a_remat_policy_that_saves_attention_does_not_run_it_again():
    args, _ = inputs(T=13)  # one block: every product stands in the jaxpr once

    def products(policy):
        f = jax.checkpoint(lambda *args: jnp.sin(flash_attention(*args)).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.value_and_grad(f, (0, 1, 2)))(*args)).count("dot_general[")

    policies = jax.checkpoint_policies
    assert products(policies.save_only_these_names("attention")) == 2 + 5
    assert products(policies.nothing_saveable) == 2 + 2 + 5


# decode_attention


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_decode_equals_the_rows_of_flash_attention(T, window):
    (q, k, v), _ = inputs(T=40)
    want = flash_attention(q, k, v, window=window)[:, 40 - T :]
    rest = jnp.full((2, 9, 2, 8), 1e3)  # slots past every position
    cache = [jnp.concatenate([x, rest], axis=1) for x in (k, v)]
    positions = jnp.broadcast_to(jnp.arange(40 - T, 40), (2, T))
    got = jax.jit(lambda *args: decode_attention(*args, window=window))(
        q[:, 40 - T :], *cache, positions
    )
    np.testing.assert_allclose(got, want, atol=tolerance(jnp.float32, 49) * 4)
    one_less = decode_attention(q[:, 40 - T :], *cache, positions - 1, window=window)
    assert jnp.abs(one_less - want).max() > 0.01


def test_decode_rows_have_their_own_positions():
    (q, k, v), _ = inputs(H=1, K=1)
    positions = jnp.array([[3, 30], [17, 2]])
    got = np.asarray(decode_attention(q[:, :2], k, v, positions))
    q, k, v = (np.asarray(x, np.float64)[:, :, 0] for x in (q, k, v))
    for b, t in np.ndindex(2, 2):
        n = int(positions[b, t]) + 1
        p = np.exp(k[b, :n] @ q[b, t] * 8**-0.5)
        np.testing.assert_allclose(got[b, t, 0], p @ v[b, :n] / p.sum(), atol=1e-6)


# The dispatcher


def test_says_once_who_serves_and_why(caplog):
    dispatch._say.cache_clear()
    args, _ = inputs()
    with caplog.at_level(logging.INFO, logger="mud_puppy"):
        flash_attention(*args)
        flash_attention(*args, window=3)
    assert caplog.messages == [
        "attention: xla on cpu (cudnn declined: the platform is cpu, not cuda)"
    ]


def test_refuses_bad_calls():
    f = inspect.unwrap(flash_attention)  # as users have it, without the type checks of tests
    (q, k, v), _ = inputs()
    with pytest.raises(ValueError, match="cudnn cannot serve this call: the platform is cpu"):
        f(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="'triton' is none of"):
        f(q, k, v, implementation="triton")
    with pytest.raises(ValueError, match="K dividing H"):
        f(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="one dtype"):
        f(q, k, v.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="a window needs causal attention"):
        f(q, k, v, window=0)
    with pytest.raises(ValueError, match="a window needs causal attention"):
        f(q, k, v, window=2, causal=False)
    with pytest.raises(ValueError, match="pass kv_segment_ids"):
        f(q[:, 1:], k, v, segment_ids=segments(2, 39))
    with pytest.raises(ValueError, match="without segment_ids"):
        f(q, k, v, kv_segment_ids=segments(2, 40))


# cuDNN without the card: what it declines, what it is asked for, and which call segments take.

# Forward and backward, each plain and with the mask (which JAX calls a scale bias).
BOTH = ["", "Backward", "ScaleBias", "ScaleBiasBackward"]


@pytest.fixture
def hopper(monkeypatch):
    """The Python side of an H100 with cuDNN 9.20."""
    monkeypatch.setattr(cudnn, "on_cuda", lambda: True)
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 92000)
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn.fused, "is_cuda_compute_capability_equal", lambda capability: False)


def test_cudnn_declines_by_name(hopper, monkeypatch):
    def reason(shape=None, ids=None, kv_ids=None, causal=True, return_lse=False):
        (q, k, _), _ = inputs(**{"dtype": jnp.bfloat16, "K": 4, **(shape or {})})
        kv_ids = ids if kv_ids is None else kv_ids
        return cudnn.declines(q, k, causal, ids, kv_ids, return_lse)

    ids = segments(2, 40)
    assert reason() is None and reason(ids=ids) is None
    assert reason({"S": 50}, causal=False) is None
    assert "float32" in reason({"dtype": jnp.float32})
    assert "head_dim 12" in reason({"D": 12})
    assert "head_dim 264" in reason({"D": 264})
    assert "odd" in reason({"T": 39})
    assert "diagonal" in reason({"S": 50})
    assert "log-sum-exp" in reason(return_lse=True)
    assert "different segment ids" in reason(ids=ids, kv_ids=ids + 1)
    monkeypatch.setattr(cudnn, "MASK_BYTES", 2 * 40 * 40 * 2 - 1)
    assert "mask" in reason(ids=ids) and reason() is None


@pytest.mark.parametrize(
    ("options", "asked", "calls"),
    [
        ({}, ("CAUSAL", 0), ["", "Backward"]),
        ({"causal": False}, ("NO_MASK", 0), ["", "Backward"]),
        ({"window": 7}, ("CAUSAL", 7), ["", "Backward"]),
        ({"window": 40}, ("CAUSAL", 0), ["", "Backward"]),
        ({"segment_ids": segments(2, 40)}, ("CAUSAL", 0), BOTH),
        ({"segment_ids": segments(2, 40), "window": 7}, ("CAUSAL", 7), BOTH),
        ({"segment_ids": segments(2, 40), "causal": False}, ("NO_MASK", 0), BOTH),
    ],
)
def test_cudnn_is_asked_for_the_right_mask(hopper, options, asked, calls):
    args, _ = inputs(K=2, dtype=jnp.bfloat16)

    def loss(*args):
        return flash_attention(*args, implementation="cudnn", **options).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    found = re.findall(r"@__cudnn\$fmha(\w*)Softmax(\w*)", text)
    assert sorted(bias + backward for bias, backward in found) == calls
    masks = re.findall(r'"mask_type": "(\w+)"', text)
    windows = re.findall(r'"sliding_window_length": (\d+)', text)
    assert [set(masks), set(windows)] == [{str(x)} for x in asked]


def fake_forward(q, k, v, *, mask, scale, mask_type, **rest):
    """What cuDNN computes, by way of the reference; a mask stands for segment ids."""
    ids = None if mask is None else jnp.argmax(mask[:, 0], axis=-1)
    window, causal = rest["sliding_window_length"], mask_type == cudnn.fused.MaskType.CAUSAL
    out, _ = reference.attention(q, k, v, ids, ids, causal=causal, window=window, scale=scale)
    B, T, H, _ = q.shape
    return out, jnp.full((B, H, T), 7.0)


def fake_backward(scale, seed, dropout, variadic, mask_type, layout, window, version, res, *last):
    del seed, dropout, layout, version, res
    (q, k, v, bias, *_, stats, _), d_out = last
    assert variadic == (bias.size > 0, False)
    options = {"scale": scale, "mask_type": mask_type, "sliding_window_length": window}

    def f(q, k, v):
        return fake_forward(q, k, v, mask=bias == 0 if bias.size else None, **options)[0]

    grads = jax.vjp(f, q, k, v)[1](d_out)
    # NaN if the statistics are not those of the forward pass.
    return *(g * jnp.where(stats.min() == 7, 1, jnp.nan).astype(g.dtype) for g in grads), None


@pytest.mark.parametrize("kind", ["packed", "alone", "unordered"])
def test_segments_through_cudnn(hopper, monkeypatch, kind):
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", fake_forward)
    monkeypatch.setattr(cudnn.fused, "_dot_product_attention_bwd_rule", fake_backward)
    args, cotangents = inputs(K=4, dtype=jnp.bfloat16)
    ids = segments(2, 40)
    ids = {"packed": ids, "alone": ids * 0 + 5, "unordered": jnp.where(ids == 3, 1, ids)}[kind]

    def f(*args):
        return (flash_attention(*args, segment_ids=ids, implementation="cudnn"),)

    got = jax.jit(lambda *args: run(f, *args))(args, cotangents[:1])
    zero_lse = cotangents[0], jnp.zeros_like(cotangents[1])
    want = reference_results(args, zero_lse, segment_ids=ids)
    assert max(differences(got, [want[0], *want[2:]])) < tolerance(jnp.bfloat16, 40)
    other = segments(2, 40) if kind == "alone" else None
    wrong = reference_results(args, zero_lse, segment_ids=other)
    assert min(differences(got, [wrong[0], *wrong[2:]])) > tolerance(jnp.bfloat16, 40)
