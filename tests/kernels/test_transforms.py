"""Where a kernel cannot go: second derivatives, a checked shard_map, ranks, 64 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import target
from mud_puppy.kernels.attention import decode_pallas
from mud_puppy.kernels.attention import xla as attention_xla
from mud_puppy.kernels.attention.plan import Options
from mud_puppy.kernels.encode import quantize
from tests.kernels.calls import (
    CACHE,
    CODES,
    EXPERTS,
    HEAD,
    HIDDEN,
    ROWS,
    SIZES,
    WORDS,
    K,
    Q,
    V,
    attend,
    bare,
    decode,
    entropy,
    floats,
    grouped,
    logps,
)


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
