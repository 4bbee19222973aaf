"""Meshes and shardings."""

from mud_puppy.parallel.mesh import make_mesh, mesh_devices, mesh_sizes
from mud_puppy.parallel.rules import (
    BATCH,
    batch_devices,
    batch_sharding,
    like,
    replicated,
    shardings,
    split_batch,
    split_lookup,
    weight_sharding,
)

__all__ = [
    "BATCH",
    "batch_devices",
    "batch_sharding",
    "like",
    "make_mesh",
    "mesh_devices",
    "mesh_sizes",
    "replicated",
    "shardings",
    "split_batch",
    "split_lookup",
    "weight_sharding",
]
