"""One contract for every attention: forward and VJP against the definition in float64.

Blocks are 16 tokens here, so that these short sequences take several. Every case runs XLA's and the
Pallas kernels, those in Pallas's interpreter where there is no card.
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

from mud_puppy.kernels import choice, decode_attention, flash_attention, selfcheck, target, tuned
from mud_puppy.kernels.attention import (
    cudnn,
    decode_xla,
    dropout,
    flash,
    prepare,
    reference,
    selection,
    tile,
    xla,
)
from mud_puppy.kernels.attention.plan import Options, Plan, pieces, segment_ranges
from tests.kernels import contract
from tests.kernels.contract import differences, tolerance

TILE = {"q_block": 16, "k_block": 16, "num_warps": 4, "num_stages": 2}
RDNA = TILE | {"transposed": True, "chunk": 16, "num_stages": 1}
RDNA |= {"one_loop": True, "row_columns": 16}
PLAIN = prepare.Tiles(*[tuple(sorted(TILE.items()))] * 3)
SPLIT = prepare.Tiles(*[tuple(sorted(RDNA.items()))] * 4)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "CPU_BLOCK", 16)
        patch.setattr(xla, "BLOCK", 16)
        patch.setattr(decode_xla, "CHUNK", 16)
        # Wide heads go the way of RDNA's tiles: streamed, transposed, one kernel a gradient.
        patch.setattr(
            flash, "tuned_tiles", lambda q, v, packed: SPLIT if q.shape[-1] > 16 else PLAIN
        )
        yield


def inputs(B=2, T=40, S=None, H=4, K=2, D=8, Dv=None, dtype=jnp.float32, sinks=False, bias=None):
    """({q, k, v, sinks, bias}, cotangents of (out, lse))"""
    r = np.random.default_rng(0)
    S, Dv = T if S is None else S, Dv or D
    shapes = {"q": (B, T, H, D), "k": (B, S, K, D), "v": (B, S, K, Dv)}
    shapes |= {"sinks": (H,)} if sinks else {}
    shapes |= {"bias": (*bias, T, S)} if bias else {}
    arrays = {name: jnp.asarray(r.normal(size=s), dtype) for name, s in shapes.items()}
    d_out, d_lse = r.normal(size=(B, T, H, Dv)), r.normal(size=(B, T, H))
    return arrays, (jnp.asarray(d_out, dtype), jnp.asarray(d_lse, jnp.float32))


def segments(B, T, seed=0):
    """Rows of 1..n ascending with 0 at the end, as packing makes them."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, T, (B, 4)), axis=1)
    ids = 1 + (np.arange(T)[None, :, None] >= cuts[:, None, :]).sum(-1)
    return jnp.asarray(np.where(ids == 5, 0, ids), jnp.int32)


