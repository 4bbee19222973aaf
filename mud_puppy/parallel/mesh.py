"""The device mesh: axes `data` (copies of the model) and `fsdp` (one model, split between devices).

Both split the batch. Axes are Auto: arrays carry shardings, XLA inserts the collectives.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mud_puppy.errors import UserError

AXES = ("data", "fsdp")


def make_mesh(spec: str | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from "data=2,fsdp=4". None: every device on fsdp. -1: the devices left over.

    devices: those to take, None for all that JAX finds.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(spec, len(devices))
    grid = np.array(devices[: math.prod(sizes)], object).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_sizes(spec: str | None, count: int) -> tuple[int, int]:
    """The sizes of AXES that `make_mesh` makes of `count` devices."""
    sizes = {"data": 1, "fsdp": -1} if spec is None else _parse(spec)
    given = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: count // given if size < 0 else size for axis, size in sizes.items()}
    used = math.prod(sizes.values())
    if used > count or used == 0:
        raise UserError(
            f"mesh '{spec}' needs {max(used, given)} devices, {count} are here; make it smaller"
        )
    return sizes["data"], sizes["fsdp"]


def mesh_devices(spec: str | None) -> int:
    """How many devices a spec names, "the devices left over" being one."""
    sizes = {} if spec is None else _parse(spec)
    return math.prod(size for size in sizes.values() if size > 0)


def _parse(spec: str) -> dict[str, int]:
    sizes = {"data": 1, "fsdp": 1}
    for part in spec.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in sizes or not size.strip().lstrip("-").isdigit():
            raise UserError(f"mesh '{spec}': expected e.g. 'data=2,fsdp=4' (axes data and fsdp)")
        value = int(size)
        if value == 0 or value < -1:
            raise UserError(f"mesh '{spec}': an axis has at least 1 device, or -1 for the rest")
        sizes[axis.strip()] = value
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh '{spec}': only one axis can be -1")
    return sizes
