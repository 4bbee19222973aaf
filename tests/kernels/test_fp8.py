"""float8 products: rounding bounds, gradients, saturation, and that the products are float8's."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels.fp8 import (
    FNUZ,
    OCP,
    cast,
    float8,
    fp8_codes_matmul,
    fp8_matmul,
    scale_of,
)
from mud_puppy.kernels.target import Target

EMULATED = replace(OCP, emulated=True)
E4, E5 = OCP.forward, OCP.backward


def normal(seed: int, *shape: int, scale: float = 1.0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("platform", "arch", "types"),
    [
        ("cuda", "sm90", OCP),
        ("cuda", "sm89", OCP),
        ("cuda", "sm100a", OCP),
        ("cuda", "sm80", None),
        ("rocm", "gfx1201", OCP),
        ("rocm", "gfx950", OCP),
        ("rocm", "gfx942", FNUZ),
        ("rocm", "gfx1100", None),
        ("rocm", "gfx90a", None),
        ("cpu", "cpu", None),
    ],
)
def test_which_chip_has_which(platform, arch, types):
    assert float8(Target(platform, arch)) == types


@pytest.mark.parametrize("dtype", [E4, E5, FNUZ.forward, FNUZ.backward])
def test_scales_are_the_least_power_of_two_that_fits(dtype):
    largest = float(jnp.finfo(dtype).max)
    for amax in (1e-30, 0.3, 1.0, largest, largest * 1.001, 3e38):
        s = float(scale_of(jnp.array([-amax, amax / 3], jnp.float32), dtype))
        assert np.log2(s) == np.round(np.log2(s))
        assert amax / s <= largest * (1 + 1e-6) and amax / (s / 2) > largest
    assert float(scale_of(jnp.zeros(3), dtype)) == 1
    assert float(scale_of(jnp.array([2e-38]), dtype)) == 2.0**-126, "a subnormal would be flushed"
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert np.isnan(float(scale_of(jnp.array([1.0, bad]), dtype)))


def test_casts_saturate_and_round_to_nearest():
    given = jnp.array([1e9, -1e9, 500.0, 448.0, 1.0625, 1.1875, 0.0, -0.0, 2.0**-10 * 1.1, 1e-9])
    want = [448, -448, 448, 448, 1.0, 1.25, 0, 0, 2.0**-9, 0]
    np.testing.assert_array_equal(cast(given, 1.0, E4).astype(jnp.float32), want)
    np.testing.assert_array_equal(cast(4 * given, 4.0, E4).astype(jnp.float32), want)
    assert np.isnan(np.float32(jnp.float32(1e9).astype(E4))), "a plain cast would not saturate"


def step(x: np.ndarray, dtype: str) -> np.ndarray:
    """The most that rounding moves each element of x, with the scale of all of x."""
    info, s = jnp.finfo(dtype), float(scale_of(jnp.asarray(x, jnp.float32), dtype))
    half = float(info.eps) / 2
    return np.maximum(np.abs(x) * half, s * float(info.tiny) * half)


def bound(a: np.ndarray, b: np.ndarray, types: tuple[str, str]) -> np.ndarray:
    """Of the error of a @ b when both are rounded."""
    da, db = step(a, types[0]), step(b, types[1])
    exact = np.abs(a) @ np.abs(b)
    return np.abs(a) @ db + da @ np.abs(b) + da @ db + 1e-5 * exact


def products(types, x, w, g):
    # Without the tests' flag for quick compiles: the emitter that it picks makes NaN, FNUZ's code
    # 0x80, of negative numbers that round to zero.
    @partial(jax.jit, compiler_options={"xla_backend_extra_options": ""})
    def both(x, w, g):
        y, pull = jax.vjp(lambda x, w: fp8_matmul(x, w, types=types), x, w)
        return y, *pull(g)

    return [np.asarray(v, np.float64) for v in both(x, w, g)]


@pytest.mark.parametrize("types", [OCP, EMULATED, FNUZ])
@pytest.mark.parametrize("spread", [1.0, 1e-4, 3e4])
def test_errors_are_within_the_roundings(types, spread):
    """Rows of very different size: the small ones are subnormal in float8."""
    rows = jnp.geomspace(spread, 1, 24)[:, None]
    x, w, g = normal(0, 24, 96) * rows, normal(1, 40, 96, scale=0.02), normal(2, 24, 40) * rows
    X, W, G = (np.asarray(v, np.float64) for v in (x, w, g))
    f, b = types.forward, types.backward
    wanted = [X @ W.T, G @ W, G.T @ X]
    bounds = [bound(X, W.T, (f, f)), bound(G, W, (b, f)), bound(G.T, X, (b, f))]
    for got, want, limit in zip(products(types, x, w, g), wanted, bounds, strict=True):
        assert (np.abs(got - want) <= limit).all()
        assert np.abs(got - want).max() > 1e-3 * limit.max(), "nothing was rounded"
    fine = products(replace(types, backward=types.forward), x, w, g)[1]
    if spread == 1.0:
        assert np.abs(fine - wanted[1]).mean() < 0.8 * np.abs(got_dx(types, x, w, g)).mean()


def got_dx(types, x, w, g):
    return products(types, x, w, g)[1] - np.asarray(g, np.float64) @ np.asarray(w, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_emulated_is_the_same_numbers(dtype):
    x, w, g = normal(0, 3, 5, 64, dtype=dtype), normal(1, 48, 64), normal(2, 3, 5, 48, dtype=dtype)
    real, emulated = (
        jax.vjp(lambda x, w, t=t: fp8_matmul(x, w, types=t), x, w) for t in (OCP, EMULATED)
    )
    assert real[0].dtype == jnp.dtype(dtype)
    pairs = zip((real[0], *real[1](g)), (emulated[0], *emulated[1](g)), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        tolerance = 1e-5 if a.dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), tolerance, tolerance)


def test_scales_beyond_half_precision():
    """float16's sums of float8 values would overflow before they are scaled."""
    x, w = jnp.full((2, 4096), 1e-3, "float16"), jnp.full((8, 4096), 1e-3)
    np.testing.assert_allclose(fp8_matmul(x, w).astype("float32"), 4096e-6, rtol=0.1)
    zero = fp8_matmul(jnp.zeros((2, 16)), jnp.zeros((8, 16)))
    np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_seen(bad):
    x, w, g = normal(0, 4, 32), normal(1, 8, 32), normal(2, 4, 8)
    assert not np.isfinite(fp8_matmul(x.at[1, 2].set(bad), w)).any()
    _, dx, dw = products(OCP, x, w, g.at[0, 0].set(bad))
    assert not np.isfinite(dx).any() and not np.isfinite(dw).any()


