"""Plain XLA: a scan over the experts, and within it a loop over the tiles of the expert's rows.

One expert's weight is sliced (or decoded) at a time. `jax.lax.ragged_dot` is not used: on GPUs XLA
expands it to all experts (docs/kernels.md). The inner loop's length is only known on the device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels.formats import Quantized, dequantize
from mud_puppy.kernels.matmul import exact

MAX_ROWS = 1024  # of a tile


def grouped(x: Any, w: Any, sizes: Any, transpose: bool = False) -> Any:
    """Rows of x times their expert's weight [out, in].T (or, transposed, [out, in])."""
    dims = (((1,), (0 if transpose else 1,)), ((), ()))
    width = w.shape[2 if transpose else 1]
    tile, M, x = _tiled(x, w)

    def expert(out: Any, args: Any) -> Any:
        weight, first, size = args
        weight = _dense(weight, x.dtype)

        def step(out: Any, start: Any, new: Any) -> Any:
            rows = jax.lax.dynamic_slice_in_dim(x, start, tile)
            y = _dot(rows, weight, dims)
            old = jax.lax.dynamic_slice_in_dim(out, start, tile)
            y = jnp.where(new[:, None], y.astype(x.dtype), old)
            return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

        return _over_tiles(step, out, first, size, tile, len(x)), None

    out = jnp.broadcast_to(jnp.zeros_like(x[:, :1]), (len(x), width))
    return jax.lax.scan(expert, out, (w, jnp.cumsum(sizes) - sizes, sizes))[0][:M]


def weight_gradient(x: Any, dy: Any, w: Any, sizes: Any) -> Any:
    """[E, out, in] in w's dtype: each expert's dy.T @ x, summed in float32."""
    tile, _, x = _tiled(x, w)
    dy = jnp.pad(dy, [(0, len(x) - len(dy)), (0, 0)])

    def expert(_: Any, args: Any) -> Any:
        first, size = args

        def step(total: Any, start: Any, new: Any) -> Any:
            a, b = (jax.lax.dynamic_slice_in_dim(z, start, tile) for z in (dy, x))
            a = jnp.where(new[:, None], a, 0)
            dims = (((0,), (0,)), ((), ()))
            return total + _dot(a, b, dims)

        total = jnp.zeros_like(w[0], jnp.float32)
        return None, _over_tiles(step, total, first, size, tile, len(x)).astype(w.dtype)

    return jax.lax.scan(expert, None, (jnp.cumsum(sizes) - sizes, sizes))[1]


def _over_tiles(step: Callable, carry: Any, first: Any, size: Any, tile: int, M: int) -> Any:
    """carry = step(carry, start, which rows are this tile's) over the tiles of `size` rows.

    A tile that would end after M starts earlier; the rows before it are not its own.
    """

    def body(i: Any, carry: Any) -> Any:
        own = first + i * tile
        start = jnp.minimum(own, M - tile)
        row = start + jnp.arange(tile)
        return step(carry, start, (row >= own) & (row < first + size))

    return jax.lax.fori_loop(0, (size + tile - 1) // tile, body, carry)


def _tiled(x: Any, w: Any) -> tuple[int, int, Any]:
    """(rows of a tile: a power of two near the mean group, M, x with a tile's rows at least)."""
    mean = max(1, len(x) // w.shape[0])
    tile = min(MAX_ROWS, max(16, 1 << (mean - 1).bit_length()))
    return tile, len(x), jnp.pad(x, [(0, max(0, tile - len(x))), (0, 0)])


def _dense(weight: Any, dtype: Any) -> Any:
    return dequantize(weight, dtype) if isinstance(weight, Quantized) else weight.astype(dtype)


def _dot(a: Any, b: Any, dims: Any) -> Any:
    return jax.lax.dot_general(
        a, b, dims, precision=exact(a.dtype), preferred_element_type=jnp.float32
    )
