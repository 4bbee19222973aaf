"""Run a case of `emulator_cases` and print each result's error against its float64 reference.

    TINYGRAD_DIR=... MUD_PUPPY_ROCM=... python tests/kernels/emulate.py "attention 128"
    python tests/kernels/emulate.py --device [CASE ...]        # on the GPU at hand, not emulated

Without a case, all. Prints a line of JSON for each: {"case", "errors": {leaf: relative L2 error},
"kernels": those that the emulator ran, "seconds"}, or "failed": why instead of the errors, and then
the exit status is 1. --mutate spoils the kernels' results, which must show.

Emulated: the op runs on the CPU as it would on a gfx1100, and each Pallas call in it is compiled
for gfx1100 by XLA's ROCm compiler and its binary run by the RDNA3 emulator of a tinygrad checkout,
through the harness in the project's shared folder (SHARED, else ../shared). Outputs start as NaN,
so that what a kernel does not write shows; what it writes out of bounds is an error.
"""

import argparse
import ctypes
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parents[1])  # the checkout, so that `tests.kernels` is found
ARCH = "gfx1100"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", action="store_true", help="on the GPU at hand")
    parser.add_argument("--mutate", action="store_true", help="spoil each kernel's first output")
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    if options.device:
        return 0 if on_device(options.cases) else 1
    with tempfile.TemporaryDirectory(prefix="mud-puppy-emulator-") as folder:
        # Before JAX starts: where XLA leaves binaries, and no GPU.
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "TF_ROCM_KEEP_XLA_TEMPFILES": "1",
            "TMPDIR": folder,
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        os.environ.pop("XLA_FLAGS", None)
        return 0 if emulated(Path(folder), options.cases, options.mutate) else 1


def emulated(folder: Path, names: list[str], mutate: bool) -> bool:
    """Run the cases with every Pallas call emulated."""
    import jax

    from mud_puppy.kernels import pallas, target
    from mud_puppy.rocm import plugin, standins, targets, worker

    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
    worker.register(plugin.find(), standins.default_cache())
    state = worker.State(folder)
    state.arch = ARCH
    card = targets.card(ARCH)
    compile_pallas = pallas.call
    count = iter(range(10**6))

    def call(kernel: Any, **settings: Any) -> Any:
        on_card = compile_pallas(kernel, **settings)

        def run(*args: Any) -> Any:
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
            number = next(count)
            result = state.compile_function(number, on_card, shapes, card, {})
            (launch,) = (k for k in result["kernels"] if k["name"] == settings["name"])
            state.tidy(number)
            launch["binary"] = str(folder / launch["binary"])
            out = settings["out_shape"]

            def emulator(*arrays: Any) -> Any:
                ran.append(launch["name"])
                return launched(launch, out, arrays, mutate)

            return jax.pure_callback(emulator, out, *args)

        return run

    ran: list[str] = []
    pallas.call = call
    with target.use(target.Target("rocm", ARCH)):
        return run_all(names, ran)


def launched(launch: dict, out_shape: Any, args: tuple, mutate: bool) -> Any:
    """The outputs of one kernel launch, from the emulator."""
    import jax
    import numpy as np

    held = [np.ascontiguousarray(a).copy() for a in args]
    shapes, tree = jax.tree.flatten(out_shape)
    outputs = [np.frombuffer(b"\xff" * (s.size * s.dtype.itemsize), s.dtype) for s in shapes]
    outputs = [o.reshape(s.shape).copy() for o, s in zip(outputs, shapes, strict=True)]
    harness().run(
        launch["binary"],
        launch["name"],
        held + outputs,
        launch["grid"],
        (launch["threads"],),
        launch["dynamic_lds_bytes"],
    )
    for before, after in zip(args, held, strict=True):
        same = np.asarray(before).tobytes() == after.tobytes()
        assert same, f"{launch['name']} wrote into an input"
    if mutate:
        outputs[0] *= 1.05
    return jax.tree.unflatten(tree, outputs)


def harness() -> Any:
    """The shared folder's emulator harness, as a module, with two more corrections."""
    name = "emu_harness"
    if name not in sys.modules:
        shared = Path(os.environ.get("SHARED", HERE.parents[2] / "shared"))
        path = shared / "rocm" / "emu_harness.py"
        assert path.exists(), f"{path} is missing; SHARED names the shared folder"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _skip_invalidations(module)
        _guard_inactive_lanes(module)
    return sys.modules[name]


