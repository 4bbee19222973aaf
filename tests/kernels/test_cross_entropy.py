"""token_logps against its definition in float64: values, gradients, memory, work, sharding."""

import inspect
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mud_puppy.kernels import matmul, token_logps
from mud_puppy.kernels.cross_entropy import xla

pytestmark = pytest.mark.usefixtures("exact_products")
B, T, D, V = 2, 37, 16, 50


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """A leaf that only `matmul` knows: a frozen base plus a trained part."""

    base: Any
    part: Any


@matmul.register(Sum)
def _(w: Sum, x: Any) -> Any:
    return matmul(x, w.base) + matmul(x, w.part)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 13 tokens and chunks of 16 words, so that both do not divide T = 37 and V = 50."""
    monkeypatch.setattr(xla, "BLOCK_TOKENS", 32)
    monkeypatch.setattr(xla, "CHUNK_BYTES", 1)
    monkeypatch.setattr(xla, "ALIGN", 16)


def inputs(dtype=jnp.float32, tokens=T):
    r = np.random.default_rng(0)
    hidden = jnp.asarray(r.normal(size=(B, tokens, D)), dtype)
    head = jnp.asarray(r.normal(size=(V, D)), dtype)
    return hidden, head, jnp.asarray(r.integers(0, V, (B, tokens)), jnp.int32)


def definition(hidden, head, targets):
    log_p = jax.nn.log_softmax(hidden @ head.T, axis=-1)
    logps = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return logps, -(jnp.exp(log_p) * log_p).sum(-1)


def weighted(f, targets, weights):
    """The sum of the results, each times its weights; one without weights is left out."""

    def loss(hidden, head):
        pairs = zip(f(hidden, head, targets), weights, strict=True)
        return sum((w * y).sum() for y, w in pairs if w is not None)

    return loss


def exact(f, *args):
    """f in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) if x.dtype != jnp.int32 else x for x in args]
        return jax.tree.map(np.asarray, f(*wide))


def error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def test_values():
    args = inputs()
    for got, want in zip(jax.jit(token_logps)(*args), exact(definition, *args), strict=True):
        assert got.dtype == jnp.float32 and got.shape == (B, T)
        assert error(got, want) < 1e-6
    wrong = exact(definition, args[0], args[1], jnp.roll(args[2], 1, axis=1))
    assert error(token_logps(*args)[0], wrong[0]) > 1e-2


@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
@pytest.mark.parametrize("used", ["logps", "entropy", "both"])
def test_gradients(trained, used):
    hidden, head, targets = inputs()
    r = np.random.default_rng(1)
    weights = [
        r.normal(size=(B, T)).astype(np.float32) if used in (name, "both") else None
        for name in ("logps", "entropy")
    ]
    argnums = {"hidden": (0,), "head": (1,), "both": (0, 1)}[trained]

    def grads(f):
        return jax.grad(weighted(f, targets, weights), argnums)

    got = jax.jit(grads(token_logps))(hidden, head)
    for g, want in zip(got, exact(grads(definition), hidden, head), strict=True):
        assert error(g, want) < 4e-6
        assert error(g, 1.01 * want) > 4e-6


def test_bfloat16_logits_are_not_rounded():
    args = inputs(jnp.bfloat16)
    want = exact(definition, *args)[0]
    assert error(token_logps(*args)[0], want) < 1e-5
    rounded = definition(args[0], args[1], args[2])[0]
    assert error(rounded, want) > 1e-3


def test_gradient_of_a_bfloat16_head_is_summed_in_float32():
    # 64 chunks that pull in one direction: rounding each partial sum would lose the small ones.
    hidden, head, targets = inputs(jnp.bfloat16, tokens=1024)
    hidden, targets = jnp.abs(hidden), jnp.zeros_like(targets)

    def grad(f):
        return jax.grad(lambda w: f(hidden.astype(w.dtype), w, targets)[0].sum())

    got = jax.jit(grad(token_logps))(head)
    assert got.dtype == jnp.bfloat16
    want = exact(grad(definition), head)

    def part(c):
        x, y = hidden[:, 16 * c : 16 * c + 16], targets[:, 16 * c : 16 * c + 16]
        d = jax.grad(lambda w: definition(x.astype(w.dtype), w, y)[0].sum())
        return d(head.astype(jnp.float32)).astype(jnp.bfloat16)

    rounded = sum(map(part, range(64)), start=jnp.zeros((V, D), jnp.bfloat16))
    assert error(got, want) < 5e-3 < 1e-2 < error(rounded, want)


