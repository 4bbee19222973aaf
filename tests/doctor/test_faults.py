"""Faults planted in a machine of files, each named with its fix; the healthy machine has none."""

import os
import pwd
from dataclasses import replace
from pathlib import Path

import pytest

from mud_puppy.doctor import facts as facts_module
from mud_puppy.doctor import render
from mud_puppy.doctor.access import _selected
from mud_puppy.doctor.faults import diagnose
from mud_puppy.doctor.nodes import User, may_open
from mud_puppy.doctor.watch import Check, Device, Probe
from mud_puppy.rocm import settings
from tests.doctor.machine import NOBODY, ON_CPU, PROBE, Machine, healthy, nvidia


@pytest.fixture
def radeon(tmp_path):
    return healthy(tmp_path, os.getgid())


@pytest.fixture
def h100(tmp_path):
    return nvidia(tmp_path)


def only(machine, probe=ON_CPU, severity="fault"):
    """The one finding of a machine that is not well; its name and fix stand in the text."""
    facts = machine.facts()
    findings = [f for f in diagnose(facts, probe) if f.severity == severity]
    assert len(findings) == 1, findings
    said = render.text(facts, probe, settings.Record("elsewhere"), findings)
    assert findings[0].name in said and f"fix: {findings[0].fix}" in said
    return findings[0]


def test_a_healthy_radeon(radeon):
    facts = radeon.facts()
    (gpu,) = facts.amd_gpus
    assert (gpu.arch, gpu.memory_bytes, gpu.render_node) == ("gfx1100", 24 * 1024**3, "renderD128")
    assert (facts.rocm, facts.amdgpu, facts.amd_pci) == ("7.2.0-12", "6.12.12", 1)
    assert [node.usable for node in facts.nodes] == [True, True]
    assert facts.memlock_bytes is None and facts.memory_bytes == 65536000 * 1024
    assert facts.versions["jax_rocm7_pjrt"] == "0.10.2"
    assert diagnose(facts, PROBE) == []


def test_a_healthy_h100(h100):
    facts = h100.facts()
    assert (facts.nvidia, facts.nvidia_gpus) == ("580.95.05", ("NVIDIA H100 80GB HBM3",))
    probe = replace(PROBE, devices=(Device("cuda", "sm90", "NVIDIA H100 80GB HBM3", 1),))
    assert diagnose(facts, probe) == []


# The five of the issue.


def test_no_permission_on_the_device_node(radeon):
    radeon.user = NOBODY
    radeon.write("etc/group", f"root:x:0:\nrender:x:{os.getgid()}:\n")
    found = only(radeon)
    assert found.name == "device-permission"
    assert "ada may not open /dev/kfd and /dev/dri/renderD128" in found.what
    assert "mode 0660" in found.where
    assert "sudo usermod -aG render,video $USER" in found.fix and "log out" in found.fix


def test_a_plugin_of_another_version(radeon):
    for name in ("jax_rocm7_plugin", "jax_rocm7_pjrt"):
        radeon.package(name, "0.9.1.post3")
    found = only(radeon)
    assert found.name == "plugin-version" and "0.9.1.post3" in found.where
    assert found.fix == "pip install jax-rocm7-pjrt==0.10.2 jax-rocm7-plugin==0.10.2"


