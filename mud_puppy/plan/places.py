"""Where a step may run: an AMD card by name, or the devices at hand; their memory and peaks."""

import os
from dataclasses import dataclass

import jax

from mud_puppy.errors import UserError
from mud_puppy.kernels import target
from mud_puppy.rocm import targets
from mud_puppy.rocm.settings import MEMORY_FRACTION

HERE = ("here", "cpu", "gpu")


@dataclass(frozen=True)
class Place:
    """`devices` equal devices. card: the AMD card that is compiled for without being here.

    limit: bytes on each device that a run may take. flops (dense bf16 matrix FLOP/s) and bandwidth
    (bytes/s) are of one device, the vendor's peaks; None where they are not known.
    """

    name: str
    devices: int
    memory: int
    limit: int
    flops: float | None
    bandwidth: float | None
    card: targets.Card | None = None


# Dense bf16 TFLOP/s and TB/s by JAX's device kind: NVIDIA's data sheets.
NVIDIA = {
    "NVIDIA H100 80GB HBM3": (989.4, 3.35),
    "NVIDIA H100 PCIe": (756.5, 2.0),
    "NVIDIA H200": (989.4, 4.8),
    "NVIDIA A100-SXM4-80GB": (312.0, 2.039),
    "NVIDIA A100-SXM4-40GB": (312.0, 1.555),
    "NVIDIA L40S": (362.0, 0.864),
    "NVIDIA GeForce RTX 4090": (165.2, 1.008),
    "NVIDIA GeForce RTX 3090": (71.0, 0.936),
}


def find_place(name: str | None, devices: int | None, memory_gib: float | None) -> Place:
    """The place called `name`: a card or architecture of `rocm.targets`, "cpu", "gpu", or "here"
    (None): the devices that JAX finds. memory_gib: what a run may take of each device's memory.

    Raises UserError for an unknown name, a platform that is not here, more devices than there are.
    """
    if name is None or name.lower() in HERE:
        return _here((name or "here").lower(), devices, memory_gib)
    card = targets.card(name)
    limit = _limit(memory_gib, card.memory_bytes, int(card.memory_bytes * MEMORY_FRACTION))
    label = f"{card.name} ({card.arch})"
    return Place(
        label, devices or 1, card.memory_bytes, limit, card.bf16_flops, card.bandwidth, card
    )


def _here(name: str, devices: int | None, memory_gib: float | None) -> Place:
    platform = _platform()
    if name != "here" and name != platform:
        raise UserError(
            f"--target {name}: JAX finds {platform} here, no {name}; `mud-puppy doctor` says why"
        )
    found = jax.local_devices()
    if devices and devices > len(found):
        raise UserError(f"--devices {devices}: {len(found)} are here; a card's name has no limit")
    first, count = found[0], devices or len(found)
    if platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
        limit = _limit(memory_gib, memory, int(memory * MEMORY_FRACTION))
        return Place("CPU", count, memory, limit, None, None)
    # What JAX's allocator gives out, which XLA_PYTHON_CLIENT_MEM_FRACTION sets.
    memory = (first.memory_stats() or {})["bytes_limit"]
    tflops, tb_s = _peaks(first.device_kind)
    name = f"{first.device_kind} ({target.current().arch})"
    return Place(name, count, memory, _limit(memory_gib, memory, memory), tflops, tb_s)


def _platform() -> str:
    """What JAX runs on here; UserError where it cannot start (JAX_PLATFORMS, a driver)."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as problem:  # the latter is all that JAX says of "cuda"
        said = str(problem) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} is not here"
        raise UserError(f"JAX does not start: {said}; `mud-puppy doctor` says why") from problem


def _peaks(kind: str) -> tuple[float | None, float | None]:
    if kind in NVIDIA:
        tflops, tb_s = NVIDIA[kind]
        return tflops * 1e12, tb_s * 1e12
    if target.current().platform == "rocm":
        known = [c for c in targets.CARDS if c.name.lower() in kind.lower()]
        known = known or [targets.card(target.current().arch)]
        return known[0].bf16_flops, known[0].bandwidth
    return None, None


def _limit(memory_gib: float | None, memory: int, usual: int) -> int:
    if memory_gib is None:
        return usual
    if memory_gib * 2**30 > memory:
        raise UserError(
            f"--memory-gib {memory_gib:g}: the device has {memory / 2**30:.1f} GiB; give less"
        )
    return int(memory_gib * 2**30)
