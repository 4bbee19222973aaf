"""Findings of what stands between a program and a card: driver, device files, variables."""

from collections.abc import Mapping

from mud_puppy.doctor.facts import Facts
from mud_puppy.doctor.finding import Finding
from mud_puppy.doctor.nodes import Node
from mud_puppy.doctor.watch import Probe
from mud_puppy.rocm.targets import ARCHITECTURES

DOCKER = "docker run --device /dev/kfd --device /dev/dri"
AMD_HIDES = (
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "CUDA_VISIBLE_DEVICES",
    "JAX_ROCM_VISIBLE_DEVICES",
)
NVIDIA_HIDES = ("CUDA_VISIBLE_DEVICES", "JAX_CUDA_VISIBLE_DEVICES")
LOW_MEMLOCK = 64 * 1024**2


def nodes(facts: Facts) -> list[Finding]:
    """Device files that the user may not open."""
    closed = [n for n in facts.nodes if not n.usable and _matters(n, facts)]
    if not closed:
        return []
    where = ", ".join(f"{n.path} (mode {n.mode:04o}, group {n.group})" for n in closed)
    what = f"User {facts.user.name} may not open {_paths(closed)}."
    return [Finding("device-permission", what, where, _open(closed, facts))]


def _matters(node: Node, facts: Facts) -> bool:
    """The render nodes of other cards than AMD's (an Intel processor's) are not ours."""
    ours = {gpu.render_node for gpu in facts.amd_gpus}
    if node.path.startswith("/dev/dri/"):
        return not ours or node.path.rpartition("/")[2] in ours
    return True


def _open(closed: list[Node], facts: Facts) -> str:
    if any("nvidia" in n.path for n in closed):
        return "sudo chmod a+rw " + " ".join(n.path for n in closed)
    if facts.container:
        groups = " ".join(f"--group-add {gid}" for gid in sorted({n.gid for n in closed}))
        return f"start the container with: {DOCKER} {groups}"
    groups = sorted({n.group for n in closed if n.gid != 0}) or ["render", "video"]
    if set(groups) <= set(facts.wanted_groups):
        return f"log out and in again: {facts.user.name} is in {', '.join(groups)} since then"
    groups = sorted({*groups, "render", "video"})
    return f"sudo usermod -aG {','.join(groups)} $USER    then log out and in again"


def driver(facts: Facts) -> list[Finding]:
    """Cards on PCI whose driver is not there."""
    found = []
    if facts.amd_pci and facts.node("/dev/kfd") is None:
        if facts.container:
            fix = f"start the container with: {DOCKER}"
        elif facts.amdgpu:
            fix = "sudo dmesg | grep -i amdgpu    says why the driver does not serve the card"
        else:
            package = "linux-modules-extra-$(uname -r)"
            fix = f"sudo modprobe amdgpu    (not found: sudo apt install {package})"
        loaded = f"driver amdgpu: {facts.amdgpu or 'not loaded'}"
        what = "An AMD card is in the machine, and /dev/kfd is missing: its driver does not run."
        found.append(Finding("driver-missing", what, loaded, fix))
    if facts.nvidia_pci and not facts.nvidia:
        fix = "sudo ubuntu-drivers install    then restart"
        if facts.container:
            fix = "start the container with: docker run --gpus all"
        what = "An NVIDIA card is in the machine, and its driver does not run."
        found.append(Finding("driver-missing", what, "no /proc/driver/nvidia/version", fix))
    return found


def hidden(facts: Facts) -> list[Finding]:
    """Variables that hide cards from JAX."""
    found = [f for name in AMD_HIDES for f in _hides(name, facts.variables, len(facts.amd_gpus))]
    count = len(facts.nvidia_gpus)
    found += [f for name in NVIDIA_HIDES for f in _hides(name, facts.variables, count)]
    platforms = facts.variables.get("JAX_PLATFORMS", "").lower()
    wanted = {"rocm"} if facts.amd_gpus else set()
    wanted |= {"cuda"} if facts.nvidia else set()
    if platforms and wanted and not {*wanted, "gpu"} & set(platforms.split(",")):
        what = "JAX_PLATFORMS keeps JAX from the GPU."
        setting = f"JAX_PLATFORMS={platforms}"
        found.append(Finding("platform-excluded", what, setting, "unset JAX_PLATFORMS"))
    return list(dict.fromkeys(found))


def _hides(name: str, variables: Mapping[str, str], count: int) -> list[Finding]:
    if not count or name not in variables or variables[name] == "all":
        return []
    value = variables[name]
    seen = _selected(value, count)
    where = f"{name}={value!r}"
    if seen == 0:
        what = f"{name} hides {'the GPU' if count == 1 else f'all {count} GPUs'}."
        return [Finding("gpu-hidden", what, where, f"unset {name}")]
    if seen < count:
        what = f"{name} shows {seen} of {count} GPUs."
        return [Finding("gpus-hidden", what, where, f"unset {name}", "note")]
    return []


def _selected(value: str, count: int) -> int:
    """How many of `count` devices a list of numbers or UUIDs names. CUDA's rule, which HIP follows:
    the list ends at the first number that no device has."""
    seen = 0
    for word in (w.strip() for w in value.split(",")):
        named = word.lower().startswith(("gpu-", "mig-"))
        if not named and not (word.isdigit() and int(word) < count):
            break
        seen += 1
    return seen


def override(facts: Facts) -> list[Finding]:
    name = "HSA_OVERRIDE_GFX_VERSION"
    if not facts.variables.get(name) or not facts.amd_gpus:
        return []
    archs = ", ".join(dict.fromkeys(g.arch for g in facts.amd_gpus))
    what = f"{name} makes ROCm take this card ({archs}) for another: kernels are made for that one."
    where = f"{name}={facts.variables[name]}"
    known = all(g.arch in ARCHITECTURES for g in facts.amd_gpus)
    fix = f"unset {name}"
    fix += "" if known else "    (unless ROCm has no libraries for this card)"
    return [Finding("arch-overridden", what, where, fix, "warning")]


def mixed(facts: Facts) -> list[Finding]:
    """Cards of different architectures, as a processor's own graphics beside a Radeon: JAX takes
    all that it sees, and one program for all of them."""
    archs = [gpu.arch for gpu in facts.amd_gpus]
    if len(set(archs)) < 2 or set(AMD_HIDES) & set(facts.variables):
        return []
    sizes = [gpu.memory_bytes for gpu in facts.amd_gpus]
    best = archs[sizes.index(max(sizes))]
    keep = ",".join(str(i) for i, arch in enumerate(archs) if arch == best)
    what = "There are AMD cards of different kinds, and JAX would use them all."
    fix = f"export ROCR_VISIBLE_DEVICES={keep}    leaves {best}"
    return [Finding("mixed-cards", what, ", ".join(archs), fix, "warning")]


def locked_memory(facts: Facts, probe: Probe | None) -> list[Finding]:
    """A low limit of locked memory, where host memory was refused: else it hinders nothing."""
    limit = facts.memlock_bytes
    refused = probe is not None and any(c.problem for c in probe.of("pinned_host"))
    if limit is None or limit >= LOW_MEMLOCK or not refused:
        return []
    what = f"Only {limit / 1024**2:.0f} MiB of memory may be locked, which pinned memory may need."
    fix = "ulimit -l unlimited"
    if facts.container:
        fix = "start the container with: docker run --ulimit memlock=-1"
    return [Finding("locked-memory", what, "Max locked memory", fix, "warning")]


def _paths(closed: list[Node]) -> str:
    return " and ".join(n.path for n in closed)