@pytest.mark.parametrize("shape", [(), (1, 1), (40, 1)])
@pytest.mark.parametrize("types", [OCP, EMULATED])
def test_codes_are_multiplied_as_they_are(types, shape):
    scale = jnp.float32(2.0**-6) if shape != (40, 1) else jnp.geomspace(1e-3, 0.3, 40)[:, None]
    codes = normal(1, 40, 96, scale=100).astype(types.forward)
    x, g = normal(0, 3, 8, 96), normal(2, 3, 8, 40)
    w = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
    y, pull = jax.vjp(lambda x: fp8_codes_matmul(x, codes, scale.reshape(shape), types=types), x)
    X, G = np.asarray(x, np.float64), np.asarray(g, np.float64)
    for got, a, b, dtype in ((y, X, w.T, types.forward), (pull(g)[0], G, w, types.backward)):
        a = a.reshape(-1, a.shape[-1])
        if dtype == types.backward and shape == (40, 1):  # the row's scale goes into g
            a, b = a * np.asarray(scale)[:, 0], b / np.asarray(scale)
        # Codes are not rounded again.
        limit = step(a, dtype) @ np.abs(b) + 1e-5 * np.abs(a) @ np.abs(b)
        error = np.abs(np.asarray(got).reshape(limit.shape) - a @ b)
        assert (error <= limit).all() and error.max() > 0.01 * limit.max()
    wrong = fp8_codes_matmul(x, codes, 2 * scale.reshape(shape), types=types)
    assert np.abs(np.asarray(wrong - y)).max() > 0.1


