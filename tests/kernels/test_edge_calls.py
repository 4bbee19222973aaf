"""Empty arrays are served; groups, labels, seeds and chips beyond what there is have a meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import choice, target, tuned
from mud_puppy.kernels.encode import quantize
from tests.kernels.calls import (
    AT,
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
