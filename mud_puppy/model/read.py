"""One leaf from disk: host buffers for its shards, filled a block of rows at a time.

A stored tensor is read once, however many devices hold parts of it. On CPU the buffers become the
arrays; on an accelerator they are copied over and freed, leaf by leaf.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mud_puppy.errors import UserError
from mud_puppy.model.tensors import Stored, check_float

Bounds = tuple[slice, ...]

_BLOCK_BYTES = 16 * 2**20
_ALIGN = 64  # what XLA asks of a host buffer that it uses without a copy


def read_leaf(
    parts: Sequence[Stored],
    shape: tuple[int, ...],
    dtype: str | None,
    sharding: NamedSharding | None,
) -> jax.Array:
    """A leaf [n, ...] from its n layers' tensors ([n, E, ...]: those of each expert, layer after
    layer), or [...] from one; dtype None: as stored."""
    for part in parts:
        check_float(part)
    kind = np.dtype(dtype or reduce(jnp.promote_types, [part.dtype for part in parts]))
    if sharding is None:
        everything = tuple(slice(0, size) for size in shape)
        _check_room(parts, [everything], kind)
        buffer = _allocate(everything, kind)
        _fill_layers(parts, [(everything, buffer)], shape)
        return jax.device_put(buffer).block_until_ready()
    indices = sharding.addressable_devices_indices_map(shape)
    places = {device: _bounds(index or (), shape) for device, index in indices.items()}
    _check_room(parts, {str(at): at for at in places.values()}.values(), kind)
    shards = {str(at): (at, _allocate(at, kind)) for at in places.values()}
    _fill_layers(parts, list(shards.values()), shape)
    arrays = [jax.device_put(shards[str(at)][1], device) for device, at in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays).block_until_ready()


def blocks(part: Stored) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a tensor, a few megabytes at a time; the buffer is used again."""
    rows = part.shape[0]
    row_bytes = max(1, prod(part.shape[1:]) * part.dtype.itemsize)
    step = max(1, min(rows, _BLOCK_BYTES // row_bytes))
    scratch = np.empty((step, *part.shape[1:]), part.dtype)
    for a in range(0, rows, step):
        block = scratch[: min(step, rows - a)]
        part.read(a, a + len(block), block)
        yield a, block


def whole(part: Stored) -> np.ndarray:
    """All of a (small) tensor."""
    out = np.empty(part.shape, part.dtype)
    part.read(0, part.shape[0] if part.shape else 1, out)
    return out


def _fill_layers(
    parts: Sequence[Stored], shards: list[tuple[Bounds, np.ndarray]], shape: tuple[int, ...]
) -> None:
    """Reads every part into the shards (bounds in the leaf, buffer) that hold some of it."""
    lead = len(shape) - len(parts[0].shape)
    for place, part in zip(np.ndindex(shape[:lead]), parts, strict=True):
        held = []
        for at, buffer in shards:
            if all(s.start <= i < s.stop for i, s in zip(place, at, strict=False)):
                inner = tuple(i - s.start for i, s in zip(place, at, strict=False))
                held.append((at[lead:], buffer[inner]))
        _fill(part, held)


def _fill(part: Stored, shards: list[tuple[Bounds, np.ndarray]]) -> None:
    if [(buffer.shape, buffer.dtype) for _, buffer in shards] == [(part.shape, part.dtype)]:
        part.read(0, part.shape[0], shards[0][1])
        return
    for a, block in blocks(part):
        for (rows, *columns), buffer in shards:
            first, last = max(a, rows.start), min(a + len(block), rows.stop)
            if first < last:
                taken = block[(slice(first - a, last - a), *columns)]
                buffer[first - rows.start : last - rows.start] = taken


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(slice(*s.indices(size)) for s, size in zip(index, shape, strict=True))


def _check_room(parts: Sequence[Stored], shards: Iterable[Bounds], dtype: np.dtype) -> None:
    """A file with holes can hold any size on a small disk, and memory is given before it is there:
    asked for too much, the kernel ends the process instead of refusing."""
    needed = sum(prod(_shape(at)) * dtype.itemsize for at in shards)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"{parts[0].where} and those stacked with it take {needed / 1e9:.0f} GB, this machine "
            f"has {there / 1e9:.0f} GB of memory; is the file what it should be?"
        )


def _shape(at: Bounds) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in at)


def _allocate(at: Bounds, dtype: np.dtype) -> np.ndarray:
    """An uninitialised host array that XLA takes over as it is."""
    shape = _shape(at)
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)
