"""`mud-puppy doctor` as people run it, on a machine without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from mud_puppy.doctor import render
from mud_puppy.doctor.facts import gather
from mud_puppy.doctor.faults import diagnose, has_gpu
from mud_puppy.rocm import settings
from tests.doctor.machine import PROBE, healthy


def doctor(*flags, **variables):
    path = os.pathsep.join(p for p in sys.path if p)
    env = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""} | variables
    command = [sys.executable, "-m", "mud_puppy", "doctor", *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_here():
    """The real command. JAX is on the CPU in tests, which on a machine with a GPU is a fault."""
    result = doctor()
    assert "Traceback" not in result.stdout + result.stderr
    for words in ("agree with their references", "pinned_host         right", "float32 right"):
        assert words in result.stdout
    if not has_gpu(gather()):
        assert result.returncode == 0, result.stdout + result.stderr
        assert "no faults" in result.stdout and "note no-gpu" in result.stdout
        assert "none made: no AMD driver" in result.stdout


def test_json_without_a_probe():
    result = doctor("--json", "--no-probe")
    answer = json.loads(result.stdout)
    assert set(answer) == {"healthy", "findings", "facts", "probe", "settings"}
    assert answer["probe"] is None and answer["facts"]["versions"]["jax"]
    assert all({"name", "what", "where", "fix", "severity"} == set(f) for f in answer["findings"])
    assert result.returncode == (0 if answer["healthy"] else 1)


def test_a_flag_that_ends_jax_is_one_finding():
    result = doctor("--json", XLA_FLAGS="--xla_gpu_nonsense=1")
    assert result.returncode == 1 and "Traceback" not in result.stdout + result.stderr
    faults = [f for f in json.loads(result.stdout)["findings"] if f["severity"] == "fault"]
    assert [f["name"] for f in faults] == ["unknown-flag"]
    assert "--xla_gpu_nonsense=1" in faults[0]["fix"]


def test_the_page_of_a_radeon(tmp_path):
    """Every line in its place, the settings with their reasons, fixes unbroken."""
    machine = healthy(tmp_path, os.getgid())
    environ = {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=true"}
    record = settings.apply(environ, machine.root, [str(machine.site)], started=False)
    page = render.text(machine.facts(), PROBE, record, diagnose(machine.facts(), PROBE))
    for line in (
        "  JAX's plugins  jax-rocm7-pjrt 0.10.2, jax-rocm7-plugin 0.10.2",
        "  AMD card             gfx1100, 24.0 GiB renderD128",
        "  rocm                AMD Radeon RX 7900 XTX, gfx1100, 22.8 GiB for JAX",
        "  kernels             1 of 1 agree with their references",
        "  XLA_PYTHON_CLIENT_MEM_FRACTION=0.95    set",
        "  --xla_gpu_enable_triton_gemm=true    yours, kept (ours: false)",
        "  NCCL_MIN_NCHANNELS=112    not set: for gfx942, gfx950",
        "  JAX_DEFAULT_MATMUL_PRECISION    left as it is",
        "no faults",
    ):
        assert line in page.splitlines(), page
    assert max(len(line) for line in page.splitlines() if str(tmp_path) not in line) <= 100


def test_the_page_in_docs_names_every_fault_and_setting():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    sources = Path(render.__file__).parent.glob("*.py")
    names = [n for p in sources for n in re.findall(r'Finding\(\s*"([a-z-]+)"', p.read_text())]
    assert len(set(names)) > 20
    assert [n for n in {*names} if f"`{n}`" not in page] == []
    assert [s.name for s in settings.SETTINGS if f"`{s.name.lstrip('-')}`" not in page] == []
    assert re.findall("https?://[^ )|]+", page)