def test_any_weight_that_matmul_knows():
    hidden, head, targets = inputs()
    leaf = Sum(head / 2, head / 2)
    f = jax.jit(lambda h, part: token_logps(h, Sum(head / 2, part), targets))
    for got, want in zip(f(hidden, leaf.part), exact(definition, *inputs()), strict=True):
        assert error(got, want) < 1e-6
    got = jax.grad(lambda part: f(hidden, part)[0].sum())(leaf.part)
    want = exact(jax.grad(lambda w: definition(hidden.astype(w.dtype), w, targets)[0].sum()), head)
    assert error(got, want) < 4e-6
    assert error(got, 2 * want) > 0.1


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_memory_never_holds_all_logits(argnums):
    tokens, vocab = 1024, 2048
    hidden = jax.ShapeDtypeStruct((B, tokens, D), jnp.float32)
    head = jax.ShapeDtypeStruct((vocab, D), jnp.float32)
    targets = jax.ShapeDtypeStruct((B, tokens), jnp.int32)

    def temp_bytes(f):
        loss = jax.grad(lambda h, w, y: f(h, w, y)[0].sum(), argnums)
        return compiled(loss, hidden, head, targets).memory_analysis().temp_size_in_bytes

    assert temp_bytes(token_logps) < B * tokens * vocab * 4 / 8
    assert temp_bytes(definition) > B * tokens * vocab * 4


def test_nothing_is_computed_for_what_is_not_differentiated():
    """Products of [tokens, D] and [D, V] size; each stands once in the body of its loop."""
    hidden, head, targets = inputs()

    def products(argnums, result):
        loss = jax.value_and_grad(lambda h, w: token_logps(h, w, targets)[result].sum(), argnums)
        return compiled(loss, hidden, head).as_text().count(" dot(")

    assert products(0, result=0) == 2  # logits, d hidden: LoRA
    assert products((0, 1), result=0) == 4  # logits twice, d hidden, d head
    assert products(1, result=0) == 3
    assert products(0, result=1) == 3  # a frozen head's entropy: logits twice, d hidden


def test_batch_shards_stay_apart():
    devices = jax.devices("cpu")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    r = np.random.default_rng(0)
    hidden = jnp.asarray(r.normal(size=(8, T, D)), jnp.float32)
    targets = jnp.asarray(r.integers(0, V, (8, T)), jnp.int32)
    head = inputs()[1]

    def xla_logps(h, w, y):
        return token_logps(h, w, y, implementation="xla")[0].sum()

    loss = jax.value_and_grad(xla_logps, (0, 1))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put((hidden, targets), rows)
    f = compiled(
        loss, sharded[0], jax.device_put(head, NamedSharding(mesh, PartitionSpec())), sharded[1]
    )
    assert "all-gather" not in f.as_text()
    got = jax.jit(loss)(sharded[0], head, sharded[1])
    for a, b in zip(
        jax.tree.leaves(got), jax.tree.leaves(loss(hidden, head, targets)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def gathered(h, w, y):
        return loss(jax.lax.with_sharding_constraint(h, NamedSharding(mesh, PartitionSpec())), w, y)

    assert "all-gather" in compiled(gathered, sharded[0], head, sharded[1]).as_text()


def test_refuses_shapes_that_do_not_fit():
    hidden, head, targets = inputs()
    f = inspect.unwrap(token_logps)  # as users have it, without the type checks of tests
    with pytest.raises(ValueError, match=r"expected a head \[V, 16\]"):
        f(hidden, head[:, 1:], targets)
    with pytest.raises(ValueError, match="expected targets"):
        f(hidden, head, targets[:, 1:])


def test_blocks_are_of_what_one_device_holds(monkeypatch):
    hidden, head = jnp.zeros((8, 64, D)), jnp.zeros((64, D))
    monkeypatch.setattr(xla, "BLOCK_TOKENS", 8 * 4)
    monkeypatch.setattr(xla, "CHUNK_BYTES", 4 * 8 * 4 * 16)
    assert xla.choose_blocks(hidden, head) == (4, 16)
    assert xla.choose_blocks(hidden, head, slope=True) == (1, 64)
    devices = jax.devices("cpu")
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)):
        assert xla.choose_blocks(hidden, head) == (32, 16)
        assert xla.choose_blocks(hidden, head, slope=True) == (8, 64)
