"""Products are counted as often as they run, and never more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mud_puppy.kernels import flash_attention
from mud_puppy.kernels.attention.plan import Options, Plan
from mud_puppy.parallel import make_mesh
from mud_puppy.plan.cost import flops

N = 16
ONE = 2 * N**3
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)


def counted(f, *args) -> int:
    return flops(jax.make_jaxpr(f)(*args).jaxpr)


def scanned(x):
    return jax.lax.scan(lambda c, w: (c @ w, None), x, jnp.ones((5, N, N)))[0]


def nested(x):
    return jax.lax.scan(lambda c, _: (scanned(c), None), x, None, length=3)[0]


@pytest.mark.parametrize(
    ("f", "times"),
    [
        (lambda x: x @ x, 1),
        (lambda x: jnp.einsum("ij,jk,kl->il", x, x, x), 2),
        (scanned, 5),
        (nested, 15),
        (lambda x: jax.jit(scanned)(x) + x @ x, 6),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda: x @ x @ x, lambda: x @ x), 1),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ c, x), 1),
        (jax.grad(lambda x: (x @ x).sum()), 3),
        (jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ x) @ x).sum())), 8),
        (jax.vmap(lambda x: x @ jnp.ones(N)), 1 / N),
        (jnp.sin, 0),
    ],
)
def test_products_count_as_often_as_they_run(f, times):
    assert counted(f, SQUARE) == times * ONE


def test_a_share_of_each_device_counts_for_all():
    mesh = make_mesh("data=2,fsdp=4")
    spec = PartitionSpec(("data", "fsdp"))

    def split(x):
        run = jax.shard_map(lambda x: x @ jnp.ones((N, N)), in_specs=spec, out_specs=spec)
        return run(x)

    with jax.set_mesh(mesh):
        assert counted(split, jax.ShapeDtypeStruct((8 * N, N), jnp.float32)) == 8 * ONE


@pytest.mark.parametrize(
    ("T", "S", "causal", "window"),
    [(7, 7, True, None), (7, 7, True, 3), (5, 9, True, 4), (5, 5, False, None), (6, 6, False, 2)],
)
def test_pairs_are_those_that_see_each_other(T, S, causal, window):
    at, key = np.arange(T)[:, None] + S - T, np.arange(S)[None]
    sees = (key <= at) | (not causal)
    if window is not None:
        sees = sees & (key > at - window)
    assert Plan(Options(causal, window, 1.0), T, S, 16, 16, 4, 1).pairs == sees.sum()


@pytest.mark.parametrize("window", [None, 24])
def test_the_attention_kernels_say_theirs(window):
    """Two products of the visible pairs forward; three and four of them in the two backward passes,
    which compute the scores again."""
    B, T, H, K, D = 2, 64, 4, 2, 16
    q, k = (jax.ShapeDtypeStruct((B, T, heads, D), jnp.bfloat16) for heads in (H, K))

    def attend(q, k, v):
        return flash_attention(q, k, v, window=window, implementation="pallas").sum()

    pairs = Plan(Options(True, window, 1.0), T, T, 16, 16, 4, 1).pairs
    product = 2 * D * B * H * pairs
    assert counted(attend, q, k, k) == 2 * product
    assert counted(jax.grad(attend, argnums=(0, 1, 2)), q, k, k) in (9 * product, 10 * product)
