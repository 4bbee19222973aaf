"""float8 products for AMD cards become hipBLASLt's, and cards without them refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mud_puppy.rocm import plugin
from mud_puppy.rocm.compile import CompileError, Compiler, Unit

pytestmark = pytest.mark.rocm
UNITS = Path(__file__).with_name("units.py")
CALL = "__cublas$lt$matmul$f8"  # hipBLASLt's under XLA's name

# The optimized program of a unit.
SCRIPT = """
import json, re, sys
from pathlib import Path
import jax
from mud_puppy.kernels import target
from mud_puppy.rocm import standins, targets, worker
worker.register(Path(sys.argv[1]), standins.default_cache())
out = {}
for arch, arguments in json.loads(sys.argv[3]):
    jax.clear_caches()
    with target.use(target.Target("rocm", arch)):
        f, args = worker.resolve(sys.argv[2])(**arguments)
        mesh = worker._mesh(targets.card(arch))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(f).trace(*worker._on(mesh, args))
            compiled = traced.lower(lowering_platforms=("rocm",)).compile(
                compiler_options={"xla_gpu_enable_triton_gemm": False}
            )
    text = compiled.as_text()
    out[f"{arch} {arguments}"] = re.findall(r'custom_call_target="(__cublas[^"]*)"', text)
print("ANSWER" + json.dumps(out))
"""


def calls(*cases):
    """The matrix products in the compiled program of each (arch, arguments)."""
    command = [sys.executable, "-c", SCRIPT, str(plugin.find()), f"{UNITS}:fp8_linear"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    ran = subprocess.run(
        [*command, json.dumps(cases)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    answer = json.loads(ran.stdout.split("ANSWER")[1])
    return [answer[f"{arch} {arguments}"] for arch, arguments in cases]


def test_every_product_is_float8s():
    cases = [(a, {"frozen": f}) for a in ("gfx942", "gfx950", "gfx1201") for f in (True, False)]
    for (_, arguments), found in zip(cases, calls(*cases), strict=True):
        assert found == [CALL] * (2 if arguments["frozen"] else 3)


def test_emulated_ones_are_not_on_a_card_without():
    (found,) = calls(("gfx1100", {"frozen": False, "emulated": True}))
    assert len(found) == 3 and CALL not in found


@pytest.mark.parametrize("arch", ["gfx1100", "gfx90a"])
def test_a_card_without_is_refused(arch, tmp_path):
    with Compiler(tmp_path) as compiler:
        with pytest.raises(CompileError, match=rf"{arch} has no float8.*fp8-emulated"):
            compiler.compile(Unit(f"{UNITS}:fp8_linear", {}, arch))
        assert compiler.compile(Unit(f"{UNITS}:fp8_linear", {"emulated": True}, arch)).kernels