@pytest.mark.parametrize("name", ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
@pytest.mark.parametrize("value", ["", "-1", "3"])
def test_a_hidden_gpu(radeon, name, value):
    radeon.environ[name] = value
    found = only(radeon)
    assert (found.name, found.fix) == ("gpu-hidden", f"unset {name}")
    assert found.where == f"{name}={value!r}"


def test_a_wrong_kernel(radeon):
    name = "attention kernels for bfloat16 heads of 128, 128"
    problem = f"{name} failed its self-check: error 0.7, allowed 0.031"
    wrong = replace(PROBE, checks=(Check("kernel", name, problem), *PROBE.checks[1:]))
    found = only(radeon, wrong)
    assert found.name == "kernel-wrong" and problem in found.what and "gfx1100" in found.where
    assert "another implementation serves in its place" in found.fix


def test_no_pinned_host(radeon):
    checks = [replace(c, problem="no such memory") if c.kind == "pinned_host" else c
              for c in PROBE.checks]  # fmt: skip
    found = only(radeon, replace(PROBE, checks=tuple(checks)))
    assert found.name == "no-pinned-host" and "no such memory" in found.what
    assert "gradient_checkpointing: full" in found.fix
    limits = "Max locked memory         8388608              8388608              bytes\n"
    radeon.write("proc/self/limits", limits)
    more = only(radeon, replace(PROBE, checks=tuple(checks)), "warning")
    assert (more.name, more.fix) == ("locked-memory", "ulimit -l unlimited")


# The rest.


def test_a_container_without_the_device(radeon):
    radeon.user = NOBODY
    radeon.write(".dockerenv")
    gid = os.getgid()
    start = "docker run --device /dev/kfd --device /dev/dri"
    assert f"{start} --group-add {gid}" in only(radeon).fix
    (radeon.root / "dev/kfd").unlink()
    (radeon.root / "dev/dri/renderD128").unlink()
    found = only(radeon)
    assert found.name == "driver-missing" and start in found.fix


def test_groups_that_the_session_does_not_have_yet(radeon):
    radeon.user = NOBODY
    assert only(radeon).fix.startswith("log out and in again: ada is in render")


def test_no_driver(radeon):
    (radeon.root / "dev/kfd").unlink()
    assert "dmesg" in only(radeon).fix
    (radeon.root / "sys/module/amdgpu/version").unlink()
    (radeon.root / "sys/module/amdgpu").rmdir()
    assert "sudo modprobe amdgpu" in only(radeon).fix


def test_no_plugin(radeon, tmp_path):
    for name in ("jax_rocm7_plugin", "jax_rocm7_pjrt"):
        radeon.remove(name)
    found = only(radeon)
    assert (found.name, found.fix) == ("plugin-missing", 'pip install "jax[rocm7-local]==0.10.2"')


def test_half_a_plugin_and_two_halves(radeon):
    radeon.package("jax_rocm7_pjrt", "0.10.1")
    found = only(radeon)
    assert found.name == "plugin-parts" and "jax-rocm7-pjrt 0.10.1" in found.where
    radeon.remove("jax_rocm7_pjrt")
    found = only(radeon)
    assert found.name == "plugin-parts" and "jax-rocm7-pjrt is missing" in found.what
    assert found.fix == "pip install jax-rocm7-pjrt==0.10.2 jax-rocm7-plugin==0.10.2"


def test_rocm_is_missing_or_old(radeon):
    radeon.write("opt/rocm/.info/version", "6.4.1-83\n")
    assert only(radeon).name == "rocm-version"
    radeon.write("opt/rocm/.info/version", "")
    found = only(radeon)
    assert found.name == "rocm-missing" and "ROCm 7" in found.fix
    radeon.package("rocm_sdk_core", "7.13.0")  # AMD's wheels are ROCm as well
    assert only(radeon).name == "cpu-instead"


def test_platforms_that_exclude_the_card(radeon):
    radeon.environ["JAX_PLATFORMS"] = "cpu"
    found = only(radeon)
    assert (found.name, found.fix) == ("platform-excluded", "unset JAX_PLATFORMS")


def test_the_cpu_for_no_reason_that_files_show(radeon):
    found = only(radeon)
    assert found.name == "cpu-instead" and found.where == "Falling back to cpu."
    assert "JAX_PLATFORMS=rocm" in found.fix


def test_warnings_do_not_make_a_machine_ill(radeon):
    radeon.environ["HSA_OVERRIDE_GFX_VERSION"] = "10.3.0"
    found = only(radeon, PROBE, "warning")
    assert (found.name, found.fix) == ("arch-overridden", "unset HSA_OVERRIDE_GFX_VERSION")
    del radeon.environ["HSA_OVERRIDE_GFX_VERSION"]
    node = "sys/class/kfd/kfd/topology/nodes/1/properties"
    radeon.write(node, "simd_count 32\ngfx_target_version 100306\ndrm_render_minor 128\n")
    found = only(radeon, PROBE, "warning")
    assert found.name == "arch-unknown" and "gfx1036" in found.what and "gfx1100" in found.fix
    assert not [f for f in diagnose(radeon.facts(), PROBE) if f.severity == "fault"]


def test_a_processors_graphics_beside_the_card(radeon):
    node = "sys/class/kfd/kfd/topology/nodes/2/properties"
    radeon.write(node, "simd_count 4\ngfx_target_version 100306\ndrm_render_minor 129\n")
    found = {f.name: f for f in diagnose(radeon.facts(), PROBE)}
    assert found["mixed-cards"].severity == "warning"
    assert "ROCR_VISIBLE_DEVICES=0 " in found["mixed-cards"].fix
    radeon.environ["ROCR_VISIBLE_DEVICES"] = "0"
    assert "mixed-cards" not in {f.name for f in diagnose(radeon.facts(), PROBE)}


def test_another_card_that_is_in_nobodys_way(h100):
    """A processor's own graphics by AMD, without a driver, beside an H100 that works."""
    h100.write("sys/bus/pci/devices/0000:7c:00.0/vendor", "0x1002\n")
    h100.write("sys/bus/pci/devices/0000:7c:00.0/class", "0x030000\n")
    probe = replace(PROBE, devices=(Device("cuda", "sm90", "NVIDIA H100", 1),))
    assert only(h100, probe, "warning").name == "driver-missing"
    assert not [f for f in diagnose(h100.facts(), probe) if f.severity == "fault"]


def test_faults_of_nvidia(h100):
    h100.environ["CUDA_VISIBLE_DEVICES"] = ""
    assert only(h100).fix == "unset CUDA_VISIBLE_DEVICES"
    h100.environ.pop("CUDA_VISIBLE_DEVICES")
    h100.package("jax_cuda13_plugin", "0.11.1")
    assert only(h100).name == "plugin-parts"
    for name in ("jax_cuda13_plugin", "jax_cuda13_pjrt"):
        h100.remove(name)
    assert only(h100).fix == 'pip install "jax[cuda13]==0.11.2"'
    (h100.root / "proc/driver/nvidia/version").unlink()
    assert only(h100).name == "driver-missing"


@pytest.mark.parametrize(
    "kind, name", [("all-reduce", "all-reduce-wrong"), ("offload", "offload-wrong"),
                   ("matmul", "matmul-wrong")]
)  # fmt: skip
def test_what_the_probe_found_wrong(radeon, kind, name):
    checks = (Check(kind, "float32", "off by 3"),)
    found = only(radeon, replace(PROBE, checks=checks))
    assert found.name == name and "off by 3" in found.what


def test_a_probe_that_died(radeon):
    probe = Probe(PROBE.devices, (), "it was ended by SIGSEGV", "kernel attention", ("a", "b"))
    found = only(radeon, probe)
    assert found.name == "probe-crashed" and "SIGSEGV, while kernel attention" in found.what
    said = ("F1123 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --xla_gpu_nonsense=1",)
    found = only(radeon, replace(ON_CPU, devices=(), crash="it was ended by SIGABRT", said=said))
    assert found.name == "unknown-flag" and "--xla_gpu_nonsense=1" in found.fix


@pytest.mark.parametrize(
    ("module", "package"), [("gguf", "gguf"), ("orbax.checkpoint", "orbax-checkpoint")]
)
def test_a_package_that_is_missing(radeon, module, package):
    said = ("ImportError: of something else", f"ModuleNotFoundError: No module named '{module}'")
    died = replace(ON_CPU, devices=(), crash="it ended with status 1", said=said)
    found = only(radeon, died)
    assert (found.name, found.fix) == ("package-missing", f"pip install {package}")


@pytest.mark.parametrize("platform", ["cuda", "rocm,cpu", "nonsense"])
def test_a_platform_that_no_machine_without_a_gpu_has(tmp_path, platform):
    machine = Machine(tmp_path, NOBODY, {"XDG_CACHE_HOME": "", "JAX_PLATFORMS": platform})
    machine.package("jax", "0.10.2")
    died = replace(ON_CPU, devices=(), crash="it ended with status 1", said=("AssertionError",))
    found = only(machine, died)
    assert (found.name, found.fix) == ("platform-missing", "unset JAX_PLATFORMS")
    assert found.where == f"JAX_PLATFORMS={platform}; AssertionError"


def test_a_home_that_is_closed_or_not_there(radeon, monkeypatch):
    """Both are told as a cache with the free space of what can be seen of its path."""
    exists = os.path.exists
    monkeypatch.setattr(Path, "exists", lambda path: 1 / 0)  # it raises for a closed folder
    monkeypatch.setattr(os.path, "exists", lambda p: "closed" not in str(p) and exists(p))
    assert facts_module._free(radeon.root / "closed" / "xla") > 0
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert facts_module._cache({}) == str(Path("~/.cache/mud_puppy/xla"))


def test_jax_that_does_not_start_without_the_hidden_card(radeon):
    radeon.environ["HIP_VISIBLE_DEVICES"] = "-1"
    dead = Probe((), (), "it ended with status 1", "starting JAX", ("RuntimeError: no device",))
    assert only(radeon, dead).name == "gpu-hidden"
    assert only(radeon, dead, "warning").where == "RuntimeError: no device"


@pytest.mark.parametrize(
    "value, count, seen",
    [("", 2, 0), ("0", 2, 1), ("1,0", 2, 2), ("-1", 2, 0), ("0,-1,1", 2, 1), ("GPU-ab12", 2, 1),
     ("0,9", 2, 1)],
)  # fmt: skip
def test_what_a_list_of_devices_shows(value, count, seen):
    assert _selected(value, count) == seen


def test_some_gpus_hidden_is_a_note(radeon):
    nodes = "sys/class/kfd/kfd/topology/nodes"
    for name in ("properties", "mem_banks/0/properties"):
        radeon.write(f"{nodes}/2/{name}", (radeon.root / nodes / "1" / name).read_text())
    radeon.environ["ROCR_VISIBLE_DEVICES"] = "1"
    assert "1 of 2" in only(radeon, PROBE, "note").what


@pytest.mark.parametrize(
    "mode, uid, gid, user, may",
    [(0o660, 0, 992, User("a", 1000, (1000, 992)), True), (0o660, 0, 992, NOBODY, False),
     (0o666, 0, 0, NOBODY, True), (0o600, 54321, 0, NOBODY, True), (0o640, 0, 54321, NOBODY, False),
     (0o066, 54321, 54321, NOBODY, False), (0o000, 5, 5, User("root", 0, (0,)), True)],
)  # fmt: skip
def test_who_may_open_a_file(mode, uid, gid, user, may):
    assert may_open(mode, uid, gid, user) == may


def test_without_a_gpu_nothing_is_wrong(tmp_path):
    machine = Machine(tmp_path, NOBODY, {})
    machine.package("jax", "0.10.2")
    found = only(machine, replace(ON_CPU, said=()), "note")
    assert found.name == "no-gpu" and "jax-rocm7-pjrt" in found.fix
    assert [f.name for f in diagnose(machine.facts(), ON_CPU)] == ["no-gpu"]
