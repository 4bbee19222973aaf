"""GPTQ against the paper's own loop in float64, and the properties that make it worth its time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import dequantize, matmul
from mud_puppy.kernels.quantized_matmul.plan import plan
from mud_puppy.weights.gptq import gptq, round_to_nearest, to_quantized

GRIDS = [(2, True), (3, True), (4, True), (8, True), (2, False), (3, False), (4, False), (8, False)]


def case(seed=0, out=48, n=128, tokens=512):
    """A weight, and the Hessian of inputs that are correlated and of unlike size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(n, n)) * (0.85 ** np.abs(np.subtract.outer(np.arange(n), np.arange(n))))
    x = rng.normal(size=(tokens, n)) @ mix * np.exp(rng.normal(size=n))
    w = rng.normal(size=(out, n)) * 0.05
    return jnp.asarray(w, jnp.float32), jnp.asarray(2 * x.T @ x, jnp.float32)


def grid_of(x, bits, symmetric):
    """(scale, zero) of each row of x [out, group], float64."""
    top = 2**bits - 1
    if symmetric:
        scale, zero = 2 * np.abs(x).max(1) / top, np.full(len(x), 2.0 ** (bits - 1))
        return np.float64(np.float16(scale)), zero
    high = np.maximum(x.max(1), 0)
    low = np.minimum(x.min(1), -high / (top - 1))
    scale = np.float64(np.float16((high - low) / top))
    return scale, np.clip(np.round(-low / scale), 1, top)


def paper(w, h, bits, group, symmetric, act_order, damp=0.01, update=True):
    """Algorithm 1 of arXiv:2210.17323 column by column, with its inverse and Cholesky of it."""
    w, h = np.array(w, np.float64), np.array(h, np.float64)
    n = w.shape[1]
    h[np.diag_indices(n)] += damp * np.diag(h).mean()
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(n)
    factor = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    static = [grid_of(w[:, g : g + group], bits, symmetric) for g in range(0, n, group)]
    scales, zeros = list(static), None
    codes = np.zeros(w.shape, int)
    w = w[:, order]
    for i, column in enumerate(order):
        g = column // group
        if not act_order and i % group == 0:
            scales[g] = grid_of(w[:, i : i + group], bits, symmetric)
        scale, zero = scales[g]
        codes[:, column] = np.clip(np.round(w[:, i] / scale) + zero, 0, 2**bits - 1)
        error = (w[:, i] - (codes[:, column] - zero) * scale) / factor[i, i]
        if update:
            w[:, i:] -= np.outer(error, factor[i, i:])
    scales, zeros = (np.stack([s[k] for s in scales], 1) for k in (0, 1))
    return codes, scales, zeros


def values(codes, scales, zeros, bits):
    zeros = np.full(np.shape(scales), 2 ** (bits - 1)) if zeros is None else zeros
    group = codes.shape[1] // scales.shape[1]
    wide = (np.repeat(np.asarray(x, np.float64), group, 1) for x in (zeros, scales))
    return (np.asarray(codes, np.float64) - next(wide)) * next(wide)


def loss(found, w, h, bits):
    """tr(dW H dW^T), the squared error of the layer's outputs."""
    d = values(*found, bits) - np.asarray(w, np.float64)
    return float(np.einsum("oi,ij,oj->", d, np.asarray(h, np.float64), d))


@pytest.mark.parametrize(
    ("bits", "symmetric", "act_order"),
    [(2, False, False), (3, True, True), (4, True, False), (4, False, True), (8, False, False)],
)
def test_codes_are_those_of_the_paper(bits, symmetric, act_order):
    w, h = case(bits)
    got = gptq(w, h, bits=bits, group=32, symmetric=symmetric, act_order=act_order)
    want = paper(w, h, bits, 32, symmetric, act_order)
    # float32 against float64: a weight on the edge of two codes may fall to the other side.
    assert (np.asarray(got[0]) == want[0]).mean() > (0.98 if bits == 8 else 0.995)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-3)
    assert (got[2] is None) == symmetric
    assert loss(got, w, h, bits) == pytest.approx(loss(want, w, h, bits), rel=2e-3)


def test_the_comparison_fails_without_the_update():
    w, h = case()
    got = gptq(w, h, bits=4, group=32)
    wrong = paper(w, h, 4, 32, True, False, update=False)
    assert (np.asarray(got[0]) == wrong[0]).mean() < 0.95
    assert (np.asarray(round_to_nearest(w, bits=4, group=32)[0]) == wrong[0]).mean() > 0.999
    assert loss(wrong, w, h, 4) > 1.2 * loss(got, w, h, 4)


