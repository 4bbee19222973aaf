"""Settings for AMD cards, made when mud_puppy is imported: on ROCm only, and only what is unset.

XLA, HIP and RCCL read them once, when JAX starts the card, so they are made at import and from
files alone; nothing here imports JAX. `mud-puppy doctor` prints `record()`. FLAGS and `options` are
XLA's part, which the compiler without a card (`compile`) gets too, and MEMORY_FRACTION what a plan
may fill.

None of it was timed on an AMD card by us. Each row names who recommends it; that both plugins
(0.10.2 and 0.11.2) know the flags is tested (tests/rocm/test_settings.py).
"""

import logging
import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mud_puppy.rocm import kfd

MEMORY_FRACTION = 0.95
MI300 = ("gfx942", "gfx950")
NOT_MI200 = ("gfx1100", "gfx1101", "gfx1151", "gfx1201", *MI300)
PLUGIN = "jax_plugins/xla_rocm*"  # of the wheels jax-rocm7-pjrt and their predecessors
NO_CARD = "No AMD GPUs were found"  # what the plugin's check raises
DEVICES = ("dev/kfd", "dev/dxg")  # Linux; Windows' subsystem for Linux

AMD_JAX = "https://rocm.docs.amd.com/en/7.13.0-preview/frameworks/jax/install.html"
AMD_TRAINING = "https://github.com/AMD-AGI/axlearn/blob/main/launch_70B_multi_nodes.sh"
AMD_MI300X = (
    "https://rocm.docs.amd.com/en/latest/how-to/rocm-for-ai/inference-optimization/workload.html"
)
JAX_MEMORY = "https://docs.jax.dev/en/latest/gpu_memory_allocation.html"
XLA_BLAS = "https://github.com/openxla/xla/blob/main/xla/stream_executor/gpu/gpu_blas_lt.cc"

State = Literal["set", "yours", "other card", "left"]


@dataclass(frozen=True)
class Setting:
    """An environment variable, or a flag of XLA_FLAGS ("--..."). value None: left as it is, and
    `reason` says why. archs: the cards that it is for; empty: all. aliases: other names that a user
    may have set it by."""

    name: str
    value: str | None
    reason: str
    source: str
    archs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


SETTINGS = (
    Setting(
        "XLA_PYTHON_CLIENT_PREALLOCATE",
        "false",
        "a desktop's card is shared with its screen: take memory as it is needed, not 75 % at the "
        "start. With the next row it stands for the PYTORCH_HIP_ALLOC_CONF of PyTorch programs, "
        "which XLA does not read: it plans a step's memory when it compiles. 'true' fragments less "
        "on a card without a screen",
        JAX_MEMORY,
    ),
    Setting(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        str(MEMORY_FRACTION),
        "JAX stops at 0.75 of the card and leaves 6 of 24 GB unused",
        JAX_MEMORY,
        aliases=("XLA_CLIENT_MEM_FRACTION",),  # JAX refuses to start when it finds both
    ),
    Setting(
        "--xla_gpu_enable_command_buffer",
        "",
        "no HIP graphs: replaying them crashes (gfx1100, gfx950), and AMD says to turn them off",
        f"{AMD_JAX}, https://github.com/openxla/xla/issues/46952",
    ),
    Setting(
        "--xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "copies between cards, and to the host, run while the card computes",
        AMD_TRAINING,
    ),
    Setting(
        "--xla_gpu_enable_triton_gemm",
        "false",
        "matrix products by AMD's tuned libraries: the other choice is not tuned for AMD, and "
        "Triton has miscompiled for gfx1100 (AOTriton 0.11). Our own kernels are not touched by "
        "it, and each is checked before its first use. Not for gfx90a: there XLA's compiler finds "
        "products that its hipBLASLt does not serve, and stops",
        f"{AMD_TRAINING}, https://github.com/ROCm/TheRock/issues/1315",
        NOT_MI200,
    ),
    Setting(
        "--xla_gpu_enable_cublaslt",
        "true",
        "hipBLASLt, under the name that XLA gives it, before rocBLAS",
        AMD_TRAINING,
    ),
    Setting(
        "JAX_DEFAULT_MATMUL_PRECISION",
        None,
        "float32 products are float32 on AMD already: XLA asks for xf32 of neither gfx942 nor any "
        "other by itself. 'highest' changes nothing there, and an xf32 algorithm by name widens "
        "bfloat16 products too and is refused on gfx1100",
        f"{XLA_BLAS}, https://github.com/openxla/xla/pull/46177, and compiling each for gfx942",
    ),
    Setting(
        "GPU_MAX_HW_QUEUES",
        "2",
        "two queues to compute and two for RCCL: the hardware does best with four or fewer",
        f"{AMD_MI300X}, {AMD_TRAINING}",
        MI300,
    ),
    Setting(
        "HIP_FORCE_DEV_KERNARG",
        "1",
        "kernels' arguments lie on the card, which AMD says makes launches shorter",
        f"{AMD_MI300X}, {AMD_TRAINING}",
        MI300,
    ),
    Setting(
        "HSA_FORCE_FINE_GRAIN_PCIE",
        "1",
        "cards read each other's memory over PCIe (RCCL)",
        f"https://rocm.docs.amd.com/projects/rccl/en/latest/how-to/rccl-usage-tips.html, "
        f"{AMD_TRAINING}",
        MI300,
    ),
    Setting(
        "NCCL_MIN_NCHANNELS",
        "112",
        "more channels for RCCL in whole workloads",
        AMD_MI300X,
        MI300,
    ),
)