def _skip_invalidations(module: Any) -> None:
    """Newer compilers invalidate caches at barriers, which the harness does not know: there is no
    cache here."""
    known = module._own

    def own(emu: Any, inst: Any) -> Any:
        if inst.op.name not in ("BUFFER_GL0_INV", "BUFFER_GL1_INV"):
            return known(emu, inst)
        runner = module._Runner("mubuf")

        def move_on(s: Any, v: Any, *_: Any) -> None:
            counter = ctypes.c_uint64.from_address(s.value + 4 * 256)
            counter.value += inst.size()

        runner.fxn = move_on
        return runner

    module._own = own


def _guard_inactive_lanes(module: Any) -> None:
    """The emulator reads LDS for lanes that are switched off, whose addresses may be anything: they
    get address 0 for the time of the load."""
    emu = module.emulator()
    decode_at = emu._decode_at

    def guarded(pc: int, arch: str) -> Any:
        (program, runtime), inst = decode_at(pc, arch)
        if not (hasattr(inst, "op") and inst.op.name.startswith("DS_LOAD")):
            return (program, runtime), inst
        first = (inst.addr.offset & 255) * 32
        order = list(program.arg.globals)

        def load(*buffers: Any) -> None:
            scalars = (ctypes.c_uint32 * 260).from_address(buffers[order.index(0)].value)
            vectors = (ctypes.c_uint32 * (256 * 32)).from_address(buffers[order.index(1)].value)
            off = [first + lane for lane in range(32) if not scalars[126] >> lane & 1]
            saved = [vectors[i] for i in off]
            for i in off:
                vectors[i] = 0
            runtime.fxn(*buffers)
            for i, value in zip(off, saved, strict=True):
                vectors[i] = value

        runner = SimpleNamespace(fxn=load, globals=order)
        return (SimpleNamespace(arg=runner), runner), inst

    emu._decode_at = guarded


def run_all(names: list[str], ran: list[str]) -> bool:
    """Print a line for each case; `ran` collects the names of the kernels that were emulated."""
    from tests.kernels.contract import results

    good = True
    for name, case in chosen(names).items():
        ran.clear()
        line = measured(name, case, results)
        print(json.dumps(line | {"kernels": ran}), flush=True)
        good &= "errors" in line
    return good


def on_device(names: list[str]) -> bool:
    """Print a line for each case, in the order in which they get ready: compiling takes longest."""
    import jax

    from mud_puppy.kernels import selfcheck
    from tests.kernels.contract import compiled

    # A kernel that its self-check refuses could not be measured; the checks also take turns.
    selfcheck.fault = lambda *_: None
    cpu = jax.devices("cpu")[0]

    def one(item: tuple[str, Any]) -> bool:
        def case() -> tuple:
            with jax.default_device(cpu):  # making weights compiles many small functions
                op, reference, args = item[1]()
            return op, reference, jax.device_put(args, jax.devices()[0])

        line = measured(item[0], case, compiled)
        print(json.dumps(line), flush=True)
        return "errors" in line

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(list(pool.map(one, chosen(names).items())))


def measured(name: str, case: Any, run: Any) -> dict[str, Any]:
    """The line of one case."""
    start = time.perf_counter()
    line: dict[str, Any] = {"case": name}
    try:
        line["errors"] = errors(case(), run)
    except Exception as problem:
        traceback.print_exc()
        line["failed"] = f"{type(problem).__name__}: {str(problem)[-1000:]}"
    return line | {"seconds": round(time.perf_counter() - start, 1)}


def chosen(names: list[str]) -> dict[str, Any]:
    from tests.kernels.emulator_cases import CASES

    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"no case {unknown[0]!r}; known: {', '.join(CASES)}")
    return {name: CASES[name] for name in names or CASES}


def errors(case: tuple, run: Any) -> dict[str, float]:
    """Relative L2 error of each output and of each argument's gradient, as `run` computes them."""
    import jax
    import numpy as np

    from tests.kernels import contract

    op, reference, args = case
    like = jax.eval_shape(reference, *args)
    rng = np.random.default_rng(9)
    cotangents = jax.tree.map(
        lambda s: jax.numpy.asarray(rng.standard_normal(s.shape, np.float32)).astype(s.dtype), like
    )
    got = run(op, args, cotangents)
    want = contract.in_float64(reference, args, cotangents)
    outputs = len(jax.tree.leaves(like))
    found = {}
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        name = f"output {i}" if i < outputs else f"gradient {i - outputs}"
        difference = np.linalg.norm(np.asarray(g, np.float64) - w)
        found[name] = float(difference / max(np.linalg.norm(w), 1e-30))
    return found


if __name__ == "__main__":
    sys.exit(main())
