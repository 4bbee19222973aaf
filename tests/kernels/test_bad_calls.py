"""What the ops do with calls that make no sense, with empty arrays and with numbers that are none.

A call that cannot mean anything is a ValueError that names the op's argument, not a traceback of
JAX; nothing is cast in silence. Empty batches are served. A NaN stays one.
"""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mud_puppy as mp
from mud_puppy import kernels
from mud_puppy.kernels import choice, target, tuned
from mud_puppy.kernels.attention import decode_pallas
from mud_puppy.kernels.attention import xla as attention_xla
from mud_puppy.kernels.attention.plan import Options
from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import FORMATS, dequantize

NAMES = [name for name in kernels.__all__ if name not in ("Quantized", "matmul")]
# As users have them, without the type checks of tests.
bare = SimpleNamespace(**{name: inspect.unwrap(getattr(kernels, name)) for name in NAMES})


def floats(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


Q, K, V = (floats(2, 16, h, 16, seed=i) for i, h in enumerate((4, 2, 2)))
HIDDEN, HEAD = floats(2, 8, 32), floats(40, 32)
WORDS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 8)), jnp.int32)
ROWS, EXPERTS, SIZES = floats(20, 32), floats(3, 16, 32), jnp.array([5, 0, 15])
CACHE, AT = (floats(2, 4, 4, 16), K, V), jnp.full((2, 4), 9)
CODES = jnp.ones((16, 32), jnp.int8)


def attend(*args, **options):
    return lambda: bare.flash_attention(*(args or (Q, K, V)), **options)


def decode(*args, at=AT, **options):
    return lambda: bare.decode_attention(*(args or CACHE), at, **options)


def entropy(hidden=HIDDEN, head=HEAD, words=WORDS, **options):
    return lambda: bare.linear_cross_entropy(hidden, head, words, **options)


def logps(hidden=HIDDEN, head=HEAD, words=WORDS, **options):
    return lambda: bare.token_logps(hidden, head, words, **options)


def grouped(x=ROWS, w=EXPERTS, sizes=SIZES, **options):
    return lambda: bare.grouped_matmul(x, w, sizes, **options)


def traced(f, **option):
    """`f(**option)` with the option's value traced."""
    [(name, value)] = option.items()
    return lambda: jax.jit(lambda value: f(**{name: value})())(value)


