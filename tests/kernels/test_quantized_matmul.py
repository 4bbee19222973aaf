"""quantized_matmul against float64: every format, 40 drawn shapes, its gradient, its places."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.kernels import formats, matmul, target, token_logps
from mud_puppy.kernels.formats import Quantized, dequantize
from mud_puppy.kernels.quantized_matmul import plans, quantized_matmul
from tests.kernels.contract import compiled, differences
from tests.kernels.quantized_products import (
    BF16,
    CASES,
    F16,
    F32,
    check,
    close,
    encoded,
    inputs,
    weight,
)


@pytest.mark.parametrize("case", CASES)
def test_every_format_in_the_kernel(case):
    check(weight(32, 256, **CASES[case]), 3, BF16, "pallas")


@pytest.mark.parametrize("case", ["nf4", "nf4 double", "int4", "int4 of 32", "mxfp4"])
def test_one_row_on_the_vector_units(case):
    w = weight(32, 512, **CASES[case])
    for dtype in (BF16, F16):
        x, _ = inputs(1, w, dtype)
        plan = plans.plan(x, w)
        # An H100 has a better kernel for most of them.
        served = ("fragment", "vector") if target.current().platform == "cuda" else ("vector",)
        assert not isinstance(plan, str) and plan.kernel in served
        check(w, 1, dtype, "pallas")


@pytest.mark.parametrize("case", ["nf4", "int4 zero points", "int8", "fp8_e4m3fn"])
def test_float16(case):
    check(weight(32, 256, **CASES[case]), 17, F16, "pallas")


@pytest.mark.parametrize("case", CASES)
def test_every_format_through_xla(case):
    check(weight(24, 256, **CASES[case]), 5, F32, "xla")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.data())
def test_drawn_shapes(data):
    draw = data.draw
    format = draw(st.sampled_from(["nf4", "int4", "int8", "fp8_e4m3fn", "mxfp4"]))
    out, size = 16 * draw(st.integers(1, 5)), 64 * draw(st.integers(1, 5))
    rows, seed = draw(st.integers(1, 40)), draw(st.integers(0, 1000))
    implementation = draw(st.sampled_from(["pallas", "pallas", "xla", "reference"]))
    # Any codes but float8's NaN, for nothing needs to be encoded here.
    rng = np.random.default_rng(seed)
    packed = format in formats.PACKED
    codes = rng.integers(0, 256, (out, size // 2 if packed else size)).astype(np.uint8)
    codes = codes.view(np.int8) if format == "int8" else codes & (255 if packed else 0xBF)
    groups = size // formats.GROUPS[format] if packed else 1
    scales = rng.uniform(0.1, 1, (out, groups)).astype(np.float32)
    if format == "mxfp4":
        scales = rng.integers(120, 130, (out, groups)).astype(np.uint8)
    w = Quantized(jnp.asarray(codes), jnp.asarray(scales), format=format)
    check(w, rows, BF16, implementation, seed)


def test_wrong_codes_are_seen():
    """The mutation partner: nibbles in the other order, the scale of the next group."""
    w = weight(32, 256, "nf4")
    x, g = inputs(3, w, BF16)
    _, want, bound = check(w, 3, BF16, "pallas")
    swapped = Quantized(formats.swap_nibbles(w.codes), w.scales)
    shifted = Quantized(w.codes, jnp.roll(w.scales, 1, axis=1))
    for wrong in (swapped, shifted):
        got = compiled(lambda x, w=wrong: quantized_matmul(x, w, "pallas"), (x,), g)
        assert max(differences(got, want)) > 3 * bound


def test_leading_axes_of_x():
    w = weight(32, 128, "nf4")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 128)), BF16)
    for implementation in ("pallas", "xla"):
        y = quantized_matmul(x, w, implementation)
        assert y.shape == (2, 3, 32) and y.dtype == BF16
        close(y[1], quantized_matmul(x[1], w, implementation))


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_stacked_layers(implementation):
    """A scan strips the layer axis; vmap maps over it."""
    w = encoded(jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 128)), F32), "nf4")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 128)), BF16)
    product = functools.partial(quantized_matmul, implementation=implementation)
    _, scanned = jax.lax.scan(lambda c, xw: (c, product(*xw)), 0, (x, w))
    mapped = jax.vmap(product)(x, w)
    for i in range(3):
        alone = product(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], w))
        close(scanned[i], alone)
        close(mapped[i], alone)


# The gradient.


def test_only_codes_are_kept_for_the_backward_pass():
    w = weight(48, 128, "nf4", double=True)
    x, g = inputs(5, w, BF16)
    _, pull = jax.vjp(lambda x: quantized_matmul(x, w), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size")]
    assert kept and max(leaf.nbytes for leaf in kept) <= w.codes.nbytes
    naive = jax.vjp(lambda x: x @ dequantize(w, BF16).T, x)[1]
    assert max(leaf.nbytes for leaf in jax.tree.leaves(naive)) >= 4 * w.codes.nbytes


def test_codes_and_scales_get_no_gradient():
    w = weight(32, 128, "int4", zero_points=True)
    x, _ = inputs(3, w, F32)
    loss = jax.grad(lambda w: quantized_matmul(x, w).sum(), allow_int=True)
    grads = loss(w)
    assert grads.codes.dtype == jax.dtypes.float0 and grads.zeros.dtype == jax.dtypes.float0
    assert not np.any(grads.scales)


# Who serves.


def pallas_calls(f, *args) -> int:
    return str(jax.make_jaxpr(f)(*args)).count("pallas_call")


def test_the_cpu_decodes_first():
    w = weight(32, 128, "nf4")
    with target.use(target.Target("cpu", "cpu")):
        assert pallas_calls(lambda x: quantized_matmul(x, w), inputs(1, w, BF16)[0]) == 0


@pytest.mark.parametrize("name", ["cuda sm90", "rocm gfx1100"])
def test_few_rows_are_fused_and_many_decoded_first(name):
    w = weight(64, 256, "nf4")
    with target.use(target.Target(*name.split())):
        limit = plans.crossover()
        for rows, fused in ((1, 1), (limit, 1), (limit + 1, 0)):
            x = inputs(rows, w, BF16)[0]
            assert pallas_calls(lambda x: quantized_matmul(x, w), x) == fused
        # float32 has no tile: XLA serves.
        assert pallas_calls(lambda x: quantized_matmul(x, w), inputs(1, w, F32)[0]) == 0


def test_a_mesh_leaves_the_product_to_xla():
    w = weight(64, 256, "nf4")
    mesh = jax.sharding.AbstractMesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), target.use(target.Target("cuda", "sm90")):
        assert pallas_calls(lambda x: quantized_matmul(x, w), inputs(1, w, BF16)[0]) == 0


@pytest.mark.parametrize(
    "shape, options, dtype, words",
    [
        ((32, 128), {"format": "nf4"}, F32, "float32"),
        ((24, 128), {"format": "nf4"}, BF16, "24 rows"),
        ((32, 192), {"format": "int4", "group": 96}, BF16, "no tile of 16 words"),
        ((32, 96), {"format": "mxfp4"}, BF16, "no tile of 16 words"),
        ((32, 64), {"format": "fp8_e5m2fnuz"}, F16, "float16 does not hold"),
    ],
)
def test_a_forced_kernel_that_cannot_serve_says_why(shape, options, dtype, words):
    w = weight(*shape, **options)
    with pytest.raises(ValueError, match=words):
        quantized_matmul(inputs(2, w, dtype)[0], w, "pallas")
    check(w, 2, dtype, "xla")


def test_refusals():
    w = weight(32, 128, "nf4")
    with pytest.raises(ValueError, match="implementation 'cuda' is none of"):
        quantized_matmul(jnp.ones((2, 128)), w, "cuda")
    with pytest.raises(ValueError, match=r"expected a weight \[out, 64\]"):
        quantized_matmul(jnp.ones((2, 64)), w)
    stacked = jax.tree.map(lambda leaf: leaf[None], w)
    with pytest.raises(ValueError, match=r"\(1, 32, 128\)"):
        quantized_matmul(jnp.ones((2, 128)), stacked)


# Whatever takes a weight takes this one.


def test_matmul_knows_it():
    w = weight(32, 128, "nf4")
    x = inputs(3, w, BF16)[0]
    close(matmul(x, w), quantized_matmul(x, w))


def test_a_quantized_head():
    """token_logps of the codes is that of the decoded head, and so is its gradient."""
    w = weight(96, 64, "int8")
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 5, 64)), F32)
    targets = jnp.asarray(rng.integers(0, 96, (2, 5)), jnp.int32)

    def loss(head, hidden):
        logps, entropy = token_logps(hidden, head, targets)
        return (logps + 0.1 * entropy).sum()

    with jax.default_matmul_precision("highest"):
        got, want = (
            jax.jit(jax.value_and_grad(functools.partial(loss, head)))(hidden)
            for head in (w, dequantize(w, F32))
        )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)


# One layer of a stack, read where it lies.


@pytest.mark.parametrize("implementation", ["pallas", "xla", "reference"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"format": "nf4"},
        {"format": "nf4", "double": True},
        {"format": "int4", "zero_points": True, "group": 32},
        {"format": "int8"},
        {"format": "fp8", "group": "tensor"},
    ],
    ids=lambda o: " ".join(map(str, o.values())),
)
def test_layer_of_a_stack(options, rows, implementation):
    layers = [weight(32, 256, seed=i, **options) for i in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    x = inputs(rows, layers[0], BF16)[0]

    @jax.jit
    def run(x, stack, i):
        return quantized_matmul(x, replace(stack, layer=i), implementation)

    got = run(x, stack, jnp.int32(2))
    np.testing.assert_array_equal(got, quantized_matmul(x, layers[2], implementation))
    # The mutation: another layer's codes, or another layer's scales alone.
    assert float(jnp.abs(got - run(x, stack, jnp.int32(1))).max()) > 1
    mixed = replace(stack, scales=jnp.roll(stack.scales, 1, 0))
    assert options["format"] == "fp8" or not np.array_equal(got, run(x, mixed, jnp.int32(2)))
    np.testing.assert_array_equal(
        dequantize(replace(stack, layer=jnp.int32(2))), dequantize(layers[2])
    )