def dots(f, *args) -> list[tuple[str, ...]]:
    """Operand types of every product in the lowered text."""
    text = jax.jit(f).lower(*args).as_text()
    found = re.findall(r"stablehlo\.dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\)", text)
    return sorted(tuple(t.split("x")[-1] for t in pair) for pair in found)


def test_products_are_float8s_and_nothing_elses():
    x, w, g = normal(0, 16, 32, dtype="bfloat16"), normal(1, 64, 32), normal(2, 16, 64)

    def both(types):
        def f(x, w, g):
            y, pull = jax.vjp(lambda x, w: fp8_matmul(x, w, types=types), x, w)
            return y, pull(g.astype(y.dtype))

        return f

    e4, e5 = "f8E4M3FN", "f8E5M2"
    assert dots(both(OCP), x, w, g) == [(e4, e4), (e5, e4), (e5, e4)]
    assert dots(both(FNUZ), x, w, g)[0] == ("f8E4M3FNUZ", "f8E4M3FNUZ")
    assert dots(both(EMULATED), x, w, g) == [("bf16", "bf16")] * 3

    def frozen(x, codes, g):
        y, pull = jax.vjp(lambda x: fp8_codes_matmul(x, codes, jnp.float32(1)), x)
        return y, pull(g.astype(y.dtype))

    assert dots(frozen, x, w.astype(E4), g) == [(e4, e4), (e5, e4)]


def test_between_the_passes_x_is_kept_in_eight_bits():
    x, w = normal(0, 512, 256, dtype="bfloat16"), normal(1, 64, 256)
    _, pull = jax.vjp(lambda x, w: fp8_matmul(x, w), x, w)
    kept = [v for v in jax.tree.leaves(pull) if v.shape == x.shape]
    assert [v.dtype for v in kept] == [jnp.dtype(E4)]


def test_a_scale_that_is_known_is_used():
    x, w = normal(0, 8, 32), normal(1, 16, 32)
    known = fp8_matmul(x, w, scale_of(w, E4))
    np.testing.assert_array_equal(known, fp8_matmul(x, w))
    gradient = jax.grad(lambda s: fp8_matmul(x, w, s).sum())(scale_of(w, E4))
    assert float(gradient) == 0
    saturated = fp8_matmul(x, w, scale_of(w, E4) / 64)
    assert np.abs(np.asarray(saturated - known)).max() > 0.1


def test_one_scale_over_all_shards():
    """Split eight ways, the amax is still that of the whole."""
    axes, host = (jax.sharding.AxisType.Auto,), jax.devices("cpu")
    mesh = jax.make_mesh((8,), ("x",), axis_types=axes, devices=host)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x, w, g = normal(0, 64, 32), normal(1, 16, 32), normal(2, 64, 16)
    x = x.at[3].mul(300)  # one shard's rows are larger
    x, w, g = jax.device_put((x, w, g), host[0])

    def f(x, w, g):
        y, pull = jax.vjp(lambda x, w: fp8_matmul(x, w), x, w)
        return y, *pull(g)

    want = jax.jit(f)(x, w, g)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    got = jax.jit(f)(*jax.device_put((x, w, g), (split, whole, split)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    alone = jnp.concatenate([fp8_matmul(part, w) for part in jnp.split(x, 8)])
    assert np.abs(np.asarray(alone - want[0])).max() > 1e-3
