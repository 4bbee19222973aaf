"""linear_cross_entropy against its definition: drawn shapes, options, both implementations."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from mud_puppy.kernels import cross_entropy, linear_cross_entropy, token_logps
from mud_puppy.kernels.cross_entropy import pallas, xla
from mud_puppy.kernels.cross_entropy.pallas import Tiles
from mud_puppy.kernels.cross_entropy.stats import Shape
from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import dequantize
from tests.kernels import contract

pytestmark = pytest.mark.usefixtures("exact_products")
FIELDS = ("logp", "entropy", "lse", "mean")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of 16 to 32 tokens and 32 words, so that drawn shapes have several that do not fit."""
    monkeypatch.setattr(xla, "choose_blocks", lambda x, head, slope=False: xla.Blocks(16, 32))
    monkeypatch.setattr(pallas, "BLOCK_BYTES", 2**15)
    tiles = Tiles(tokens=16, rows=32, depth=32, num_warps=4, num_stages=1)
    monkeypatch.setattr(pallas, "tuned_tiles", lambda kernel, dtype: tiles)


def inputs(B, T, D, V, dtype, seed=0):
    """Logits of a spread of about 2, so that entropies are neither 0 nor log V."""
    r = np.random.default_rng(seed)
    hidden = jnp.asarray(r.normal(size=(B, T, D)) * 2 / D**0.5, dtype)
    head = jnp.asarray(r.normal(size=(V, D)), dtype)
    targets = jnp.asarray(r.integers(0, V, (B, T)), jnp.int32)
    return hidden, head, targets


def stats(name, targets, shape, used, frozen=None):
    """(hidden, head) -> the used fields of Stats; with a frozen head, hidden -> them."""
    call = inspect.unwrap(cross_entropy._stats)

    def of(hidden, head):
        found = call(hidden, head, targets, shape, name)
        return [getattr(found, field) for field in used]

    return of if frozen is None else lambda hidden: of(hidden, frozen.astype(hidden.dtype))


def results(name, hidden, head, targets, shape, trains, used, seed=1):
    """(ours, those of the definition in float64): values and gradients."""
    r = np.random.default_rng(seed)
    g = [jnp.asarray(r.normal(size=targets.shape), jnp.float32) for _ in used]
    args = (hidden, head) if trains else (hidden,)
    got = contract.compiled(stats(name, targets, shape, used, None if trains else head), args, g)
    with jax.enable_x64(True):
        frozen = None if trains else jnp.asarray(np.asarray(head, np.float64))
        f = stats("reference", targets, shape, used, frozen)
        return got, contract.in_float64(f, args, g)


def worst(name, B, T, D, V, dtype, shape, trains, used):
    """The largest error of values and gradients over what the dtype allows."""
    got, want = results(name, *inputs(B, T, D, V, dtype), shape, trains, used)
    return max(contract.differences(got, want)) / contract.tolerance(dtype, D + V)


@pytest.mark.parametrize("part", contract.PARTS)
def test_drawn(part):
    @seed(part)
    @settings(max_examples=6, deadline=None, database=None)
    @given(
        name=st.sampled_from(["xla", "pallas"]),
        B=st.integers(1, 2),
        T=st.integers(16, 40),
        D=st.sampled_from([16, 32, 48, 80]),
        V=st.integers(33, 140),
        dtype=st.sampled_from(sorted(DTYPES)),
        softcap=st.sampled_from([None, 3.0]),
        temperature=st.sampled_from([1.0, 0.7]),
        trains=st.booleans(),
        used=st.sampled_from([("logp",), ("logp", "lse"), FIELDS]),
    )
    def check(name, B, T, D, V, dtype, softcap, temperature, trains, used):
        shape = Shape(softcap, temperature)
        assert worst(name, B, T, D, V, DTYPES[dtype], shape, trains, used) < 1

    check()


@pytest.mark.parametrize("name", ["xla", "pallas"])
@pytest.mark.parametrize("trains", [False, True])
def test_a_wrong_slope_is_seen(name, trains, monkeypatch):
    """Mutations: a cap whose slope is forgotten."""
    monkeypatch.setattr(Shape, "derivative", lambda self, logits: jnp.ones_like(logits))
    args = 2, 20, 32, 70, jnp.float16, Shape(3.0), trains, ("logp",)
    assert worst(name, *args) > 2


