"""What a kernel binary (.hsaco) says of its kernels: registers, spills, LDS, waves that fit.

The compiler writes these figures into an ELF note as MessagePack
(https://llvm.org/docs/AMDGPUUsage.html#code-object-metadata); the code itself is read by
`instructions`.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mud_puppy.rocm import elf
from mud_puppy.rocm.targets import ARCHITECTURES, Architecture

METADATA = 32  # NT_AMDGPU_METADATA


@dataclass(frozen=True)
class KernelBinary:
    """One kernel as compiled. Registers are per lane; `vgprs` counts AGPRs too where they share."""

    name: str
    arch: str
    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    lds_bytes: int  # declared; a launch may ask for more
    scratch_bytes: int  # of a lane
    wave_size: int
    max_threads: int  # of a block
    code: bytes

    def waves_per_simd(self, threads: int, dynamic_lds_bytes: int = 0) -> int:
        """How many waves share a SIMD, given the registers and the LDS that a block takes."""
        lds = self.lds_bytes + dynamic_lds_bytes
        return occupancy(ARCHITECTURES[self.arch], self.vgprs, threads, lds)


def read(path: Path | str) -> list[KernelBinary]:
    """The kernels of a .hsaco file. Raises ValueError where it is none, or damaged."""
    try:
        return _read(path)
    except (*elf.DAMAGE, LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is damaged: {problem!r}") from problem


def _read(path: Path | str) -> list[KernelBinary]:
    file = elf.read(path)
    metadata = [unpack(data) for owner, kind, data in file.notes() if kind == METADATA]
    if not metadata:
        raise ValueError(f"{path} has no AMDGPU metadata")
    symbols = {s.name: s for s in file.symbols()}
    arch = metadata[0]["amdhsa.target"].split("-")[-1].split(":")[0]
    kernels = metadata[0].get("amdhsa.kernels", [])
    return [_kernel(row, arch, _code(file, symbols[row[".name"]])) for row in kernels]


def _kernel(row: dict[str, Any], arch: str, code: bytes) -> KernelBinary:
    return KernelBinary(
        name=row[".name"],
        arch=arch,
        vgprs=row[".vgpr_count"],
        agprs=row.get(".agpr_count", 0),
        sgprs=row[".sgpr_count"],
        vgpr_spills=row.get(".vgpr_spill_count", 0),
        sgpr_spills=row.get(".sgpr_spill_count", 0),
        lds_bytes=row[".group_segment_fixed_size"],
        scratch_bytes=row[".private_segment_fixed_size"],
        wave_size=row[".wavefront_size"],
        max_threads=row[".max_flat_workgroup_size"],
        code=code,
    )


def _code(file: elf.Elf, symbol: elf.Symbol) -> bytes:
    section = file.sections[symbol.section]
    start = section.offset + symbol.address - section.address
    return bytes(file.data[start : start + symbol.size])


def occupancy(arch: Architecture, vgprs: int, threads: int, lds_bytes: int) -> int:
    """Waves on a SIMD when a compute unit is filled with blocks of `threads`; 0: none fits.

    RDNA pairs compute units, and a block may spread over both; half of two is the same.
    """
    step = arch.register_step
    taken = max(step, -(-vgprs // step) * step)
    by_registers = min(arch.max_waves_per_simd, arch.registers_per_lane // taken)
    waves = -(-threads // arch.wave_size)
    pair = 2 if arch.wave_size == 32 else 1
    simds = arch.simds_per_cu * pair
    blocks = by_registers * simds // waves
    if lds_bytes:
        lds = -(-lds_bytes // arch.lds_step_bytes) * arch.lds_step_bytes
        blocks = min(blocks, arch.lds_bytes_per_cu * pair // lds)
    return -(-blocks * waves // simds)


def unpack(data: bytes) -> Any:
    """MessagePack -> Python values; the types that code objects use (no extensions)."""
    return _unpack(data, 0)[0]


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    tag, at = data[at], at + 1
    if tag < 0x80:
        return tag, at
    if tag >= 0xE0:
        return tag - 256, at
    if tag < 0x90:
        return _map(data, at, tag & 15)
    if tag < 0xA0:
        return _array(data, at, tag & 15)
    if tag < 0xC0:
        return data[at : at + (tag & 31)].decode(), at + (tag & 31)
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at
    if tag not in _SIZED:
        raise ValueError(f"MessagePack type {tag:#x} is not known here")
    kind, form = _SIZED[tag]
    (value,), at = struct.unpack_from(form, data, at), at + struct.calcsize(form)
    if kind == "map":
        return _map(data, at, value)
    if kind == "array":
        return _array(data, at, value)
    if kind == "text":
        return data[at : at + value].decode(), at + value
    if kind == "bytes":
        return data[at : at + value], at + value
    return value, at


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_SIZED = {
    0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
    0xCA: ("number", ">f"), 0xCB: ("number", ">d"),
    0xCC: ("number", ">B"), 0xCD: ("number", ">H"), 0xCE: ("number", ">I"), 0xCF: ("number", ">Q"),
    0xD0: ("number", ">b"), 0xD1: ("number", ">h"), 0xD2: ("number", ">i"), 0xD3: ("number", ">q"),
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
    0xDC: ("array", ">H"), 0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip


def _array(data: bytes, at: int, count: int) -> tuple[list, int]:
    values = []
    for _ in range(count):
        value, at = _unpack(data, at)
        values.append(value)
    return values, at


def _map(data: bytes, at: int, count: int) -> tuple[dict, int]:
    flat, at = _array(data, at, 2 * count)
    return dict(zip(flat[::2], flat[1::2], strict=True)), at
