"""Work on each token alone, a tile of tokens at a time.

What a layer does before and after its attention mixes no tokens. Done tile after tile, its
temporaries (the width of the MLP, float32 norms) are those of one tile, and so are those of the
backward pass, which keeps what goes in and computes the rest again. After TiledMLP of Arctic
Long Sequence Training (arXiv:2506.13996), which tiles the MLP and the loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mud_puppy.parallel import split_batch

Tree = Any


def over_tiles(tile: int | None, f: Callable[..., Tree], weights: Tree, *xs: Array) -> Tree:
    """f(weights, *xs) for an f that maps every token by itself; xs and results [B, T, ...].

    tile: the most tokens that a device takes at a time; None: all, and f is called as it is. Rows
    of one device lie one after another, so that nothing is copied where a tile divides them; else
    the last tile ends in zeros. A weight's dropout key is another one in each tile.
    """
    B, T = xs[0].shape[:2]
    devices = _devices(B)
    size = None if tile is None else tile_size(B // devices * T, tile)
    if size is None or size * devices == B * T:
        return f(weights, *xs)

    def body(_: None, step: Any) -> tuple[None, Tree]:
        i, own = step
        out = f(_with_keys_of(i, weights), *map(split_batch, own))
        return None, jax.tree.map(split_batch, out)

    cut = [_cut(x, devices, size) for x in xs]
    numbers = jnp.arange(cut[0].shape[0])
    # Inside of a loop there is nothing to merge the second forward pass with.
    out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, (numbers, cut))[1]
    return jax.tree.map(lambda x: split_batch(_whole(x, B, T)), out)


def tile_size(tokens: int, most: int) -> int:
    """Tokens of a tile: the largest divisor of `tokens` from most / 2 to `most`; without one, that
    of the least number of equal tiles, the last of which is filled up."""
    divisors = (size for size in range(min(most, tokens), most // 2, -1) if tokens % size == 0)
    return next(divisors, -(-tokens // -(-tokens // most)))


def _devices(B: int) -> int:
    """Devices of the ambient mesh, which share the batch if they divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or B % mesh.size else mesh.size


def _cut(x: Array, devices: int, size: int) -> Array:
    """[B, T, ...] -> [tiles, devices, size, ...], zeros after the last token."""
    x = x.reshape(devices, -1, *x.shape[2:])
    rest = -x.shape[1] % size
    if rest:
        x = jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(devices, -1, size, *x.shape[2:]), 1, 0)


def _whole(x: Array, B: int, T: int) -> Array:
    """[tiles, devices, size, ...] -> [B, T, ...]"""
    devices = x.shape[1]
    x = jnp.moveaxis(x, 0, 1).reshape(devices, -1, *x.shape[3:])
    return x[:, : B // devices * T].reshape(B, T, *x.shape[2:])


def _with_keys_of(i: Any, weights: Tree) -> Tree:
    """One key for all tiles would drop the same elements of each."""

    def own(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        folded = jax.vmap(lambda key: jax.random.fold_in(key, i))(x.reshape(-1))
        return folded.reshape(x.shape)  # experts have one each

    return jax.tree.map(own, weights)
