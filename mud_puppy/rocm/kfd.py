"""The AMD GPUs of this machine as the kernel's driver lists them: no ROCm, no JAX, no tool.

Source: /sys/class/kfd/kfd/topology of the driver amdgpu (drivers/gpu/drm/amd/amdkfd/kfd_topology.c
in Linux). JAX counts GPUs there as well, by the same sign: a node with SIMDs is one.
"""

from dataclasses import dataclass
from pathlib import Path

NODES = "sys/class/kfd/kfd/topology/nodes"
VIDEO_HEAPS = ("1", "2")  # memory of the card: HSA_HEAPTYPE_FRAME_BUFFER_PUBLIC, ..._PRIVATE


@dataclass(frozen=True)
class Gpu:
    """One GPU; `render_node` is its file under /dev/dri, empty where the driver names none."""

    arch: str  # "gfx1100"
    memory_bytes: int
    render_node: str


def gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """In the driver's order. What a container does not let us read is not listed."""
    nodes = [p for p in (root / NODES).glob("*") if p.name.isdigit()]
    found = (_gpu(node) for node in sorted(nodes, key=lambda p: int(p.name)))
    return tuple(gpu for gpu in found if gpu)


def arch(version: int) -> str:
    """gfx_target_version -> name: 110000 -> gfx1100, 90010 -> gfx90a, 90402 -> gfx942."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _gpu(node: Path) -> Gpu | None:
    of_node = _properties(node / "properties")
    version = int(of_node.get("gfx_target_version", 0))
    if not version or not int(of_node.get("simd_count", 0)):
        return None  # a CPU
    banks = [_properties(path) for path in (node / "mem_banks").glob("*/properties")]
    sizes = [int(b.get("size_in_bytes", 0)) for b in banks if b.get("heap_type") in VIDEO_HEAPS]
    minor = of_node.get("drm_render_minor", "0")
    return Gpu(arch(version), sum(sizes), f"renderD{minor}" if minor != "0" else "")


def _properties(path: Path) -> dict[str, str]:
    """Lines of a name and a number; empty where the kernel refuses to show them."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {words[0]: words[1] for words in map(str.split, lines) if len(words) == 2}