FLAGS = tuple(f"{s.name}={s.value}" for s in SETTINGS if s.name.startswith("--") and not s.archs)


def options(arch: str) -> dict[str, bool]:
    """XLA's switches that are set for this architecture and not for all (FLAGS)."""
    return {
        s.name.removeprefix("--"): s.value == "true"
        for s in SETTINGS
        if s.name.startswith("--") and s.value is not None and arch in s.archs
    }


@dataclass(frozen=True)
class Outcome:
    """What became of a setting; `value` is what holds now, or would on a card that it is for."""

    setting: Setting
    state: State
    value: str | None


@dataclass(frozen=True)
class Record:
    """What was done at import. missing: why nothing was, empty where the settings were made."""

    missing: str
    archs: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()


_record = Record("mud_puppy was not imported yet")


def record() -> Record:
    """What `at_import` did in this process."""
    return _record


def at_import() -> None:
    """Makes the settings in this process's environment, where it is on ROCm."""
    global _record
    logging.getLogger("jax._src.xla_bridge").addFilter(_in_one_line)
    _record = apply(os.environ)


def _in_one_line(record: logging.LogRecord) -> bool:
    """JAX's traceback of a ROCm plugin that finds no card, as a line."""
    if record.exc_info and NO_CARD in str(record.exc_info[1]):
        record.msg, record.args = f"{NO_CARD}; mud-puppy doctor says why", ()
        record.exc_info = record.exc_text = None
    return True


def apply(
    environ: MutableMapping[str, str],
    root: Path = Path("/"),
    path: Sequence[str] | None = None,
    started: bool | None = None,
) -> Record:
    """Makes the settings in `environ`. root: the file system; path: where Python looks for
    packages; started: whether JAX has begun to use its devices, None: look."""
    missing = why_not(environ, root, sys.path if path is None else path)
    if missing:
        return Record(missing)
    archs = tuple(dict.fromkeys(gpu.arch for gpu in kfd.gpus(root)))
    if _started() if started is None else started:
        late = (
            "JAX was started before mud_puppy was imported, too late for the settings for AMD "
            "cards: import mud_puppy first"
        )
        logging.getLogger("mud_puppy").warning(late)
        return Record(late, archs)
    outcomes = decide(environ, archs)
    flags = [f"{o.setting.name}={o.value}" for o in outcomes if o.state == "set" and _is_flag(o)]
    environ.update({o.setting.name: o.value or "" for o in _made(outcomes)})
    if flags:
        environ["XLA_FLAGS"] = " ".join([environ.get("XLA_FLAGS", ""), *flags]).strip()
    return Record("", archs, outcomes)


def why_not(environ: Mapping[str, str], root: Path, path: Iterable[str]) -> str:
    """Why JAX cannot use an AMD card here, judged by files alone; empty where it may."""
    if not any((root / device).exists() for device in DEVICES):
        return "no AMD driver (/dev/kfd)"
    if not any(next(Path(p).glob(PLUGIN), None) for p in path if p):
        return "JAX's ROCm plugin is not installed"
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"rocm", "gpu"} & set(platforms.lower().split(",")):
        return f"JAX_PLATFORMS={platforms} excludes it"
    return ""


def decide(environ: Mapping[str, str], archs: Iterable[str]) -> tuple[Outcome, ...]:
    """What each setting becomes on these cards, given what the user has set."""
    flags = user_flags(environ.get("XLA_FLAGS", ""))
    return tuple(_decide(s, environ, flags, tuple(archs)) for s in SETTINGS)


def user_flags(text: str) -> Mapping[str, str] | None:
    """XLA_FLAGS as name -> value; None where it names a file of flags, which is not added to."""
    words = text.split()
    if words and not words[0].startswith("-"):
        return None
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def _decide(
    setting: Setting,
    environ: Mapping[str, str],
    flags: Mapping[str, str] | None,
    archs: tuple[str, ...],
) -> Outcome:
    if setting.name.startswith("--"):
        if flags is None:
            return Outcome(setting, "yours", f"in the file {environ['XLA_FLAGS']}")
        theirs = flags.get(setting.name)
    else:
        given = (environ.get(name) for name in (setting.name, *setting.aliases))
        theirs = next((value for value in given if value is not None), None)
    if theirs is not None:
        return Outcome(setting, "yours", theirs)
    if setting.value is None:
        return Outcome(setting, "left", None)
    if setting.archs and not set(setting.archs) & set(archs):
        return Outcome(setting, "other card", setting.value)
    return Outcome(setting, "set", setting.value)


def _made(outcomes: Iterable[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if o.state == "set" and not _is_flag(o)]


def _is_flag(outcome: Outcome) -> bool:
    return outcome.setting.name.startswith("--")


def _started() -> bool:
    """Whether JAX, where it was imported, has started a device."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(bridge and bridge.backends_are_initialized())
