"""8-bit blocks: the nearest code of bitsandbytes' maps, error bounds, layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import dynamic
from mud_puppy.kernels.formats import dynamic_map


def samples(signed: bool) -> np.ndarray:
    """float32 in [-1, 1] or [0, 1], evenly, over all decades, and the map's own values."""
    rng = np.random.default_rng(0)
    even, small = rng.uniform(0, 1, 20000), 10 ** rng.uniform(-8, 0, 20000)
    sign = rng.choice([-1, 1], 40000) if signed else 1
    values = np.concatenate([sign * np.concatenate([even, small]), dynamic_map(signed)])
    return values.astype(np.float32)


def excess(codes, y: np.ndarray, signed: bool) -> float:
    """How much further than the nearest value the codes' are, of y."""
    values, y = dynamic_map(signed).astype(np.float64), y.astype(np.float64)
    distances = np.abs(y[:, None] - values)
    own = distances[np.arange(len(y)), np.asarray(codes)]
    return float(((own - distances.min(1)) / np.maximum(np.abs(y), 1e-9)).max())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_of_all(signed):
    y = samples(signed)
    codes = np.asarray(dynamic.nearest(jnp.asarray(y), signed))
    assert excess(codes, y, signed) < 1e-6  # ties, as float32 sees them
    np.testing.assert_array_equal(codes[-256:], np.arange(256))
    assert excess(np.roll(codes, 1), y, signed) > 0.1
    wrong = np.where(np.arange(len(y)) == 7, codes ^ 1, codes)  # one code, one place off
    assert excess(wrong, y, signed) > 1e-3


def test_the_unsigned_map_has_a_finer_grid():
    values = dynamic_map(signed=False)
    assert values.shape == (256,) and np.all(np.diff(values) > 0)
    assert values[0] == 0 and values[-1] == 1
    assert np.diff(values).max() < np.diff(dynamic_map()).max()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(4, 512), (2, 40, 16), (3, 96, 576), (7, 11, 13)])
def test_errors_are_half_a_step_of_the_block(shape, signed):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32) ** (1 if signed else 2)
    codes, absmax = dynamic.encode(jnp.asarray(x), signed)
    assert codes.shape == x.shape and codes.dtype == jnp.uint8
    assert absmax.shape == dynamic.blocks(shape)
    back = np.asarray(dynamic.decode(codes, absmax, signed))
    # Above a tenth of the absmax, steps are 0.9 / 64 of it (unsigned: 0.9 / 128), but the last.
    bound = (0.45 / 64 if signed else 0.45 / 128) * float(np.abs(x).max()) * 1.001
    assert 0 < np.abs(back - x).max() <= bound
    assert np.abs(back - x).max() > bound / 50
    again = dynamic.decode(*dynamic.encode(jnp.asarray(back), signed), signed)
    if not signed:  # the map ends at 1 on both sides: what was encoded once stays
        np.testing.assert_allclose(again, back, rtol=1e-6)


def test_a_denominator_never_becomes_zero():
    x = jnp.full((4, 256), 1e-20).at[:, 0].set(1.0).at[:, 1].set(0.0)
    codes, absmax = dynamic.encode(x, signed=False)
    back = np.asarray(dynamic.decode(codes, absmax, signed=False))
    assert (back[:, 2:] > 0).all() and (back[:, 1] == 0).all()
    assert float(dynamic.nearest(x, signed=False)[0, 2]) == 0, "the plain nearest is 0"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(bad):
    x = jnp.ones((2, 512)).at[0, 3].set(bad)
    back = np.asarray(dynamic.decode(*dynamic.encode(x, True), True))
    assert np.isnan(back[0, :256]).all() and (back[0, 256:] == 1).all() and (back[1] == 1).all()


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((32, 14336, 4096), (32, 14336, 16)),  # along the last axis
        ((30, 1536, 576), (30, 1536, 3)),  # 192 a block
        ((32, 16, 4096), (32, 16, 16)),  # LoRA's a
        ((32, 4096, 16), (32, 256)),  # LoRA's b: the last axis is short
        ((127, 101), (51,)),  # nothing divides: filled up
    ],
)
def test_blocks_are_cut_from_the_last_axes(shape, blocks):
    assert dynamic.blocks(shape) == blocks
    made = jax.eval_shape(lambda x: dynamic.encode(x, True), jax.ShapeDtypeStruct(shape, "float32"))
    assert made[0].shape == shape and made[1].shape == blocks


def test_blocks_do_not_mix():
    x = jnp.concatenate([jnp.full((1, 256), 1e-6), jnp.full((1, 256), 1e6)], axis=1)
    back = dynamic.decode(*dynamic.encode(x, True), True)
    np.testing.assert_allclose(back, x, rtol=1e-6)
    whole = float(jnp.abs(x).max())
    one_block = np.asarray(jnp.take(dynamic_map(), dynamic.nearest(x / whole, True))) * whole
    assert np.abs(one_block[0, :256] - x[0, :256]).max() > 5e-7, "one absmax would lose them"