@pytest.mark.parametrize("group", ["row", 192, 48])
def test_blocks_and_groups_of_any_size(group):
    """192 is more than a block and no multiple of it, 48 is not a power of two."""
    w, h = case(n=192)
    size = 192 if group == "row" else group
    got = gptq(w, h, group=group)
    want = paper(w, h, 4, size, True, False)
    assert got[1].shape == (48, 192 // size)
    assert (np.asarray(got[0]) == want[0]).mean() > 0.995


@pytest.mark.parametrize(
    ("bits", "symmetric", "clip"), [(2, False, True), (3, True, False), (4, False, False)]
)
def test_outputs_err_less_than_by_rounding(bits, symmetric, clip):
    options = {"bits": bits, "group": 32, "symmetric": symmetric, "clip": clip}
    for seed in range(5):
        w, h = case(seed)
        rounded = loss(round_to_nearest(w, **options), w, h, bits)
        assert loss(gptq(w, h, **options), w, h, bits) < 0.9 * rounded


def test_act_order_helps_on_average():
    ratios = []
    for seed in range(8):
        w, h = case(seed)
        ordered, plain = (
            loss(gptq(w, h, bits=3, group=32, act_order=order), w, h, 3) for order in (True, False)
        )
        ratios.append(ordered / plain)
    assert np.exp(np.log(ratios).mean()) < 1


def test_clipping_lessens_the_error_of_the_weights():
    w = case()[0]
    plain, clipped = (round_to_nearest(w, bits=3, group=32, clip=c) for c in (False, True))
    eye = np.eye(w.shape[1])
    assert loss(clipped, w, eye, 3) < 0.95 * loss(plain, w, eye, 3)


def test_inputs_that_were_never_seen():
    w, h = case()
    h = h.at[5].set(0).at[:, 5].set(0)
    got = gptq(w, h, group=32, symmetric=False)
    assert (values(*got, 4)[:, 5] == 0).all() and np.isfinite(got[1]).all()
    # Damping is a share of what was seen, whatever its unit.
    same = gptq(w, h * 2.0**-30, group=32, symmetric=False)
    assert np.array_equal(same[0], got[0]) and np.array_equal(same[1], got[1])
    zeros = jnp.zeros_like(w)
    assert (values(*gptq(zeros, h, group=32, symmetric=False), 4) == 0).all()


def test_a_hessian_that_is_not_one_gives_no_scales():
    w, h = case()
    for bad in (h.at[3, 3].set(jnp.nan), h.at[3, 3].set(-1.0), -h):
        for act_order in (False, True):
            assert np.isnan(gptq(w, bad, group=32, act_order=act_order)[1]).all()


def test_scales_are_float16_numbers_and_zeros_never_zero():
    w, h = case()
    w = jnp.abs(w)  # no zero point of its own would be above 0
    for found in (gptq(w, h, symmetric=False), round_to_nearest(w, symmetric=False)):
        np.testing.assert_array_equal(found[1], np.float16(found[1]).astype(np.float32))
        assert found[2].dtype == jnp.uint8 and int(found[2].min()) >= 1
    # All of the range is used: the largest weight is not cut.
    assert np.abs(values(*found, 4) - w).max() < 0.51 * float(found[1].max())


def test_rows_do_not_meet():
    w, h = case(out=72)
    whole = gptq(w, h)
    parts = [gptq(part, h) for part in (w[:24], w[24:48], w[48:])]
    for i in (0, 1):
        np.testing.assert_array_equal(whole[i], jnp.concatenate([p[i] for p in parts]))


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_the_leaf_decodes_to_the_grids_values(bits, symmetric):
    w, h = case()
    found = gptq(w, h, bits=bits, group=32, symmetric=symmetric)
    leaf = to_quantized(*found, bits, jnp.float32)
    assert leaf.shape == w.shape and leaf.format == ("int8" if bits == 8 else "int4")
    want = values(*found, bits)
    np.testing.assert_allclose(dequantize(leaf, jnp.float32), want, rtol=1e-6, atol=1e-9)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 128)), jnp.float32)
    np.testing.assert_allclose(matmul(x, leaf), np.asarray(x) @ want.T, rtol=1e-4, atol=1e-4)
    stacked = to_quantized(*(None if t is None else t[None] for t in found), bits, jnp.bfloat16)
    assert stacked.shape == (1, 48, 128) and stacked.dtype == jnp.bfloat16


def test_the_fused_kernel_declines_zero_points_of_eight_bits():
    x = jnp.ones((4, 128), jnp.bfloat16)
    for symmetric in (True, False):
        found = round_to_nearest(case()[0], bits=8, symmetric=symmetric)
        served = plan(x, to_quantized(*found, 8, jnp.bfloat16))
        assert (served == "int8 with zero points") == (not symmetric)


def test_bad_calls_say_what_would_do():
    w, h = case()
    with pytest.raises(ValueError, match=r"rows of 128 .* groups that fit: \[16, 32, 64, 128\]"):
        gptq(w, h, group=48)
    with pytest.raises(ValueError, match="2, 3, 4, 8 bits, not 5"):
        round_to_nearest(w, bits=5)
    with pytest.raises(ValueError, match=r"expected a Hessian"):
        gptq(w, h[:64, :64])
    with pytest.raises(ValueError, match="group=0"):
        gptq(w, h, group=0)


def test_float32_stays_float32_in_the_compiled_products():
    """TF32 would not be seen on a CPU: every product asks for the highest precision."""
    w, h = case()
    text = jax.jit(lambda w, h: gptq(w, h)[0]).lower(w, h).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert dots and all("HIGHEST" in line for line in dots)