INTS = [x.astype(jnp.int32) for x in (Q, K, V)]
REFUSED = {
    "q without a batch": (attend(Q[0], K, V), r"attention: expected q \[B, T, H, D\]"),
    "a flat k": (attend(Q, K[0], V), r"attention: expected k \[B, S, K, D\]"),
    "lists": (attend([[1.0]], K, V), "got list"),
    "no key heads": (attend(Q, K[:, :, :0], V[:, :, :0]), "K dividing H"),
    "integers attend": (attend(*INTS), "expected q of a floating dtype; got int32"),
    "half a window": (attend(window=2.5), "at least 1 key; got 2.5"),
    "segments of floats": (attend(segment_ids=jnp.ones((2, 16))), "segment_ids of a integer"),
    "sinks of a list": (attend(sinks=[1.0] * 4), "expected sinks"),
    "a flat bias": (attend(bias=jnp.ones(16)), "expected bias"),
    "a mask for a bias": (attend(bias=jnp.ones((1, 1, 16, 16), bool)), "expected bias of a"),
    "a key for a seed": (attend(dropout=0.5, dropout_seed=jax.random.key(0)), "bits"),
    "an old key": (attend(dropout=0.5, dropout_seed=jax.random.PRNGKey(0)), "bits"),
    "half a seed": (attend(dropout=0.5, dropout_seed=1.5), "one integer"),
    "a traced scale": (traced(attend, scale=0.3), "attention: scale must be a Python number"),
    "a traced window": (traced(attend, window=3), "window must be a Python number"),
    "decode: integers": (decode(INTS[0][:, :4], K, V), "expected q of a floating"),
    "decode: flat k": (decode(CACHE[0], K[0], V[0]), r"expected k \[B, S, K, D\]"),
    "decode: an empty cache": (decode(CACHE[0], K[:, :0], V[:, :0]), "decode needs q"),
    "decode: sinks of key heads": (decode(sinks=jnp.ones(2)), r"expected sinks \(4,\)"),
    "decode: no window": (decode(window=0), "at least 1 key; got 0"),
    "decode: no cap": (decode(softcap=0.0), "softcap must be positive"),
    "decode: places between": (decode(at=AT * 1.0), "expected positions of a integer"),
    "decode: pages of one row": (decode(page_table=jnp.zeros((1, 1), int)), r"page_table \[2, n\]"),
    "decode: layers": (decode(*(CACHE[0], K[None], V[None]), layer=1), "one integer below 1"),
    "hidden without a batch": (entropy(HIDDEN[0]), r"expected hidden \[B, T, D\]"),
    "hidden integers": (entropy(WORDS[..., None]), "expected hidden of a floating"),
    "targets of floats": (entropy(words=WORDS * 1.0), "expected targets of a integer"),
    "a head of integers": (entropy(head=HEAD.astype(int)), "expected head of a floating"),
    "a head without words": (entropy(head=HEAD[:0]), r"expected a head \[V, 32\]"),
    "weights of a row": (entropy(weights=jnp.ones(8)), r"expected weights \(2, 8\)"),
    "smoothing of two": (entropy(label_smoothing=2.0), "label_smoothing from 0 to 1"),
    "no softcap": (entropy(softcap=0.0), "softcap must be positive"),
    "no temperature": (logps(temperature=0.0), "temperature must be positive"),
    "a traced temperature": (traced(logps, temperature=2.0), "temperature must be a Python"),
    "grouped: batches": (grouped(ROWS[None]), r"expected x \[M, in\]"),
    "grouped: one weight": (grouped(w=EXPERTS[0]), r"expected w \[E, out, in\]"),
    "grouped: no experts": (grouped(w=EXPERTS[:0], sizes=SIZES[:0]), "expected x"),
    "grouped: integers": (grouped(ROWS.astype(int)), "expected x of a floating"),
    "grouped: half rows": (grouped(sizes=SIZES * 1.0), "expected group_sizes of a integer"),
    "qgemm of floats": (lambda: bare.qgemm(ROWS, CODES), "expected a of a int8 dtype"),
    "qgemm of bytes": (lambda: bare.qgemm(CODES, CODES.astype(jnp.uint8)), "expected b of a int8"),
    "qgemm of a vector": (lambda: bare.qgemm(CODES, CODES[0]), r"expected b \[N, K\]"),
    "half a zero point": (lambda: bare.qgemm(CODES, CODES, b_zero=0.5), "expected b_zero of a"),
    "a norm's weight": (
        lambda: bare.quantized_layernorm(ROWS, jnp.ones(1)),
        r"quantized_layernorm: expected weight \[32\]",
    ),
    "a norm's bias": (
        lambda: bare.quantized_layernorm(ROWS, jnp.ones(32), jnp.ones((20, 32))),
        r"expected bias \[32\]",
    ),
    "no triple": (lambda: bare.dequantize(ROWS), "expected a Quantized or"),
    "no Quantized": (lambda: bare.quantized_matmul(ROWS, HEAD), "expected a Quantized weight"),
    "codes meet integers": (
        lambda: bare.quantized_matmul(WORDS @ jnp.ones((8, 64), int), quantize(floats(4, 64))),
        "expected x of a floating",
    ),
    "heads of nothing": (lambda: mp.FlashMHA(32, 0), "num_heads must be at least 1"),
    "no key heads in MHA": (lambda: mp.FlashMHA(32, 4, num_kv_heads=0), "num_kv_heads must"),
    "MHA's window": (lambda: mp.FlashMHA(32, 4, window=3, causal=False), "needs causal"),
    "MHA's dropout": (lambda: mp.FlashMHA(32, 4, dropout=1.5), "a probability below 1"),
    "MHA's stream": (
        lambda: mp.FlashMHA(32, 4, dropout=0.5, rngs=nnx.Rngs(params=0)),
        'dropout needs a stream "dropout"',
    ),
    "MHA's width": (
        lambda: inspect.unwrap(mp.FlashMHA.__call__)(mp.FlashMHA(32, 4), jnp.ones((2, 8, 16))),
        r"expected x \[B, T, 32\], got \[2, 8, 16\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(case):
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_matmul_does_not_cast_the_weight_to_integers():
    with pytest.raises(TypeError, match="expected a float x, got int32"):
        inspect.unwrap(type(kernels.matmul).__call__)(kernels.matmul, jnp.ones((2, 32), int), HEAD)


# Empty arrays.


@pytest.mark.parametrize("implementation", [None, "pallas", "xla"])
def test_attention_of_nothing(implementation):
    options = {"implementation": implementation, "return_lse": True}
    for rows, tokens in ((0, 16), (2, 0)):
        q, k, v = (x[:rows, :tokens] for x in (Q, K, V))
        out, lse = attend(q, k, v, **options)()
        assert out.shape == q.shape and lse.shape == q.shape[:3]
    f = jax.value_and_grad(lambda q: attend(q, K[:, :0], V[:, :0], **options)()[0].sum())
    value, gradient = f(Q)
    assert value == 0 and not np.asarray(gradient).any()
    assert np.isneginf(attend(Q, K[:, :0], V[:, :0], **options)()[1]).all()


@pytest.mark.parametrize("implementation", [None, "pallas", "xla"])
def test_rows_of_nothing(implementation):
    q, k, v = (x[:0] for x in CACHE)
    assert decode(q, k, v, at=AT[:0], implementation=implementation)().shape == (0, 4, 4, 16)
    for rows, tokens in ((0, 8), (2, 0)):
        part = HIDDEN[:rows, :tokens], HEAD, WORDS[:rows, :tokens]
        found = logps(*part, implementation=implementation)()
        assert [x.shape for x in found] == [(rows, tokens)] * 2
        assert entropy(*part, implementation=implementation)() == 0
    assert bare.qgemm(CODES[:0], CODES, implementation=implementation).shape == (0, 16)


@pytest.mark.parametrize("op", ["attention", "decode_attention", "qgemm"])
def test_nobody_is_said_to_serve_nothing(op, caplog):
    f = {
        "attention": attend(Q[:0], K[:0], V[:0], implementation="pallas"),
        "decode_attention": decode(*(x[:0] for x in CACHE), at=AT[:0], implementation="pallas"),
        "qgemm": lambda: bare.qgemm(CODES[:0], CODES, implementation="pallas"),
    }[op]
    choice.say.cache_clear()
    with caplog.at_level("INFO", "mud_puppy"):
        f()
    assert caplog.messages == [f"{op}: no kernel, an array is empty"]


def test_no_rows_for_the_quantized_kernels():
    """On a GPU too: what has no rows takes no tile."""
    w, x = quantize(floats(32, 64)), jnp.zeros((0, 64), jnp.bfloat16)
    with target.use(target.Target("cuda", "sm90")):
        assert jax.eval_shape(lambda: bare.quantized_matmul(x, w)).shape == (0, 32)
        f = jax.grad(lambda w: grouped(ROWS[:0].astype(w.dtype), w, 0 * SIZES)().sum())
        assert jax.eval_shape(f, EXPERTS.astype(jnp.bfloat16)).shape == EXPERTS.shape


# Groups, labels, seeds and chips beyond what there is.


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_groups_that_count_too_much(implementation):
    """Nothing is read past the rows, and small integers do not overflow."""

    def results(sizes, implementation):
        def f(x, w):
            return grouped(x, w, sizes, implementation=implementation)()

        y, pull = jax.vjp(f, many, EXPERTS)
        return y, *pull(jnp.cos(y))

    many = floats(300, 32)
    want = results(jnp.array([200, 100, 0]), "reference")
    for sizes in (jnp.array([200, 200, 50]), jnp.array([200, 100, 0], jnp.uint8)):
        for g, w in zip(results(sizes, implementation), want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
    other = results(jnp.array([199, 101, 0]), implementation)
    assert np.abs(other[0] - want[0]).max() > 1


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_labels_that_are_no_words(implementation):
    options = {"implementation": implementation}
    for wrong in (-1, 40, 1000):
        words = WORDS.at[0, 0].set(wrong)
        assert np.isnan(entropy(words=words, **options)())
        each = np.asarray(entropy(words=words, reduction="none", **options)())
        assert np.isnan(each[0, 0]) and np.isnan(each).sum() == 1
    found, spread = logps(words=WORDS.at[0, 0].set(-100).at[0, 1].set(40), **options)()
    want, wanted_spread = logps(**options)()
    assert found[0, 0] == 0 and np.isnan(found[0, 1])
    np.testing.assert_array_equal(found.ravel()[2:], want.ravel()[2:])
    np.testing.assert_allclose(spread, wanted_spread, rtol=1e-4, atol=1e-4)
    f = jax.grad(lambda h: logps(h, words=WORDS.at[0, 0].set(-100), **options)()[0].sum())
    gradient = np.asarray(f(HIDDEN))
    assert np.isfinite(gradient).all() and not gradient[0, 0].any() and gradient[0, 1].any()


def test_seeds_of_any_size():
    def drop(seed):
        return attend(dropout=0.5, dropout_seed=seed)()

    np.testing.assert_array_equal(drop(2**33 + 5), drop(jnp.uint32(5)))
    np.testing.assert_array_equal(drop(-1), drop(2**32 - 1))
    assert np.abs(drop(5) - drop(6)).max() > 0.1


def test_zero_points_do_not_overflow():
    zeros = jnp.zeros((16, 160), jnp.int8)
    f = bare.qgemm(zeros, zeros, a_zero=jnp.int8(100), b_zero=jnp.int8(-100), dtype=jnp.int32)
    assert (np.asarray(f) == -100 * 100 * 160).all()


@pytest.mark.parametrize("arch", ["gfx1030", "gfx906", "gfx1250", "sm75"])
def test_chips_without_an_entry(arch):
    with target.use(target.Target("rocm", arch)):
        assert tuned.tiles("quantized_matmul", "crossover")["rows"] > 0
    with target.use(target.Target("rocm", "r600")), pytest.raises(KeyError, match="r600"):
        tuned.tiles("quantized_matmul", "crossover")


# Numbers that are none.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_no_format_makes_a_number_of_what_is_none(format, bad):
    w = floats(4, 64)
    got = dequantize(quantize(w.at[1, 3].set(bad), format))
    assert not np.isfinite(got[1, 3])
    np.testing.assert_array_equal(got[2], dequantize(quantize(w, format))[2])


@pytest.mark.parametrize("low", [-2e30, -np.inf])
@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_a_bias_that_hides_a_row(implementation, low):
    """As masks are written: the row gives 0 and has no part in any gradient."""
    bias = floats(1, 4, 16, 16).at[:, 1, 9].set(low).at[..., 3].set(low)

    def f(q, k, v, bias):
        return attend(q, k, v, bias=bias, implementation=implementation, return_lse=True)()

    (out, lse), pull = jax.vjp(f, Q, K, V, bias)
    assert not np.asarray(out[:, 9, 1]).any() and np.isneginf(lse[:, 9, 1]).all()
    assert np.isfinite(out).all() and np.isfinite(lse[:, 8]).all()
    grads = pull((jnp.zeros_like(out).at[:, 9, 1].set(1.0), jnp.zeros_like(lse)))
    assert all(not np.asarray(g).any() for g in grads)
    grads = pull((jnp.ones_like(out), jnp.where(jnp.isfinite(lse), 1.0, 0.0)))
    assert all(np.isfinite(g).all() and np.asarray(g).any() for g in grads)
    assert not np.asarray(grads[1][:, 3]).any() and np.asarray(grads[1][:, 4]).any()


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_a_sink_that_counts_for_nothing(implementation):
    ids = {"segment_ids": jnp.ones((2, 16), int), "kv_segment_ids": jnp.full((2, 16), 2)}
    options = {"implementation": implementation, "return_lse": True}

    def f(q, sinks):
        out, lse = attend(q, K, V, sinks=sinks, **ids, **options)()
        return out.sum(), lse

    (value, lse), pull = jax.vjp(f, Q, jnp.full(4, -jnp.inf))
    grads = pull((jnp.ones(()), jnp.zeros_like(lse)))
    assert value == 0 and np.isneginf(lse).all()
    assert all(np.isfinite(g).all() for g in grads)
    out = attend(sinks=jnp.full(4, -jnp.inf), implementation=implementation)()
    np.testing.assert_allclose(out, attend(implementation="reference")(), atol=1e-5)


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_hidden_slots_and_rows_that_are_off_leave_gradients_alone(implementation):
    """A slot past the position may hold anything finite: its power would be infinite."""
    q, k, v = CACHE
    at = jnp.array([[2, 3, 4, 5], [-1, -1, 7, 8]])

    def grads(k, v):
        def loss(q, k, v):
            options = {"at": at, "implementation": implementation, "return_lse": True}
            out, lse = decode(q, k, v, **options)()
            return (out * jnp.cos(out)).sum() + jnp.where(at[..., None] < 0, 0, lse).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    want = grads(k, v)
    for g, w in zip(grads(k.at[:, 9:].mul(1e3), v.at[:, 9:].mul(1e3)), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
    assert not np.asarray(want[0][1, :2]).any() and np.asarray(want[0][1, 2]).any()
    assert np.abs(np.asarray(grads(k.at[:, 2].mul(2), v)[0]) - want[0]).max() > 1e-3


# Where a kernel cannot go.


@pytest.mark.parametrize("op", ["attention", "cross-entropy", "grouped", "quantized"])
def test_a_second_derivative_says_so(op):
    half, codes = ROWS.astype(jnp.bfloat16), quantize(floats(32, 32), "int8")
    f, x = {
        "attention": (lambda q: attend(q, K, V, implementation="pallas")(), Q),
        "cross-entropy": (lambda h: entropy(h, implementation="pallas")(), HIDDEN),
        "grouped": (lambda x: grouped(x, implementation="pallas")(), ROWS),
        "quantized": (lambda x: bare.quantized_matmul(x, codes, "pallas"), half),
    }[op]

    def total(f):
        return lambda x: (f(x).astype(jnp.float32) ** 2).sum()

    with pytest.raises(ValueError, match="no second derivative: pass implementation"):
        jax.grad(total(jax.grad(total(f))))(x)


def test_second_derivatives_of_xla_are_those_of_the_definition():
    def twice(implementation):
        def f(q):
            return (attend(q, K, V, implementation=implementation)() ** 2).sum()

        return jax.grad(lambda q: (jax.grad(f)(q) ** 2).sum())(Q)

    want = twice("reference")
    np.testing.assert_allclose(twice("xla"), want, atol=1e-4 * np.abs(want).max())


def test_a_checked_shard_map_gets_xla():
    devices = min(2, len(jax.devices()))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def over(implementation, check):
        def f(*args):
            return attend(*args, implementation=implementation)()

        return jax.jit(
            jax.shard_map(f, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=check)
        )(Q, K, V)

    want = attend(implementation="reference")()
    for served in (over(None, True), over("xla", True), over("pallas", False)):
        np.testing.assert_allclose(served, want, atol=1e-5)
    with pytest.raises(ValueError, match="pass it check_vma=False"):
        over("pallas", True)


@pytest.mark.parametrize("op", ["cross-entropy", "grouped", "quantized", "keys"])
def test_a_checked_shard_map_differentiates_what_devices_share(op):
    """Loops start as their results vary, and gradients of what is common are summed. On the host's
    devices, wherever the tests run: two are needed."""
    with target.use(target.Target("cpu", "cpu")), jax.default_device(jax.devices("cpu")[0]):
        check_shared_gradients(op)


def check_shared_gradients(op):
    axes, devices = (jax.sharding.AxisType.Auto,), jax.devices("cpu")[:2]
    mesh = jax.make_mesh((2,), ("data",), axis_types=axes, devices=devices)
    split, common = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    codes = quantize(floats(16, 64))

    def keys(q, k):
        # Blocks of 16: more than one, so that there is a loop.
        return attention_xla.attention(q, k, k, options=Options(True, None, 0.25), max_block=16)[0]

    f, args, specs = {
        "cross-entropy": (
            lambda h, head: entropy(h, head, WORDS[:1], label_smoothing=0.1, reduction="none")(),
            (HIDDEN, HEAD), (split, common),
        ),
        "grouped": (lambda x, w: grouped(x, w, SIZES // 2)(), (ROWS, EXPERTS), (split, common)),
        "quantized": (
            lambda w, x: bare.quantized_matmul(x, w).T, (codes, floats(6, 64)), (split, common)
        ),
        "keys": (keys, (floats(2, 40, 4, 16), floats(1, 40, 2, 16)), (split, common)),
    }[op]  # fmt: skip

    def grads(check):
        g = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=split, check_vma=check)
        first = 1 if op == "quantized" else 0
        grad = jax.jit(jax.grad(lambda *args: jnp.sin(g(*args)).sum(), tuple(range(first, 2))))
        return grad(*jax.device_put(args, jax.sharding.NamedSharding(mesh, common)))

    for got, want in zip(grads(True), grads(False), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert np.abs(got).max() > 1e-3


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
def test_ranks_are_not_promoted(implementation):
    """What a user of jax_numpy_rank_promotion calls."""
    options = {"implementation": implementation}
    codes, ids = quantize(floats(32, 64), double=True), {"segment_ids": jnp.ones((2, 16), int)}
    bias = floats(1, 4, 16, 16)
    calls = [
        (lambda q, s, b: attend(q, K, V, sinks=s, bias=b, window=5, dropout=0.1, dropout_seed=3,
                                **ids, **options)(), (Q, floats(4), bias)),
        (lambda q, s: decode(q, K, V, sinks=s, window=5, **options)(), (CACHE[0], floats(4))),
        (lambda h, w: entropy(h, w, label_smoothing=0.1, **options)(), (HIDDEN, HEAD)),
        (lambda h: logps(h, **options)(), (HIDDEN,)),
        (lambda x, w: grouped(x, w, **options)(), (ROWS, EXPERTS)),
        (lambda x: bare.quantized_matmul(x, codes, implementation),
         (floats(3, 64, dtype=jnp.bfloat16),)),
        (lambda x, b: bare.fbgemm(x, EXPERTS[0], b), (ROWS, floats(16))),
    ]  # fmt: skip

    def results():
        for f, args in calls:
            out, pull = jax.vjp(f, *args)
            pull(jax.tree.map(jnp.ones_like, out))
        bare.quantized_layernorm(ROWS, ROWS[0], ROWS[1])
        bare.quantized_rmsnorm(ROWS, ROWS[0])

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(results)


def test_bytes_beyond_32_bits_are_not_addressed():
    """JAX's lowering would count them with a sign."""

    def reason(layers, dtype):
        cache = jax.ShapeDtypeStruct((layers, 8, 8192, 8, 128), dtype)
        return decode_pallas.declines(Q, decode_pallas.Cache(cache, cache, layer=0))

    assert "elements of one byte" in reason(40, jnp.int8)
    assert reason(32, jnp.int8) is None and reason(80, jnp.int8) is None
    assert reason(40, jnp.bfloat16) is None


def test_64_bits_do_not_reach_the_kernels():
    """What a user of JAX_ENABLE_X64 calls: Python's numbers in a kernel would be 64 bits wide."""
    codes, half = quantize(floats(32, 64), "int8"), floats(3, 64, dtype=jnp.bfloat16)
    options = {"implementation": "pallas"}

    def attended(q):
        ids = {"segment_ids": jnp.asarray(np.arange(32).reshape(2, 16) // 5)}
        return attend(q, K, V, **ids, dropout=0.3, dropout_seed=7, **options)()

    def results():
        def of_gradients(f, x):
            return jax.value_and_grad(lambda x: f(x).astype(jnp.float32).sum())(x)

        words = jnp.asarray(np.asarray(WORDS, np.int64))
        return jax.tree.leaves([
            of_gradients(attended, Q),
            of_gradients(lambda h: entropy(h, words=words, **options)(), HIDDEN),
            of_gradients(lambda x: grouped(x, sizes=jnp.array([5, 0, 15]), **options)(), ROWS),
            of_gradients(lambda x: bare.quantized_matmul(x, codes, "pallas"), half),
            decode(at=jnp.full((2, 4), 9), **options)(),
            bare.qgemm(CODES, CODES, 0.5, 2.0, 3, 4, **options),
        ])  # fmt: skip

    want = jax.eval_shape(results), attended(Q)
    with jax.enable_x64(True):
        got = jax.eval_shape(results), attended(Q)
    assert got[0] == want[0]
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
