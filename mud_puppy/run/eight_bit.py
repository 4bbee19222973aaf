"""Adam and Lion whose moments are kept in 8 bits: a quarter of the memory of float32 ones.

Source: 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861). An update is computed in
float32 from moments that are decoded, and they are encoded after it; only what lies between two
steps is rounded. Leaves of fewer than 4096 elements keep float32 moments, and are optax's.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mud_puppy.kernels.dynamic import blocks, decode, encode

Tree = Any

SMALL = 4096  # elements; bitsandbytes' limit


class Adam8bitState(NamedTuple):
    """count: int32, steps done. mu, nu: mean gradient and mean square, trees like the parameters:
    uint8 codes, or float32 where a leaf is small, of which the absmax is None."""

    count: Any
    mu: Tree
    mu_absmax: Tree
    nu: Tree
    nu_absmax: Tree


class Lion8bitState(NamedTuple):
    """mu: the mean gradient, as in `Adam8bitState`."""

    mu: Tree
    mu_absmax: Tree


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments in 8 bits."""

    def init(params: Tree) -> Adam8bitState:
        mu, nu = _zeros(params, signed=True), _zeros(params, signed=False)
        return Adam8bitState(jnp.zeros((), jnp.int32), *mu, *nu)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        count: Any = optax.safe_increment(state.count)
        c1, c2 = (1 - b ** count.astype(jnp.float32) for b in (b1, b2))

        def one(g: Any, mu: Any, mu_absmax: Any, nu: Any, nu_absmax: Any) -> tuple:
            m = b1 * _read(mu, mu_absmax, True) + (1 - b1) * g
            v = b2 * _read(nu, nu_absmax, False) + (1 - b2) * jnp.square(g)
            move = m / c1 / (jnp.sqrt(v / c2) + eps)
            return move, *_write(m, mu_absmax, True), *_write(v, nu_absmax, False)

        move, *moments = _map(one, updates, *state[1:])
        return move, Adam8bitState(count, *moments)

    return optax.GradientTransformation(init, update)


def scale_by_lion_8bit(b1: float, b2: float) -> optax.GradientTransformation:
    """`optax.scale_by_lion` with its mean in 8 bits."""

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        def one(g: Any, mu: Any, absmax: Any) -> tuple:
            m = _read(mu, absmax, True)
            move = jnp.sign((1 - b1) * g + b1 * m)
            return move, *_write(b2 * m + (1 - b2) * g, absmax, True)

        move, *moments = _map(one, updates, *state)
        return move, Lion8bitState(*moments)

    return optax.GradientTransformation(
        lambda params: Lion8bitState(*_zeros(params, signed=True)), update
    )


def _zeros(params: Tree, signed: bool) -> tuple[Tree, Tree]:
    """(codes of zero, their absmax) for every leaf."""

    def codes(p: Any) -> Any:
        if p.size < SMALL:
            return jnp.zeros(p.shape, jnp.float32)
        return jnp.full(p.shape, 127 if signed else 0, jnp.uint8)

    def absmax(p: Any) -> Any:
        return None if p.size < SMALL else jnp.zeros(blocks(p.shape), jnp.float32)

    return jax.tree.map(codes, params), jax.tree.map(absmax, params)


def _read(moment: Any, absmax: Any, signed: bool) -> Any:
    return moment if absmax is None else decode(moment, absmax, signed)


def _write(moment: Any, absmax: Any, signed: bool) -> tuple[Any, Any]:
    return (moment, None) if absmax is None else encode(moment, signed)


def _map(f: Any, grads: Tree, *trees: Tree) -> list[Tree]:
    """f over the leaves of grads; a list of trees, one for each of f's results."""
    leaves, treedef = jax.tree.flatten(grads)
    # A small leaf's absmax is None, which a tree does not count as a leaf.
    flatten = partial(jax.tree.leaves, is_leaf=lambda x: x is None)
    holes = [x is None for x in flatten(grads)]
    columns = [[x for x, hole in zip(flatten(t), holes, strict=True) if not hole] for t in trees]
    results = [f(*row) for row in zip(leaves, *columns, strict=True)]
    return [jax.tree.unflatten(treedef, column) for column in zip(*results, strict=True)]
