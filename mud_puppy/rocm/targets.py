"""AMD cards by name: what the compiler and an estimate need to know of each.

`card("gfx1100")`, `card("RX 7900 XTX")` and `card("mi300x")` find one; `target_config(card)` is
the description that XLA compiles for. Figures are the vendor's peaks, not measurements.

Held against their sources on 2026-11-22, where all agreed:

- compute units, memory, LDS, L2, wave sizes, register files: AMD's table of GPU specifications
  (`SPECS`), whose LDS (128 KiB) and registers (768 KiB) of a Radeon are those of two units.
- products of a compute unit in a clock, in bf16: AMD's pages on RDNA4 (`RDNA4`; 512 on RDNA3, 1024
  on RDNA4), MI250 (1024, 1.7 GHz, 1.6 TB/s a die) and MI300 (2048, 1307.4 TFLOP/s, 5.3 TB/s). A
  card's peak is that number x units x clock, which a test checks.
- registers, their steps, waves of a SIMD: what LLVM 22 says of kernels compiled for each. It counts
  waves without regard to whole blocks, which `binary.occupancy` does not.
- the step of LDS: LLVM's encoding of it; of gfx950 LLVM's sources say 1,280 bytes (a 128th of the
  whole, as on the others) where its assembly printer rounds to 2,048.
- fp8: fnuz of gfx942 by AMD's HIP page on FP8 numbers; OCP of gfx12 and gfx950 by LLVM.

Not found on AMD's own pages, but equal in the press, resellers' data or openxla's descriptions:
clocks and bandwidths of the Radeons, those of MI325X (6 TB/s) and MI355X (2.4 GHz, 8 TB/s, 4096
products; its 2516.6 TFLOP/s are AMD's "2.5 PFLOPS"). `Card.source` is where AMD should say them;
those product pages could not be opened.

Strix Halo (gfx1151): units, clock and L2 as rocminfo prints them, bandwidth by the press, the peak
by RDNA3's 512; that its register file is the large one of gfx1100 was read from LLVM 19 (12 waves
of 100 registers, where gfx1150 has 9).
"""

from dataclasses import dataclass

from mud_puppy.errors import UserError, nearest

SPECS = "https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html"
RDNA4 = "https://gpuopen.com/learn/using_matrix_core_amd_rdna4"
LLVM = "https://llvm.org/docs/AMDGPUUsage.html"
XLA = "https://github.com/openxla/xla/blob/main/xla/backends/gpu/target_config/specs"
GIB = 1024**3


@dataclass(frozen=True)
class Architecture:
    """What one instruction set fixes: everything that occupancy and kernel limits depend on.

    A SIMD holds `registers_per_lane` vector registers for each of its lanes, given out to waves in
    steps of `register_step`. Registers of RDNA are counted for 32-lane waves, the ones XLA makes.
    """

    name: str
    wave_size: int
    simds_per_cu: int
    max_waves_per_simd: int
    registers_per_lane: int
    register_step: int
    max_registers_per_wave: int  # beyond it the compiler spills
    lds_bytes_per_cu: int
    lds_bytes_per_block: int
    lds_step_bytes: int
    accumulators_shared: bool  # AGPRs (CDNA) come out of the same file as VGPRs
    matrix_prefix: str  # of the matrix instructions' names
    fp8: str | None  # encoding that its matrix instructions take: "ocp", "fnuz"
    source: str = LLVM


def _rdna(name: str, fp8: str | None) -> Architecture:
    # One and a half times the usual file: 1,536 registers of 32 lanes a SIMD, in steps of 24.
    return Architecture(
        name, 32, 2, 16, 1536, 24, 256, 65536, 65536, 512, False, "v_wmma", fp8
    )  # fmt: skip


def _cdna(name: str, fp8: str | None, lds_bytes: int = 65536, step: int = 512) -> Architecture:
    return Architecture(
        name, 64, 4, 8, 512, 8, 512, lds_bytes, lds_bytes, step, True, "v_mfma", fp8
    )  # fmt: skip


ARCHITECTURES = {
    a.name: a
    for a in (
        _rdna("gfx1100", None),
        _rdna("gfx1101", None),
        _rdna("gfx1151", None),
        _rdna("gfx1201", "ocp"),
        _cdna("gfx90a", None),
        _cdna("gfx942", "fnuz"),
        _cdna("gfx950", "ocp", lds_bytes=163840, step=1280),
    )
}


@dataclass(frozen=True)
class Card:
    """One product. `memory_bytes` and `bandwidth` are of one device as HIP counts devices."""

    name: str
    arch: str
    compute_units: int
    memory_bytes: int
    bandwidth: float  # bytes/s
    bf16_flops: float  # dense matrix FLOP/s, peak
    clock_hz: float  # boost
    l2_bytes: int  # of one die, as HIP and XLA count it
    source: str
    note: str = ""

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    @property
    def wave_size(self) -> int:
        return self.architecture.wave_size

    @property
    def lds_bytes_per_block(self) -> int:
        return self.architecture.lds_bytes_per_block


def _radeon(name, arch, cus, gib, gb_s, tflops, mhz, l2_mib, page, note="") -> Card:
    source = f"https://www.amd.com/en/products/{page}.html"
    return _card(name, arch, cus, gib, gb_s, tflops, mhz, l2_mib, source, note)


def _instinct(name, arch, cus, gib, gb_s, tflops, mhz, l2_mib, page, note="") -> Card:
    source = f"https://www.amd.com/en/products/accelerators/instinct/{page}.html"
    return _card(name, arch, cus, gib, gb_s, tflops, mhz, l2_mib, source, note)


