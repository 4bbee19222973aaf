"""Settings at import: on ROCm only, what is unset only, and flags that XLA and its plugin know."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mud_puppy.rocm import kfd, plugin, settings
from mud_puppy.rocm.compile import Compiler, Unit

NODE = "simd_count 192\ngfx_target_version {}\ndrm_render_minor 128\n"
VERSIONS = {"gfx1100": 110000, "gfx1101": 110001, "gfx1201": 120001, "gfx90a": 90010,
            "gfx942": 90402, "gfx950": 90500, "gfx1151": 110501, "gfx906": 90006}  # fmt: skip
EVERYWHERE = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_enable_latency_hiding_scheduler=true "
    "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_cublaslt=true",
}
TRITON = "--xla_gpu_enable_triton_gemm=false"
MI300 = {
    "GPU_MAX_HW_QUEUES": "2",
    "HIP_FORCE_DEV_KERNARG": "1",
    "HSA_FORCE_FINE_GRAIN_PCIE": "1",
    "NCCL_MIN_NCHANNELS": "112",
}


def machine(root, arch="gfx1100"):
    """A file system with that card and JAX's plugin; what to give `apply`."""
    node = root / kfd.NODES / "1"
    node.mkdir(parents=True)
    (node / "properties").write_text(NODE.format(VERSIONS[arch]))
    (root / "dev").mkdir()
    (root / "dev/kfd").touch()
    (root / "site/jax_plugins/xla_rocm7").mkdir(parents=True)
    return root, [str(root / "site")]


def made(environ, root, path, started=False):
    """The environment after import, and the record."""
    record = settings.apply(environ, root, path, started)
    return environ, record


@pytest.mark.parametrize("arch", VERSIONS)
def test_on_each_card(tmp_path, arch):
    environ, record = made({}, *machine(tmp_path, arch))
    expected = EVERYWHERE | (MI300 if arch in ("gfx942", "gfx950") else {})
    if arch in ("gfx90a", "gfx906"):
        expected |= {"XLA_FLAGS": EVERYWHERE["XLA_FLAGS"].replace(TRITON + " ", "")}
    assert environ == expected
    assert record.archs == (arch,) and record.missing == ""
    assert [o.setting for o in record.outcomes] == list(settings.SETTINGS)


def test_the_compiler_without_a_card_gets_the_same_flags(tmp_path):
    for arch in ("gfx1100", "gfx90a"):
        (tmp_path / arch).mkdir()
        environ, _ = made({}, *machine(tmp_path / arch, arch))
        own = [f"--{name}={str(value).lower()}" for name, value in settings.options(arch).items()]
        assert sorted([*settings.FLAGS, *own]) == sorted(environ["XLA_FLAGS"].split())


def test_only_on_rocm(tmp_path):
    root, path = machine(tmp_path)
    before = {"HOME": "/", "JAX_PLATFORMS": ""}
    for reason, environ, where in (
        ("JAX_PLATFORMS=cpu", {"JAX_PLATFORMS": "cpu"}, path),
        ("JAX_PLATFORMS=cuda,cpu", {"JAX_PLATFORMS": "cuda,cpu"}, path),
        ("plugin", {}, [str(root), ""]),
    ):
        got, record = made(before | environ, root, where)
        assert got == before | environ and reason in record.missing and not record.outcomes
    for platforms in ("", "rocm", "gpu,cpu", "ROCM"):
        assert made({"JAX_PLATFORMS": platforms}, root, path)[1].missing == ""
    (root / "dev/kfd").unlink()
    got, record = made(dict(before), root, path)
    assert got == before and "no AMD driver" in record.missing


@pytest.mark.parametrize("name", [n for n in EVERYWHERE | MI300 if n != "XLA_FLAGS"])
@pytest.mark.parametrize("value", ["7", ""])
def test_what_the_user_set_stays(tmp_path, name, value):
    environ, record = made({name: value}, *machine(tmp_path, "gfx942"))
    assert environ == EVERYWHERE | MI300 | {name: value}
    states = {o.setting.name: (o.state, o.value) for o in record.outcomes}
    assert states[name] == ("yours", value)


def test_the_users_xla_flags_win_flag_by_flag(tmp_path):
    theirs = "--xla_gpu_enable_triton_gemm=true --xla_dump_to=/tmp/x"
    environ, record = made({"XLA_FLAGS": theirs}, *machine(tmp_path))
    words = environ["XLA_FLAGS"].split()
    assert words[:2] == theirs.split()
    assert words[2:] == [f for f in EVERYWHERE["XLA_FLAGS"].split() if f != TRITON]
    states = {o.setting.name: (o.state, o.value) for o in record.outcomes}
    assert states["--xla_gpu_enable_triton_gemm"] == ("yours", "true")
    # Once more changes nothing, as in a process that this one starts.
    again = dict(environ)
    settings.apply(again, tmp_path, [str(tmp_path / "site")], False)
    assert again == environ