@pytest.mark.parametrize("name", ["xla", "pallas"])
def test_a_confident_token_keeps_its_gradient(name):
    """1 - p is far below bfloat16's rounding of p."""
    hidden, head, targets = inputs(1, 16, 32, 64, jnp.bfloat16)
    hidden = hidden.at[0, 0].set(head[targets[0, 0]] * 0.5)
    got, want = results(name, hidden, head, targets, Shape(), False, ("logp",))
    assert -1e-3 < want[0][0, 0] < -1e-6
    assert np.abs(got[1] - want[1])[0, 0].max() < 0.02 * np.abs(want[1][0, 0]).max()


@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "mxfp4", "fp8"])
def test_a_quantized_head_is_decoded_a_chunk_at_a_time(format):
    hidden, head, targets = inputs(2, 20, 64, 130, jnp.bfloat16)
    double = {"double": True} if format == "nf4" else {}
    codes = quantize(head, format, **double)
    r = np.random.default_rng(3)
    for used in (("logp",), FIELDS):
        g = [jnp.asarray(r.normal(size=(2, 20)), jnp.float32) for _ in used]

        def run(head, used=used, g=g):
            call = inspect.unwrap(cross_entropy._stats)

            def f(hidden):
                found = call(hidden, head, targets, Shape(), None)
                return [getattr(found, field) for field in used]

            return contract.compiled(f, (hidden,), g)

        ours, theirs = run(codes), run(dequantize(codes))
        assert max(contract.differences(ours, theirs)) < contract.tolerance(jnp.bfloat16, 130)
        assert (
            np.abs(ours[0] - theirs[0]).max() < 1e-5 < 1e-3 < np.abs(ours[0] - run(head)[0]).max()
        )
    text = jax.jit(lambda c: token_logps(hidden, c, targets)).lower(codes).as_text()
    assert "tensor<32x64xbf16>" in text and "tensor<130x64xbf16>" not in text


# The loss around the core.


def definition(hidden, head, targets, weights, e=0.0, z=0.0, cap=None):
    logits = hidden @ head.T
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    loss = (1 - e) * nll - e * log_p.mean(-1) + z * jax.nn.logsumexp(logits, -1) ** 2
    return jnp.where(targets == -100, 0, loss * weights)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss(reduction, options, weighted):
    hidden, head, targets = inputs(2, 20, 32, 70, jnp.float32)
    targets = targets.at[0, :7].set(-100)
    r = np.random.default_rng(2)
    weights = jnp.asarray(r.uniform(size=(2, 20)), jnp.float32) if weighted else None
    shares = jnp.ones((2, 20)) if weights is None else weights
    names = {"label_smoothing": "e", "z_loss": "z", "softcap": "cap"}

    def want(hidden, head):
        given = {names[k]: v for k, v in options.items()}
        loss = definition(hidden, head, targets, shares, **given)
        total = jnp.where(targets == -100, 0, shares).sum()
        return {"mean": loss.sum() / total, "sum": loss.sum(), "none": loss}[reduction]

    def got(hidden, head):
        return linear_cross_entropy(
            hidden, head, targets, weights=weights, reduction=reduction, **options
        )

    g = jnp.ones((2, 20)) if reduction == "none" else jnp.ones(())
    ours, theirs = (contract.compiled(f, (hidden, head), g) for f in (got, want))
    assert max(contract.differences(ours, theirs)) < contract.tolerance(jnp.float32, 102)


def test_ignored_tokens_may_be_all():
    hidden, head, targets = inputs(1, 16, 32, 70, jnp.float32)
    loss = jax.value_and_grad(lambda h: linear_cross_entropy(h, head, 0 * targets - 100))
    value, gradient = loss(hidden)
    assert value == 0 and not np.asarray(gradient).any()
    one = (0 * targets - 100).at[0, 3].set(5)
    assert np.flatnonzero(np.asarray(jax.grad(
        lambda h: linear_cross_entropy(h, head, one))(hidden)).any(-1)).tolist() == [3]  # fmt: skip


def test_temperature_divides_the_logits():
    hidden, head, targets = inputs(1, 16, 32, 70, jnp.float32)
    warm = token_logps(hidden, head, targets, temperature=2.0)
    for a, b in zip(warm, token_logps(hidden / 2, head, targets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.abs(warm[0] - token_logps(hidden, head, targets)[0]).max() > 0.1


def test_refuses_what_it_cannot_do():
    hidden, head, targets = inputs(1, 16, 20, 70, jnp.float32)
    f = inspect.unwrap(linear_cross_entropy)
    with pytest.raises(ValueError, match="'average' is none of"):
        f(hidden, head, targets, reduction="average")
    with pytest.raises(ValueError, match="the width 20 is no multiple of 16"):
        f(hidden, head, targets, implementation="pallas")
    with pytest.raises(ValueError, match="'cuda' is none of"):
        f(hidden, head, targets, implementation="cuda")
