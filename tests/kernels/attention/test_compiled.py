"""What a compiled call holds, moves between devices and runs again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mud_puppy.kernels import flash_attention
from tests.kernels.attention.calls import qkv, segments


def temp_bytes(f, T):
    q = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    return jax.jit(f).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_is_linear(direction):
    def growth(implementation):
        def f(*args):
            return flash_attention(*args, implementation=implementation)

        if direction == "backward":
            f = jax.grad(lambda *args, f=f: (f(*args) ** 2).sum(), (0, 1, 2))
        return temp_bytes(f, 2048) / temp_bytes(f, 512)

    assert growth("xla") < 5 < 12 < growth("reference")


def test_batch_shards_stay_apart():
    devices = jax.devices("cpu")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    q, k, v = qkv(B=8)
    ids = segments(8, 40)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def grads(q, k, v, ids):
        def loss(*args):
            return (flash_attention(*args, segment_ids=ids, implementation="xla") ** 2).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    def lowered(f):
        return jax.jit(f).lower(*jax.device_put((q, k, v, ids), rows)).compile()

    f = lowered(grads)
    assert "all-gather" not in f.as_text()
    got = f(*jax.device_put((q, k, v, ids), rows))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(grads(q, k, v, ids)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def merged(q, k, v, ids):  # what must not happen: B folded into another axis
        def whole(x):
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))

        return grads(whole(q), whole(k), whole(v), ids)

    assert "all-gather" in lowered(merged).as_text()


def test_a_remat_policy_that_saves_attention_does_not_run_it_again():
    args = qkv(T=13)  # one block: every product stands in the jaxpr once

    def products(policy):
        def loss(*args):
            return jnp.sin(flash_attention(*args, implementation="xla")).sum()

        f = jax.checkpoint(loss, policy=policy)
        return str(jax.make_jaxpr(jax.value_and_grad(f, (0, 1, 2)))(*args)).count("dot_general[")

    policies = jax.checkpoint_policies
    assert products(policies.save_only_these_names("attention")) == 2 + 5
    assert products(policies.nothing_saveable) == 2 + 2 + 5


def used_kernels(jaxpr):
    """Pallas calls some result of which is used. (JAX keeps the others; XLA drops them.)"""
    used = {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    used |= {v for v in jaxpr.outvars if not hasattr(v, "val")}
    mine = [e for e in jaxpr.eqns if e.primitive.name == "pallas_call"]
    count = sum(any(v in used for v in e.outvars) for e in mine)
    rest = [p for e in jaxpr.eqns if e not in mine for p in e.params.values()]
    inner = [getattr(p, "jaxpr", p) for p in rest]
    return count + sum(used_kernels(p) for p in inner if hasattr(p, "eqns"))


def test_a_remat_policy_that_saves_attention_does_not_run_the_kernel_again():
    args = qkv(T=13)

    def loss(*args):
        return jnp.sin(flash_attention(*args, implementation="pallas")).sum()

    def kernels(policy):
        f = jax.checkpoint(loss, policy=policy)
        return used_kernels(jax.make_jaxpr(jax.value_and_grad(f, (0, 1, 2)))(*args).jaxpr)

    policies = jax.checkpoint_policies
    assert kernels(policies.save_only_these_names("attention")) == 3
    assert kernels(policies.nothing_saveable) == 4
