"""grouped_matmul against its definition: drawn groups, gradients, quantized weights."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from mud_puppy.kernels import grouped_matmul as product
from mud_puppy.kernels import tuned
from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import dequantize
from mud_puppy.kernels.grouped_matmul import pallas, xla
from tests.kernels import contract

pytestmark = pytest.mark.usefixtures("exact_products")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
call = inspect.unwrap(product)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    _tiles(monkeypatch, False)


def _tiles(patch, transposed):
    tile = {"rows": 32, "columns": 32, "depth": 32, "num_warps": 4, "num_stages": 1}
    patch.setattr(tuned, "tiles", lambda op, key: tile | {"transposed": transposed})
    patch.setattr(xla, "MAX_ROWS", 32)


def inputs(sizes, N, K, dtype, rest=0):
    """x with the groups' rows and `rest` after them, w."""
    r = np.random.default_rng(0)
    x = jnp.asarray(r.normal(size=(sum(sizes) + rest, K)), dtype)
    return x, jnp.asarray(r.normal(size=(len(sizes), N, K)), dtype)


def worst(name, sizes, N, K, dtype, rest=0, given_sizes=None):
    x, w = inputs(sizes, N, K, dtype, rest)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(len(x), N)), dtype)

    def f(name, sizes):
        return lambda x, w: call(x, w, jnp.asarray(sizes, jnp.int32), implementation=name)

    got = contract.compiled(f(name, given_sizes or sizes), (x, w), g)
    want = contract.in_float64(f("reference", sizes), (x, w), g)
    return max(contract.differences(got, want)) / contract.tolerance(dtype, N + K + len(x))


@pytest.mark.parametrize("part", contract.PARTS)
def test_drawn(part):
    @seed(part)
    @settings(max_examples=6, deadline=None, database=None)
    @given(
        name=st.sampled_from(["xla", "pallas"]),
        transposed=st.booleans(),
        sizes=st.lists(st.sampled_from([0, 0, 1, 5, 16, 31, 40, 64]), min_size=1, max_size=5),
        rest=st.sampled_from([0, 0, 9]),
        N=st.sampled_from([16, 48, 80]),
        K=st.sampled_from([16, 32, 112]),
        dtype=st.sampled_from(sorted(DTYPES)),
    )
    def check(name, transposed, sizes, rest, N, K, dtype):
        sizes = sizes if sum(sizes) else [*sizes, 3]
        with pytest.MonkeyPatch.context() as patch:
            _tiles(patch, transposed)
            assert worst(name, sizes, N, K, DTYPES[dtype], rest) < 1

    check()


@pytest.mark.parametrize("name", ["xla", "pallas"])
def test_a_row_of_another_expert_is_seen(name):
    assert worst(name, [20, 40, 4], 48, 32, jnp.bfloat16, given_sizes=[21, 39, 4]) > 2


def test_an_expert_without_rows_has_no_gradient():
    x, w = inputs([20, 0, 4], 16, 32, jnp.float32)
    for name in ("xla", "pallas"):
        f = jax.grad(
            lambda w, name=name: call(x, w, jnp.array([20, 0, 4]), implementation=name).sum()
        )
        gradient = np.asarray(f(w))
        assert not gradient[1].any() and gradient[0].any() and gradient[2].any()


@pytest.mark.parametrize("name", ["xla", "pallas"])
@pytest.mark.parametrize("format", ["nf4", "int8", "mxfp4"])
def test_a_quantized_weight_is_that_which_it_decodes_to(name, format, monkeypatch):
    monkeypatch.setattr(pallas, "DECODED_BYTES", 2 * 2 * 48 * 64)  # two of four experts
    x, w = inputs([20, 0, 33, 5], 48, 64, jnp.bfloat16, rest=3)
    codes, sizes = quantize(w, format), jnp.array([20, 0, 33, 5])
    g = jnp.ones((61, 48), jnp.bfloat16)

    def run(w):
        return contract.compiled(lambda x: call(x, w, sizes, implementation=name), (x,), g)

    ours, theirs = run(codes), run(dequantize(codes))
    assert max(contract.differences(ours, theirs)) < contract.tolerance(jnp.bfloat16, 64)
    assert max(contract.differences(ours, run(w))) > 1e-3


@pytest.mark.parametrize("name", ["xla", "pallas"])
def test_few_rows_decode_their_experts_alone(name, monkeypatch):
    """Fewer rows than experts, some of which have several, as when a model writes."""
    sizes = [0, 2, 0, 0, 1, 0, 1, 0, 0]
    x, w = inputs(sizes, 48, 64, jnp.bfloat16, rest=1)
    codes = jax.lax.map(lambda w: quantize(w, "nf4", double=True), w)
    g = jnp.ones((5, 48), jnp.bfloat16)
    seen = []
    decode = pallas.dequantize
    monkeypatch.setattr(
        pallas, "dequantize", lambda w, dtype: seen.append(w.shape) or decode(w, dtype)
    )

    def run(w):
        f = lambda x: call(x, w, jnp.asarray(sizes), implementation=name)  # noqa: E731
        return contract.compiled(f, (x,), g)

    ours, theirs = run(codes), run(dequantize(codes))
    assert max(contract.differences(ours, theirs)) < contract.tolerance(jnp.bfloat16, 64)
    assert all(shape == (5, 48, 64) for shape in seen) and bool(seen) == (name == "pallas")


def test_two_runs_are_bitwise_equal():
    x, w = inputs([20, 40, 4], 48, 32, jnp.float32)
    f = jax.jit(
        jax.grad(lambda w: (call(x, w, jnp.array([20, 40, 4]), implementation="pallas") ** 2).sum())
    )
    np.testing.assert_array_equal(f(w), f(w))


def test_refuses_what_it_cannot_do():
    x, w = inputs([20, 4], 24, 32, jnp.float32)
    with pytest.raises(ValueError, match=r"expected x \[M, in\]"):
        call(x[:, 1:], w, jnp.array([20, 4]))
    with pytest.raises(ValueError, match="no multiple of 16"):
        call(x, w, jnp.array([20, 4]), implementation="pallas")
    with pytest.raises(ValueError, match="none of"):
        call(x, w, jnp.array([20, 4]), implementation="cublas")