def _card(name, arch, cus, gib, gb_s, tflops, mhz, l2_mib, source, note="") -> Card:
    flops, clock = tflops * 1e12, mhz * 1e6
    return Card(name, arch, cus, gib * GIB, gb_s * 1e9, flops, clock, l2_mib << 20, source, note)


_DIE = "one of the card's two dies: HIP counts each as a device"
_SHARED = "memory is the machine's own: with 128 GB of it, up to 96 GB can be given to the GPU"

# The first card of an architecture is the one that the architecture's name alone means.
CARDS = (
    _radeon("Radeon RX 7900 XTX", "gfx1100", 96, 24, 960, 122.8, 2500, 6,
            "graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx"),
    _radeon("Radeon RX 7900 XT", "gfx1100", 84, 20, 800, 103.0, 2400, 6,
            "graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xt"),
    _radeon("Radeon RX 7900 GRE", "gfx1100", 80, 16, 576, 91.96, 2245, 6,
            "graphics/desktops/radeon/7000-series/amd-radeon-rx-7900-gre"),
    _radeon("Radeon PRO W7900", "gfx1100", 96, 48, 864, 122.64, 2495, 6,
            "graphics/workstations/radeon-pro/w7900"),
    _radeon("Radeon RX 7800 XT", "gfx1101", 60, 16, 624, 74.65, 2430, 4,
            "graphics/desktops/radeon/7000-series/amd-radeon-rx-7800-xt"),
    _radeon("Radeon 8060S", "gfx1151", 40, 96, 256, 59.39, 2900, 2,
            "processors/laptop/ryzen/ai-300-series/amd-ryzen-ai-max-plus-395", _SHARED),
    _radeon("Radeon RX 9070 XT", "gfx1201", 64, 16, 640, 195.0, 2970, 8,
            "graphics/desktops/radeon/9000-series/amd-radeon-rx-9070xt"),
    _radeon("Radeon AI PRO R9700", "gfx1201", 64, 32, 640, 191.0, 2920, 8,
            "graphics/workstations/radeon-ai-pro/ai-9000-series/amd-radeon-ai-pro-r9700"),
    _instinct("Instinct MI250X", "gfx90a", 110, 64, 1638.4, 191.5, 1700, 8, "mi200/mi250x", _DIE),
    _instinct("Instinct MI210", "gfx90a", 104, 64, 1638.4, 181.0, 1700, 8, "mi200/mi210"),
    _instinct("Instinct MI300X", "gfx942", 304, 192, 5300, 1307.4, 2100, 4, "mi300/mi300x"),
    _instinct("Instinct MI325X", "gfx942", 304, 256, 6000, 1307.4, 2100, 4, "mi300/mi325x"),
    _instinct("Instinct MI355X", "gfx950", 256, 288, 8000, 2516.6, 2400, 4, "mi350/mi355x"),
)  # fmt: skip

_ALSO = {"strixhalo": "8060s"}


def card(name: str) -> Card:
    """The card of that name ("RX 7900 XTX", "7900xtx", "MI300X"), or an architecture's first card.

    Raises UserError, which lists the known ones.
    """
    wanted = _short(name)
    wanted = _ALSO.get(wanted, wanted)
    for known in CARDS:
        if wanted in (known.arch, _short(known.name)):
            return known
    names = [c.name for c in CARDS]
    shorts = [*map(_short, names), *ARCHITECTURES]
    raise UserError(
        f"'{name}' is no known AMD card.{nearest(wanted, shorts)} "
        f"Known: {', '.join(names)}; or by architecture: {', '.join(ARCHITECTURES)}"
    )


def _short(name: str) -> str:
    """ "Radeon RX 7900 XTX" -> "7900xtx"; gfx names lose the features after a colon."""
    words = name.lower().split(":")[0].replace("-", " ").replace("_", " ").split()
    return "".join(w for w in words if w not in ("amd", "radeon", "rx", "instinct", "pro", "ai"))


def target_config(card: Card) -> str:
    """XLA's GpuTargetConfigProto in text form, as in openxla's own descriptions of cards (`XLA`).

    Registers are the 32-bit ones of a compute unit's vector file. The description is the
    architecture, for JAX shows it as the device's kind and Pallas looks there. The runtime is ROCm
    7: without a version XLA trusts no float8 product and widens it.
    """
    arch = card.architecture
    registers = arch.simds_per_cu * arch.registers_per_lane * arch.wave_size
    lds = arch.lds_bytes_per_block
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: {arch.wave_size}
  shared_memory_per_block: {lds}
  shared_memory_per_block_optin: {lds}
  shared_memory_per_core: {arch.lds_bytes_per_cu}
  threads_per_core_limit: 2048
  core_count: {card.compute_units}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65536
  block_dim_limit_z: 65536
  memory_bandwidth: {int(card.bandwidth)}
  l2_cache_size: {card.l2_bytes}
  clock_rate_ghz: {card.clock_hz / 1e9:g}
  device_memory_size: {card.memory_bytes}
  registers_per_core_limit: {registers}
  registers_per_block_limit: {registers}
  rocm_compute_capability {{ gcn_arch_name: "{arch.name}" }}
}}
platform_name: "ROCM"
dnn_version_info {{ major: 3 minor: 5 }}
runtime_version {{ major: 7 minor: 0 }}
device_description_str: "{arch.name}"
"""
