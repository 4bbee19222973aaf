"""What is installed and what the machine has, read from files and the environment alone.

No JAX, no ROCm and no vendor's tool is needed, so that it can be told where they do not work.
`gather(root)` reads any tree laid out as a Linux machine is, which is how faults are planted.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mud_puppy
from mud_puppy.doctor.nodes import Node, User, device_nodes, groups_named, this_user
from mud_puppy.errors import UserError
from mud_puppy.rocm import kfd, plugin

VARIABLES = (
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "CUDA_VISIBLE_DEVICES",
    "JAX_ROCM_VISIBLE_DEVICES",
    "JAX_CUDA_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "JAX_PLATFORMS",
    "JAX_PLATFORM_NAME",
    "XLA_FLAGS",
    "MUD_PUPPY_ROCM",
)
LOADER = "LD_LIBRARY_PATH"  # told only where it leads to ROCm or CUDA
PACKAGE = re.compile(
    r"(mud_puppy|jax(?:lib|_(?:rocm|cuda)\d+_(?:plugin|pjrt))?|rocm_sdk_core)-(.+)"
)
AMD, NVIDIA = "0x1002", "0x10de"
GPU_CLASSES = ("0x03", "0x12")  # displays; accelerators, as an MI300X is


@dataclass(frozen=True)
class Facts:
    """versions: of Python packages, "_" for "-". pci: how many GPUs of AMD and NVIDIA are plugged
    in. memlock_bytes: what may be locked, None for no limit. plan_plugin: the plugin that compiles
    for cards which are not here, or plan_fault: why there is none, and plan_command: what installs
    it."""

    python: str
    kernel: str
    user: User
    wanted_groups: tuple[str, ...]  # that /etc/group has the user in
    container: bool
    versions: Mapping[str, str]
    rocm: str
    amdgpu: str
    amd_gpus: tuple[kfd.Gpu, ...]
    amd_pci: int
    nodes: tuple[Node, ...]
    nvidia: str
    nvidia_gpus: tuple[str, ...]
    nvidia_pci: int
    variables: Mapping[str, str]
    memory_bytes: int
    memlock_bytes: int | None
    cache: str
    cache_free_bytes: int
    plan_plugin: str
    plan_fault: str
    plan_command: str

    def node(self, name: str) -> Node | None:
        return next((n for n in self.nodes if n.path == name), None)


def gather(
    root: Path = Path("/"),
    environ: Mapping[str, str] = os.environ,
    user: User | None = None,
    path: Sequence[str] | None = None,
) -> Facts:
    """The facts of the machine at `root`. path: where Python looks for packages."""
    user = user or this_user()
    path = sys.path if path is None else path
    cache = _cache(environ)
    plan_plugin, plan_fault = _plan_plugin(environ)
    return Facts(
        python=platform.python_version(),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
        user=user,
        wanted_groups=groups_named(root, user.name),
        container=any((root / p).exists() for p in (".dockerenv", "run/.containerenv")),
        versions={"mud_puppy": mud_puppy.__version__, **_versions(path)},
        rocm=_rocm(root, environ),
        amdgpu=_driver(root),
        amd_gpus=kfd.gpus(root),
        amd_pci=_on_pci(root, AMD),
        nodes=device_nodes(root, user),
        nvidia=_nvidia(root),
        nvidia_gpus=_nvidia_gpus(root),
        nvidia_pci=_on_pci(root, NVIDIA),
        variables=_variables(environ),
        memory_bytes=_memory(root),
        memlock_bytes=_memlock(root),
        cache=cache,
        cache_free_bytes=_free(Path(cache)),
        plan_plugin=plan_plugin,
        plan_fault=plan_fault,
        plan_command=plugin.command(environ.get(plugin.VARIABLE)),
    )


def _versions(path: Sequence[str]) -> dict[str, str]:
    """Of the packages that matter, each where Python finds it first."""
    found: dict[str, str] = {}
    for folder in filter(None, path):
        for info in sorted(Path(folder).glob("*.dist-info")):
            if match := PACKAGE.fullmatch(info.name.removesuffix(".dist-info")):
                found.setdefault(match[1], match[2])
    return found


def _rocm(root: Path, environ: Mapping[str, str]) -> str:
    places = [root / "opt/rocm"]
    if named := environ.get("ROCM_PATH"):
        places.insert(0, Path(named))
    return next((v for p in places if (v := _text(p / ".info/version"))), "")


def _driver(root: Path) -> str:
    module = root / "sys/module/amdgpu"
    if not module.exists():
        return ""
    return _text(module / "version") or "of the kernel"


def _on_pci(root: Path, vendor: str) -> int:
    devices = (root / "sys/bus/pci/devices").glob("*")
    return sum(
        _text(d / "vendor") == vendor and _text(d / "class").startswith(GPU_CLASSES)
        for d in devices
    )


def _nvidia(root: Path) -> str:
    text = _text(root / "proc/driver/nvidia/version")
    found = re.search(r"Module.*?\s(\d+\.\d[\d.]*)", text)
    return found[1] if found else text.splitlines()[0] if text else ""


def _nvidia_gpus(root: Path) -> tuple[str, ...]:
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    models = (re.search(r"Model:\s*(.+)", _text(f)) for f in files)
    return tuple(m[1].strip() for m in models if m)


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    found = {name: environ[name] for name in VARIABLES if name in environ}
    if re.search("rocm|cuda|nvidia", environ.get(LOADER, ""), re.IGNORECASE):
        found[LOADER] = environ[LOADER]
    return found


def _memory(root: Path) -> int:
    found = re.search(r"MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"))
    return int(found[1]) * 1024 if found else 0


def _memlock(root: Path) -> int | None:
    found = re.search(r"Max locked memory\s+(\d+)", _text(root / "proc/self/limits"))
    return int(found[1]) if found else None


def _cache(environ: Mapping[str, str]) -> str:
    """Where compiled steps are kept, as train.py decides it."""
    if named := environ.get("JAX_COMPILATION_CACHE_DIR"):
        return named
    home = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return str(Path(home) / "mud_puppy" / "xla")


def _free(folder: Path) -> int:
    # os.path: what lies in a folder that we may not look into is not there for us.
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.exists(p))
    return shutil.disk_usage(there).free


def _plan_plugin(environ: Mapping[str, str]) -> tuple[str, str]:
    named = environ.get(plugin.VARIABLE)
    try:
        return str(plugin.find(Path(named) if named else None).parents[2]), ""
    except UserError as fault:
        return "", str(fault)


def _text(path: Path) -> str:
    """A file's text, empty where there is none or it may not be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