def shuffled(B, T, seed=0):
    """Ids in no order, in runs of a few tokens."""
    r = np.random.default_rng(seed)
    return jnp.asarray(np.repeat(r.integers(0, 3, (B, -(-T // 6))), 6, axis=1)[:, :T], jnp.int32)


def attend(implementation, options):
    def f(arrays):
        rest = {name: x for name, x in arrays.items() if name not in "qkv"}
        return flash_attention(
            *(arrays[name] for name in "qkv"),
            **rest,
            **options,
            implementation=implementation,
            return_lse=True,
        )

    return f


def results(implementation, args, cotangents, **options):
    """out, lse, then the gradients of the arrays in the order of their names"""
    return contract.compiled(attend(implementation, options), (args,), cotangents)


def wanted(args, cotangents, **options):
    return contract.in_float64(attend("reference", options), (args,), cotangents)


def check(shape, options, implementations=("xla", "pallas")):
    args, cotangents = inputs(**shape)
    want = wanted(args, cotangents, **options)
    # A gradient sums over keys what was summed over columns.
    dtype, length = args["q"].dtype, args["k"].shape[1] * args["v"].shape[3]
    for name in implementations:
        got = results(name, args, cotangents, **options)
        assert max(differences(got, want)) < tolerance(dtype, length), name
        assert got[0].dtype == dtype and got[1].dtype == jnp.float32
        for g, x in zip(got[2:], jax.tree.leaves(args), strict=True):
            assert g.dtype == x.dtype and g.shape == x.shape


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


# Which blocks the kernels visit.


@pytest.mark.parametrize(("T", "S"), [(64, 64), (37, 64), (64, 40), (1, 50)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 16, 17, 40])
def test_ranges_hold_what_is_seen(T, S, causal, window):
    plan = Plan(Options(causal, window if causal else None, 1.0), T, S, 16, 8, 4, 1)
    end = plan.q_blocks * 16
    seen = plan.seen(np.arange(end)[:, None], np.arange(plan.k_blocks * 8)[None])
    seen = np.broadcast_to(seen, (end, plan.k_blocks * 8))
    tiles = seen.reshape(plan.q_blocks, 16, plan.k_blocks, 8).transpose(0, 2, 1, 3)
    for i in range(plan.q_blocks):
        within(tiles[i], [int(x) for x in plan.key_range(i)])
    for j in range(plan.k_blocks):
        # Keys after S are not masked for d_k and d_v: their rows are dropped.
        within(tiles[..., : S - 8 * j][:, j], [int(x) for x in plan.query_range(j)], 8 * j + 8 > S)


def within(tiles, bounds, padded=False):
    """tiles [n, rows, columns]: all that is seen in [low, high), none hidden in the full part."""
    low, full_low, full_high, high = bounds
    assert 0 <= low <= full_low <= full_high <= high <= len(tiles)
    used = np.flatnonzero(tiles.any((1, 2)))
    assert (used >= low).all() and (used < high).all()
    assert high - low == len(used) or padded or not len(used)
    assert tiles[full_low:full_high].all()
    assert padded or full_high - full_low == tiles[low:high].all((1, 2)).sum()


@pytest.mark.parametrize("make", [segments, shuffled])
@pytest.mark.parametrize("by_key", [False, True])
def test_ranges_of_segments(make, by_key):
    B, T = 3, 96
    plan = Plan(Options(True, 70, 1.0), T, T, 16, 8, 4, 1)
    ids = np.asarray(make(B, T))
    table = segment_ranges(plan, ids, ids, by_key=by_key)
    refs = {name: np.asarray(x) for name, x in table.items()}
    seen = np.asarray(plan.seen(np.arange(T)[:, None], np.arange(T)[None]))
    seen = seen & (ids[:, :, None] == ids[:, None, :])
    tiles = seen.reshape(B, 6, 16, 12, 8).transpose(0, 1, 3, 2, 4)
    tiles = tiles.transpose(0, 2, 1, 3, 4) if by_key else tiles
    visited = full = 0
    for b, n in np.ndindex(refs["first"].shape):
        low, full_low, full_high, high, same = map(
            np.asarray, tile.ranges(plan, refs, b, n, by_key=by_key)
        )
        full_low, full_high = max(full_low, same[0]), min(full_high, same[1])
        used = np.flatnonzero(tiles[b, n].any((1, 2)))
        assert (used >= low).all() and (used < high).all()
        assert tiles[b, n, full_low:full_high].all()
        full += max(0, full_high - full_low)
        visited += high - low
    blocks = tiles.any((3, 4)).sum()
    assert visited <= (1.1 if make is segments else 3) * blocks
    assert blocks < visited or make is segments
    assert make is shuffled or full > 0.5 * tiles.all((3, 4)).sum() > 0


@pytest.mark.parametrize("by_key", [False, True])
def test_table_of_segments_in_parts(by_key, monkeypatch):
    plan, ids = Plan(Options(True, None, 1.0), 96, 96, 16, 8, 4, 1), segments(2, 96)
    whole = segment_ranges(plan, ids, ids, by_key=by_key)
    monkeypatch.setattr("mud_puppy.kernels.attention.plan.MOST_PAIRS", 24)
    parts = segment_ranges(plan, ids, ids, by_key=by_key)
    for name, x in whole.items():
        np.testing.assert_array_equal(x, parts[name])


def test_table_of_segments_is_linear():
    def temp_bytes(T):
        plan = Plan(Options(True, None, 1.0), T, T, 16, 16, 4, 1)
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
        f = jax.jit(lambda ids: segment_ranges(plan, ids, ids)).lower(ids).compile()
        return f.memory_analysis().temp_size_in_bytes

    assert temp_bytes(2**18) < 5 * temp_bytes(2**16)


def test_pieces_of_heads():
    for size in range(16, 257, 16):
        parts = pieces(size)
        assert sum(width for _, width in parts) == size
        assert all(width & (width - 1) == 0 and width >= 16 for _, width in parts)
    assert pieces(96) == [(0, 64), (64, 32)] and pieces(192) == [(0, 128), (128, 64)]


# Dropout


def test_dropout_is_even_and_without_pattern():
    at = jnp.ogrid[:2, :3, :64, :128]
    kept = np.asarray(dropout.kept(0.25, jnp.uint32(1), *at), np.float64)
    assert abs(kept.mean() - 0.75) < 5 * (0.1875 / kept.size) ** 0.5
    for axis in range(4):
        means = kept.mean(tuple(a for a in range(4) if a != axis))
        assert np.abs(means - 0.75).max() < 5 * (0.1875 / (kept.size / len(means))) ** 0.5
        a, b = np.take(kept, 0, axis), np.take(kept, 1, axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / a.size**0.5
    other = np.asarray(dropout.kept(0.25, jnp.uint32(2), *at))
    assert abs(np.corrcoef(kept.ravel(), other.ravel())[0, 1]) < 5 / kept.size**0.5


# XLA's implementation


def qkv(**shape):
    return tuple(inputs(**shape)[0][name] for name in "qkv")


def test_pairs_skip_what_no_query_sees():
    def pairs(**options):
        lengths = {"T": options.pop("T", 64), "S": 64, "q_block": 16, "k_block": 16}
        options = Options(**{"causal": True, "window": None, "scale": 1.0, **options})
        return xla._Plan(**lengths, options=options).pairs().tolist()

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
    devices = jax.devices("cpu")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    q, k, v = qkv(B=8)
    ids = segments(8, 40)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def grads(q, k, v, ids):
        def loss(*args):
            return (flash_attention(*args, segment_ids=ids, implementation="xla") ** 2).sum()

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
    args = qkv(T=13)  # one block: every product stands in the jaxpr once

    def products(policy):
        def loss(*args):
            return jnp.sin(flash_attention(*args, implementation="xla")).sum()

        f = jax.checkpoint(loss, policy=policy)
        return str(jax.make_jaxpr(jax.value_and_grad(f, (0, 1, 2)))(*args)).count("dot_general[")

    policies = jax.checkpoint_policies
    assert products(policies.save_only_these_names("attention")) == 2 + 5
    assert products(policies.nothing_saveable) == 2 + 2 + 5


def used_kernels(jaxpr):
    """Pallas calls some result of which is used. (JAX keeps the others; XLA drops them.)"""
    used = {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    used |= {v for v in jaxpr.outvars if not hasattr(v, "val")}
    mine = [e for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
    count = sum(any(v in used for v in e.outvars) for e in mine)
    rest = [p for e in jaxpr.eqns if e not in mine for p in e.params.values()]
    inner = [getattr(p, "jaxpr", p) for p in rest]
    return count + sum(used_kernels(p) for p in inner if hasattr(p, "eqns"))


def test_a_remat_policy_that_saves_attention_does_not_run_the_kernel_again():
    args = qkv(T=13)

    def loss(*args):
        return jnp.sin(flash_attention(*args, implementation="pallas")).sum()

    def kernels(policy):
        f = jax.checkpoint(loss, policy=policy)
        return used_kernels(jax.make_jaxpr(jax.value_and_grad(f, (0, 1, 2)))(*args).jaxpr)

    policies = jax.checkpoint_policies
    assert kernels(policies.save_only_these_names("attention")) == 3
    assert kernels(policies.nothing_saveable) == 4


# decode_attention


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_decode_equals_the_rows_of_flash_attention(T, window):
    q, k, v = qkv()
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
    q, k, v = qkv(H=1, K=1)
    positions = jnp.array([[3, 30], [17, 2]])
    got = np.asarray(decode_attention(q[:, :2], k, v, positions))
    q, k, v = (np.asarray(x, np.float64)[:, :, 0] for x in (q, k, v))
    for b, t in np.ndindex(2, 2):
        n = int(positions[b, t]) + 1
        p = np.exp(k[b, :n] @ q[b, t] * 8**-0.5)
        np.testing.assert_allclose(got[b, t, 0], p @ v[b, :n] / p.sum(), atol=1e-6)


# The dispatcher


@pytest.fixture
def cpu():
    with target.use(target.Target("cpu", "cpu")):
        yield


def test_says_once_who_serves_and_why(cpu, caplog):
    choice.say.cache_clear()
    args = qkv()
    with caplog.at_level(logging.INFO, logger="mud_puppy"):
        flash_attention(*args)
        flash_attention(*args, window=3)
    assert caplog.messages == ["attention: xla on cpu"]


def test_refuses_bad_calls(cpu):
    f = inspect.unwrap(flash_attention)  # as users have it, without the type checks of tests
    q, k, v = qkv()
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
    with pytest.raises(ValueError, match="softcap must be positive"):
        f(q, k, v, softcap=0.0)
    with pytest.raises(ValueError, match=r"expected sinks \(4,\)"):
        f(q, k, v, sinks=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"expected a bias \[2 or 1, 4 or 1, 40, 40\]"):
        f(q, k, v, bias=jnp.zeros((1, 2, 40, 40)))
    with pytest.raises(ValueError, match="a probability below 1"):
        f(q, k, v, dropout=1.0, dropout_seed=0)
    with pytest.raises(ValueError, match="needs a dropout_seed"):
        f(q, k, v, dropout=0.1)
    with pytest.raises(ValueError, match="pallas cannot serve this call: a head is wider"):
        f(*qkv(D=272), implementation="pallas")


def chosen(arch, monkeypatch, ids=None, fault=None, implementation=None, **shape):
    """The implementation that is chosen for a call on that chip."""
    monkeypatch.setattr(selfcheck, "fault", lambda name, case: fault)
    q, k, v = qkv(**{"dtype": jnp.bfloat16} | shape)
    platform = "cuda" if arch.startswith("sm") else "rocm"
    with target.use(target.Target(platform, arch)):
        return selection.choose(
            implementation, q, k, v, ids, ids, Options(True, None, 1.0), {}, False
        )


def test_chooses_by_chip_and_call(hopper, monkeypatch):
    ids = segments(2, 40)
    assert chosen("sm90", monkeypatch) == "cudnn"
    assert chosen("sm90", monkeypatch, ids) == "pallas"  # which skips blocks; cuDNN masks
    assert chosen("sm90", monkeypatch, T=39) == "pallas"
    assert chosen("sm90", monkeypatch, D=272) == "xla"
    assert chosen("sm90", monkeypatch, dtype=jnp.float32) == "xla"
    monkeypatch.setattr(cudnn, "on_cuda", lambda: False)
    for arch in ("gfx1100", "gfx942"):
        assert chosen(arch, monkeypatch) == chosen(arch, monkeypatch, ids) == "pallas"
        assert chosen(arch, monkeypatch, D=272) == "xla"


def test_a_wrong_kernel_is_refused_by_name(monkeypatch, caplog):
    choice.say.cache_clear()
    wrong = "attention kernels failed"
    assert chosen("gfx1100", monkeypatch, fault=wrong) == "xla"
    assert caplog.records[0].levelname == "WARNING" and wrong in caplog.text
    with pytest.raises(ValueError, match="pallas cannot serve this call: attention kernels failed"):
        chosen("gfx1100", monkeypatch, fault=wrong, implementation="pallas")


def test_the_self_check_sees_a_wrong_kernel(monkeypatch):
    error, bound = selection._case(jnp.float32, 16, 16)
    assert error < bound / 20
    right = flash.attention

    def wrong(q, k, v, q_ids, k_ids, **options):
        return right(q, k, v, 0 * q_ids, 0 * k_ids, **options)

    monkeypatch.setattr(flash, "attention", wrong)
    error, bound = selection._case(jnp.float32, 16, 16)
    assert error > 10 * bound


def test_every_chip_has_every_tile():
    table = tuned._table("flash_attention")
    assert set(table) == {"sm90", "gfx1100", "gfx1201", "gfx90a", "gfx942", "gfx950"}
    wanted = {f"{p} {d} {w}" for p in prepare.PASSES for d in prepare.KINDS for w in prepare.WIDTHS}
    for entry in table.values():
        assert wanted <= set(entry["tiles"])
        assert all(entry[note] for note in ("device", "versions", "date", "method"))


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
    def reason(shape=None, ids=None, kv_ids=None, causal=True, return_lse=False, extras=None):
        q, k, v = qkv(**{"dtype": jnp.bfloat16, "K": 4, **(shape or {})})
        kv_ids = ids if kv_ids is None else kv_ids
        options = Options(causal, None, 1.0)
        return cudnn.declines(q, k, v, ids, kv_ids, options, extras or {}, return_lse)

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
    assert "values are 16 wide" in reason({"Dv": 16})
    for name in ("sinks", "bias"):
        assert name in reason(extras={name: jnp.zeros(4)})
    assert "dropout" in reason(extras={"seed": jnp.uint32(1)})
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
    args = qkv(K=2, dtype=jnp.bfloat16)

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
    options = Options(causal, window, scale)
    out, _ = reference.attention(q, k, v, ids, ids, options=options)
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
    args, (d_out, d_lse) = inputs(K=4, dtype=jnp.bfloat16)
    ids = segments(2, 40)
    ids = {"packed": ids, "alone": ids * 0 + 5, "unordered": jnp.where(ids == 3, 1, ids)}[kind]

    def f(args):
        q, k, v = (args[name] for name in "qkv")
        return flash_attention(q, k, v, segment_ids=ids, implementation="cudnn")

    got = contract.compiled(f, (args,), d_out)

    def expected(ids):
        out, _, *grads = wanted(args, (d_out, jnp.zeros_like(d_lse)), segment_ids=ids)
        return [out, *grads]

    assert max(differences(got, expected(ids))) < tolerance(jnp.bfloat16, 40)
    other = segments(2, 40) if kind == "alone" else None
    assert min(differences(got, expected(other))) > tolerance(jnp.bfloat16, 40)
