"""`over_tokens`: a divergence of two models' logits, and its gradients, a few tokens at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.kernels import quantize
from mud_puppy.kernels.cross_entropy import xla
from mud_puppy.kernels.cross_entropy.logits import over_tokens
from mud_puppy.losses import generalized_jsd
from mud_puppy.parallel import make_mesh

B, T, V = 8, 37, 90
SOFTCAPS = (None, 20.0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: Any) -> None:
    """Of thirteen tokens, so that three cover T and the last one is filled up."""
    monkeypatch.setattr(xla, "CHUNK_BYTES", 1)


def made(dtype: str = "float32") -> tuple[list[Any], list[Any]]:
    """Hidden states and heads of a student and of a wider teacher with more rows."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return jnp.asarray(random.normal(size=shape), dtype)

    return [draw(B, T, 16), draw(B, T, 32)], [draw(V, 16) / 2, draw(V + 6, 32) / 2]


def plain(beta: float, hidden: Any, heads: Any) -> Any:
    """The definition: all logits at once."""
    logits = []
    for x, head, cap in zip(hidden, heads, SOFTCAPS, strict=True):
        x, head = (a.astype(jnp.float32) for a in (x, head))
        raw = jnp.einsum("btd,vd->btv", x, head, precision="highest")
        logits.append((raw if cap is None else cap * jnp.tanh(raw / cap))[..., :V])
    return generalized_jsd(logits[0], logits[1], beta, 1.5)


def blocks(beta: float, hidden: Any, heads: Any) -> Any:
    return over_tokens(
        partial(generalized_jsd, beta=beta, temperature=1.5), hidden, heads, SOFTCAPS
    )


def slopes(f: Callable, beta: float, hidden: Any, heads: Any) -> list[Any]:
    """The divergence [B, T], and its gradients in the student's hidden states and head."""

    def total(x: Any, head: Any) -> Any:
        found = f(beta, [x, hidden[1]], [head, heads[1]])
        return (found * jnp.cos(jnp.arange(T))).sum(), found

    run = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (dx, dhead), found = run(hidden[0], heads[0])
    return [np.asarray(x, np.float32) for x in (found, dx, dhead)]


def error(found: list[Any], wanted: list[Any]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_formula(dtype: str, beta: float) -> None:
    hidden, heads = made(dtype)
    found, wanted = (slopes(f, beta, hidden, heads) for f in (blocks, plain))
    # Values are those of float32 sums; gradients are rounded to the dtype once.
    assert error(found[:1], wanted[:1]) < 1e-5
    assert error(found, wanted) < (1e-5 if dtype == "float32" else 2e-2)
    other = slopes(blocks, beta + (0.02 if beta < 1 else -0.02), hidden, heads)
    assert error(other[:1], wanted[:1]) > 1e-3


def test_rows_that_one_model_lacks_do_not_count() -> None:
    hidden, heads = made()
    found = blocks(0.3, hidden, heads)
    assert np.array_equal(found, blocks(0.3, hidden, [heads[0], heads[1].at[V:].set(9.0)]))
    assert not np.allclose(found, blocks(0.3, hidden, [heads[0], heads[1].at[V - 1 :].set(9.0)]))


def test_heads_in_codes_and_under_adapters() -> None:
    hidden, heads = made()
    codes = quantize(heads[1], "int8")
    assert np.allclose(
        blocks(0.3, hidden, [heads[0], codes]),
        plain(0.3, hidden, [heads[0], mp.kernels.dequantize(codes)]),
        atol=1e-5,
    )
    a, b = (jnp.asarray(np.random.default_rng(1).normal(size=s)) for s in ((2, 16), (V, 2)))
    adapted = mp.Lora(heads[0], jnp.float32(a), jnp.float32(b), jnp.float32(0.1))
    wanted = plain(0.3, hidden, [heads[0] + 0.1 * jnp.float32(b @ a), heads[1]])
    assert np.allclose(blocks(0.3, hidden, [adapted, heads[1]]), wanted, atol=1e-4)


def test_no_logits_of_the_batch_exist() -> None:
    hidden, heads = made()

    def loss(x: Any, head: Any) -> Any:
        return blocks(0.3, [x, hidden[1]], [head, heads[1]]).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden[0], heads[0]).compile().as_text() or ""
    assert f"f32[{B},13,{V}]" in text
    assert not any(f"[{whole},{V}]" in text for whole in (f"{B},{T}", f"3,{B},13", f"{B},39"))


def test_devices_have_their_own_rows() -> None:
    hidden, heads = made()
    mesh = make_mesh("data=4,fsdp=2")
    spec = jax.sharding.PartitionSpec
    place = partial(jax.sharding.NamedSharding, mesh)
    split = jax.device_put(hidden, place(spec(("data", "fsdp"))))
    parts = jax.device_put(heads, place(spec(None, "fsdp")))
    wanted = slopes(blocks, 0.3, hidden, heads)
    with jax.set_mesh(mesh):
        assert error(slopes(blocks, 0.3, split, parts), wanted) < 1e-5
