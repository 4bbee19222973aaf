"""Partition and combine are inverses, and share what they hold."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mud_puppy.weights import (
    add_lora,
    combine,
    freeze_lora,
    partition,
    strip_lora,
    with_dropout,
)

KEY = jax.random.key(0)


def make_params() -> Any:
    block = {
        "attn_norm": jnp.ones((2, 4)),
        "self_attn": {"q_proj": {"weight": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))}},
    }
    return {"embed": jnp.ones((8, 4)), "final_norm": jnp.ones(4), "layers": [[block]]}


def trees() -> dict[str, Any]:
    plain = make_params()
    once = add_lora(plain, rank=2, key=KEY)
    return {
        "plain": plain,
        "lora": once,
        "dora": add_lora(plain, rank=2, dora=True, key=KEY),
        "stacked": add_lora(once, rank=3, key=KEY),
        "frozen": freeze_lora(add_lora(plain, rank=2, dropout=0.5, key=KEY)),
        "dropout": with_dropout(add_lora(plain, rank=2, dropout=0.5, key=KEY), KEY),
    }


@pytest.mark.parametrize("kind", ["plain", "lora", "dora", "stacked", "frozen", "dropout"])
def test_combine_undoes_partition(kind: str) -> None:
    params = trees()[kind]
    train, frozen = partition(params)
    again = combine(train, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    leaves = zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True)
    assert all(a is b for a, b in leaves)
    count = len(jax.tree.leaves(train)) + len(jax.tree.leaves(frozen))
    assert count == len(jax.tree.leaves(params))


def test_without_adapters_everything_trains() -> None:
    train, frozen = partition(trees()["plain"])
    assert jax.tree.leaves(frozen) == [] and len(jax.tree.leaves(train)) == 5


def test_combine_works_under_grad_and_jit() -> None:
    train, frozen = partition(trees()["dora"])

    @jax.jit
    def loss(train: Any) -> Any:
        params = combine(train, frozen)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    grads = jax.grad(loss)(train)
    assert jax.tree.structure(grads) == jax.tree.structure(train)


def test_the_reference_costs_nothing() -> None:
    params = trees()["lora"]
    base = strip_lora(params)
    q = params["layers"][0][0]["self_attn"]["q_proj"]["weight"]
    assert base["layers"][0][0]["self_attn"]["q_proj"]["weight"] is q.base


def test_a_frozen_adapter_is_part_of_the_model() -> None:
    params = trees()["frozen"]
    assert jax.tree.leaves(partition(params)[0]) == []
    assert strip_lora(params) is not params
    assert jax.tree.structure(strip_lora(params)) == jax.tree.structure(params)
    assert len(jax.tree.leaves(with_dropout(params, KEY))) == len(jax.tree.leaves(params))
    above = add_lora(params, rank=3, key=KEY)
    assert [leaf.shape for leaf in jax.tree.leaves(partition(above)[0])] == [(2, 3, 4), (2, 4, 3)]
    assert jax.tree.structure(strip_lora(above)) == jax.tree.structure(params)