def test_a_file_of_flags_is_left_alone(tmp_path):
    environ, record = made({"XLA_FLAGS": "/etc/xla.txt"}, *machine(tmp_path))
    assert environ["XLA_FLAGS"] == "/etc/xla.txt"
    assert {o.state for o in record.outcomes if o.setting.name.startswith("--")} == {"yours"}


def test_jax_is_not_given_two_fractions(tmp_path):
    """It refuses to start where both names are set."""
    environ, _ = made({"XLA_CLIENT_MEM_FRACTION": "0.5"}, *machine(tmp_path))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environ


def test_too_late_is_said(tmp_path, caplog):
    environ, record = made({}, *machine(tmp_path), started=True)
    assert environ == {} and "import mud_puppy first" in record.missing
    assert "import mud_puppy first" in caplog.text
    import jax

    jax.devices()
    assert settings._started()


def test_every_row_says_why_and_by_whom():
    for setting in settings.SETTINGS:
        assert len(setting.reason) > 20 and setting.source.startswith("https://")
    assert settings.MEMORY_FRACTION == 0.95


def test_import_is_cheap_and_starts_nothing(tmp_path):
    code = "import mud_puppy, sys, json; from mud_puppy.rocm import settings; "
    code += "print(json.dumps([m for m in ('jax', 'numpy', 'jaxlib') if m in sys.modules]))"
    path = os.pathsep.join(p for p in sys.path if p)
    env = os.environ | {"PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert json.loads(result.stdout) == [], result.stderr


@pytest.mark.rocm
@pytest.mark.parametrize("good", [True, False], ids=["ours", "unknown"])
def test_xla_and_its_plugin_know_the_flags(tmp_path, good):
    """jaxlib reads XLA_FLAGS at its first use, the plugin for itself at its own: both end the
    process at a flag that they do not know. The first half of the code is jaxlib's, the second,
    after jaxlib has read none, the plugin's."""
    flags = EVERYWHERE["XLA_FLAGS"] if good else "--xla_gpu_enable_hipblaslt=true"
    jaxlib = "import jax; jax.jit(lambda x: x + 1)(1); print('read')"
    of_plugin = f"""
        import os, jax
        from pathlib import Path
        jax.jit(lambda x: x + 1)(1)
        os.environ["XLA_FLAGS"] = {flags!r}
        from jax.experimental import topologies
        from mud_puppy.rocm import standins, targets, worker
        worker.register(Path({str(plugin.find())!r}), standins.default_cache())
        card = targets.card("gfx1100")
        target = targets.target_config(card)
        made = topologies.get_topology_desc("t", "rocm", target_config=target, topology="1x1x1")
        at = jax.sharding.SingleDeviceSharding(made.devices[0])
        x = jax.ShapeDtypeStruct((64, 64), "float32", sharding=at)
        jax.jit(lambda x: x @ x).trace(x).lower(lowering_platforms=("rocm",)).compile()
        print("read")
    """
    path = os.pathsep.join(p for p in sys.path if p)
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    for code, given in ((jaxlib, flags), (of_plugin, "")):
        command = [sys.executable, "-c", textwrap.dedent(code)]
        result = subprocess.run(
            command, env=env | {"XLA_FLAGS": given}, capture_output=True, text=True, timeout=120
        )
        assert (result.returncode == 0) == good, result.stderr[-2000:]
        assert good or "Unknown flag in XLA_FLAGS: --xla_gpu_enable_hipblaslt" in result.stderr


@pytest.mark.rocm
def test_a_plugin_without_a_card_is_one_line(tmp_path):
    """The plugin stands in the environment, as pip install ".[rocm]" puts it."""
    path = os.pathsep.join([*(p for p in sys.path if p), str(plugin.find().parents[2])])
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"PYTHONPATH": path}
    code = "import {}jax; print(jax.devices())"
    for first, traced in (("mud_puppy, ", False), ("", True)):
        command = [sys.executable, "-c", code.format(first)]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert "CpuDevice" in result.stdout
        assert ("Traceback" in result.stderr) == traced, result.stderr
        assert "No AMD GPUs were found" in result.stderr


@pytest.mark.rocm
def test_what_is_compiled_has_a_runs_flags(tmp_path, monkeypatch):
    """Products go to AMD's libraries, as on the card; the caller's own flags do not matter."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    where = f"{Path(__file__).with_name('units.py')}:plain_product"
    triton = {"xla_gpu_enable_triton_gemm": True}
    with Compiler(tmp_path) as compiler:

        def fused(arch, options=None) -> bool:
            unit = Unit(where, {}, arch, options or {})
            return any("gemm_fusion" in k.name for k in compiler.compile(unit).kernels)

        assert not fused("gfx1100") and fused("gfx1100", triton)
        assert fused("gfx90a")  # not set there: XLA's own default
