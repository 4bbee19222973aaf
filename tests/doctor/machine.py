"""A machine with a healthy RX 7900 XTX, as files under a folder; tests plant one fault each."""

from dataclasses import dataclass
from pathlib import Path

from mud_puppy.doctor.facts import Facts, gather
from mud_puppy.doctor.nodes import User
from mud_puppy.doctor.watch import Check, Device, Probe

GIB = 1024**3
VIDEO = 44
NOBODY = User("ada", 54321, (54321,))  # neither the owner of the files made here nor in its group
CPU_NODE = "cpu_cores_count 16\nsimd_count 0\ngfx_target_version 0\n"
XTX_NODE = "simd_count 192\ngfx_target_version 110000\ndrm_render_minor 128\nvendor_id 4098\n"
PROBE = Probe(
    devices=(Device("rocm", "gfx1100", "AMD Radeon RX 7900 XTX", int(22.8 * GIB)),),
    checks=(
        Check("kernel", "attention kernels for bfloat16 heads of 128, 128", None),
        Check("pinned_host", "an array to the host's memory and back", None),
        Check("offload", "gradients of gradient_checkpointing: offload", None),
        Check("all-reduce", "over 1 device(s)", None),
        Check("matmul", "bfloat16", None, "error 2e-03"),
        Check("matmul", "float32", None, "error 1e-06"),
    ),
)
ON_CPU = Probe(devices=(Device("cpu", "cpu", "cpu", 0),), said=("Falling back to cpu.",))


@dataclass
class Machine:
    """`facts()` reads it. user: one who is in the groups that the device files have."""

    root: Path
    user: User
    environ: dict[str, str]

    def write(self, path: str, text: str = "") -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def package(self, name: str, version: str) -> None:
        for old in self.site.glob(f"{name}-*"):
            old.rmdir()
        (self.site / f"{name}-{version}.dist-info").mkdir(parents=True)

    def remove(self, name: str) -> None:
        for old in self.site.glob(f"{name}-*"):
            old.rmdir()

    @property
    def site(self) -> Path:
        return self.root / "site-packages"

    def facts(self) -> Facts:
        return gather(self.root, self.environ, self.user, [str(self.site)])


def healthy(root: Path, gid: int) -> Machine:
    """gid: the group of the files that this process makes, which stands for `render`."""
    machine = Machine(
        root, User("ada", NOBODY.uid, (*NOBODY.gids, gid)), {"XDG_CACHE_HOME": str(root)}
    )
    write = machine.write
    write("etc/group", f"root:x:0:\nrender:x:{gid}:ada\nvideo:x:{VIDEO}:ada\n")
    for device in ("dev/kfd", "dev/dri/renderD128"):
        write(device).chmod(0o660)
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write(f"{nodes}/0/properties", CPU_NODE)
    write(f"{nodes}/1/properties", XTX_NODE)
    bank = f"heap_type 1\nsize_in_bytes {24 * GIB}\nflags 0\n"
    write(f"{nodes}/1/mem_banks/0/properties", bank)
    write("sys/module/amdgpu/version", "6.12.12\n")
    write("sys/bus/pci/devices/0000:03:00.0/vendor", "0x1002\n")
    write("sys/bus/pci/devices/0000:03:00.0/class", "0x030000\n")
    write("opt/rocm/.info/version", "7.2.0-12\n")
    write("proc/sys/kernel/osrelease", "6.8.0-50-generic\n")
    write("proc/meminfo", "MemTotal:       65536000 kB\n")
    write("proc/self/limits", "Max locked memory         unlimited            unlimited   bytes\n")
    for name in ("jax", "jaxlib", "jax_rocm7_plugin", "jax_rocm7_pjrt"):
        machine.package(name, "0.10.2")
    write("site-packages/jax_plugins/xla_rocm7/__init__.py")
    return machine


def nvidia(root: Path) -> Machine:
    """A machine with an H100 in the place of the Radeon."""
    machine = Machine(root, NOBODY, {"XDG_CACHE_HOME": str(root)})
    write = machine.write
    write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "
          "580.95.05  Release Build\nGCC version: 13\n")  # fmt: skip
    write("proc/driver/nvidia/gpus/0000:04:00.0/information", "Model: \t\t NVIDIA H100 80GB HBM3\n")
    write("sys/bus/pci/devices/0000:04:00.0/vendor", "0x10de\n")
    write("sys/bus/pci/devices/0000:04:00.0/class", "0x030200\n")
    for device in ("dev/nvidia0", "dev/nvidiactl"):
        write(device).chmod(0o666)
    for name in ("jax", "jaxlib", "jax_cuda13_plugin", "jax_cuda13_pjrt"):
        machine.package(name, "0.11.2")
    return machine
