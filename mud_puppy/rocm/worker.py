"""The process that compiles: `python -m mud_puppy.rocm.worker PLUGIN STANDINS`.

Says {"ready": true}, or what is at {"fault": ...}; then reads one unit a line (JSON) and answers
one line each. `compile.Compiler` is its only caller. Runs with JAX_PLATFORMS=cpu: the ROCm plugin
is only ever asked to compile. What XLA and a unit print goes to stderr.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client

from mud_puppy.errors import UserError
from mud_puppy.kernels import target
from mud_puppy.rocm import elf, settings, standins, targets
from mud_puppy.rocm.compile import Memory

# "001: kCustomKernel ... name grid: [8, 1, 4] threads: [256, 1, 1]  shared_memory: 16384 bytes"
LAUNCH = re.compile(
    r"(\S+)\s+grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]"
    r"(?:\s+shared_memory: (\d+) bytes)?"
)
PALLAS = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*?backend_config=(.*)')


def main() -> None:
    library, cache = Path(sys.argv[1]), Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)  # "no AMD GPUs": known
    try:
        register(library, cache)
    except UserError as fault:
        print(json.dumps({"fault": str(fault)}), file=answers, flush=True)
        return
    print(json.dumps({"ready": True}), file=answers, flush=True)
    state = State(Path(os.environ["TMPDIR"]))
    for number, line in enumerate(sys.stdin):
        try:
            answer = state.compile(number, **json.loads(line))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        state.tidy(number)
        print(json.dumps(answer), file=answers, flush=True)


def register(library: Path, cache: Path) -> None:
    """Make the plugin known to JAX as the platform "rocm", without starting it."""
    standins.load(library, cache)
    # Equal kernels of different callers are one kernel (`State`).
    jax.config.update("jax_traceback_in_locations_limit", 0)
    if "rocm" not in xla_bridge._backend_factories:
        options = {**xla_client.generate_pjrt_gpu_plugin_options(), "platform_name": "ROCM"}
        xla_bridge.register_plugin("rocm", priority=500, library_path=str(library), options=options)


class State:
    """What outlives a unit: the architecture traced for, and the binaries of Pallas kernels.

    XLA compiles equal kernels once in a process and leaves one file, so each is remembered by what
    it was compiled from (architecture, digest of the Pallas call, which has no source locations).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.arch = ""
        self.binaries: dict[tuple[str, str], str] = {}
        self.named: dict[tuple[str, str], list[str]] = {}  # (architecture, kernel) -> files
        self.seen = set(folder.glob("*.hsaco"))

    def compile(
        self, number: int, function: str, arguments: dict, card: str, options: dict, devices: int
    ) -> dict[str, Any]:
        chosen = targets.card(card)
        if chosen.arch != self.arch:
            jax.clear_caches()  # traces do not know of targets (kernels/target.py)
            self.arch = chosen.arch
        options = settings.options(chosen.arch) | options
        with target.use(target.Target("rocm", chosen.arch)):
            if devices:
                cards = _devices(chosen, devices)
                traced, mesh, notes = resolve(function)(devices=cards, **arguments)
                return _compile_traced(traced, mesh, notes, options)
            f, args, *passes = resolve(function)(**arguments)
            return self.compile_function(number, f, args, chosen, options, *passes)

    def compile_function(
        self,
        number: int,
        f: Callable,
        args: tuple,
        card: targets.Card,
        options: dict,
        inner_passes: int | None = None,
    ) -> dict[str, Any]:
        """Fields of `compile.Compiled`. To be called while `kernels.target` names the card."""
        dump = self.folder / f"unit{number}"
        options = {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True} | options
        mesh = _mesh(card)
        start = time.perf_counter()
        # JAX 0.11's lowering of Pallas asks the ambient mesh for the device's architecture.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            # A name of its own, for XLA remembers compiled modules by it.
            traced = jax.jit(_renamed(f, f"unit{number}")).trace(*_on(mesh, args))
            lowered = traced.lower(lowering_platforms=("rocm",))
        compiled = lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - start
        text = "".join(path.read_text() for path in sorted(dump.glob("*thunk_sequence.txt")))
        kernels = self._launches(text, compiled.as_text() or "")
        products = pallas_products(traced.jaxpr.jaxpr, inner_passes)
        for kernel in kernels:
            kernel |= products.get(kernel["name"], {"dots": 0, **NO_LOOP})
        return {"memory": asdict(Memory.of(compiled)), "kernels": kernels, "seconds": seconds}

    def tidy(self, number: int) -> None:
        """Of what XLA left behind, only the binaries stay."""
        shutil.rmtree(self.folder / f"unit{number}", ignore_errors=True)
        for pattern in ("*.ll", "*.o"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def _launches(self, text: str, hlo: str) -> list[dict]:
        """The launches, those of Pallas kernels with the file that holds the kernel."""
        configs = _pallas_configs(hlo)
        self._learn(configs)
        launches = _parse_launches(text)
        for launch in launches:
            given = configs.get(launch["name"], set())
            known = [self.binaries.get((self.arch, config)) for config in given]
            launch["binary"] = known[0] if len(known) == 1 else None
        return launches

    def _learn(self, configs: dict[str, set[str]]) -> None:
        """Which file holds which of these kernels, where that is certain."""
        new = set(self.folder.glob("*.hsaco")) - self.seen
        self.seen |= new
        fresh: dict[str, list[str]] = {}
        for path in new:
            for name in _kernel_names(path):
                fresh.setdefault(name, []).append(path.name)
                self.named.setdefault((self.arch, name), []).append(path.name)
        for name, given in configs.items():
            # No new file: it was compiled before, and if only one has this name, it is that one.
            files = fresh.get(name) or self.named.get((self.arch, name), [])
            if len(given) == 1 and len(files) == 1:
                self.binaries.setdefault((self.arch, min(given)), files[0])


def resolve(function: str) -> Callable[..., tuple[Any, ...]]:
    """ "package.module:name" or "path/file.py:name" -> the function."""
    where, _, name = function.rpartition(":")
    if not where or not name:
        raise ValueError(f"'{function}' is neither package.module:name nor path/file.py:name")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), name)
    known = "unit_" + hashlib.sha256(where.encode()).hexdigest()[:8]
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, where)
        assert spec and spec.loader, where
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return getattr(sys.modules[known], name)


def _renamed(f: Callable, name: str) -> Callable:
    def call(*args):
        return f(*args)

    call.__name__ = call.__qualname__ = name
    return call


def _compile_traced(traced: Any, mesh: Mesh, notes: Any, options: dict) -> dict[str, Any]:
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = traced.lower(lowering_platforms=("rocm",))
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - start
    return {
        "memory": asdict(Memory.of(compiled)),
        "kernels": [],
        "seconds": seconds,
        "notes": notes,
    }


@functools.cache
def _devices(card: targets.Card, count: int) -> list[Any]:
    topology = topologies.get_topology_desc(
        f"{card.name} {count}",
        "rocm",
        target_config=targets.target_config(card),
        topology=f"1x{count}x1",
    )
    return list(topology.devices)


def _mesh(card: targets.Card) -> Mesh:
    return Mesh(np.array(_devices(card, 1)), ("card",))


def _on(mesh: Mesh, args: tuple) -> tuple:
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tuple(args)
    )


def _parse_launches(text: str) -> list[dict]:
    return [
        {
            "name": name,
            "grid": (int(x), int(y), int(z)),
            "threads": int(tx) * int(ty) * int(tz),
            "dynamic_lds_bytes": int(lds or 0),
        }
        for name, x, y, z, tx, ty, tz, lds in LAUNCH.findall(text)
    ]


def _pallas_configs(hlo: str) -> dict[str, set[str]]:
    """Kernel name -> what Pallas calls of that name were given (their IR and launch)."""
    configs: dict[str, set[str]] = {}
    for config in PALLAS.findall(hlo):
        for name in re.findall(r'[ {,]name = "([^"]*)"', config)[-1:]:
            digest = hashlib.sha256(config.encode()).hexdigest()
            configs.setdefault(name, set()).add(digest)
    return configs


def _kernel_names(path: Path) -> list[str]:
    return [s.name[:-3] for s in elf.read(path).symbols() if s.name.endswith(".kd")]


def pallas_products(jaxpr: Any, passes: int | None = None) -> dict[str, dict[str, int]]:
    """Pallas kernel -> fields of `compile.Kernel`; of kernels with one name, the last.

    `passes` are those of inner loops whose length the source does not say.
    """
    found: dict[str, dict[str, int]] = {}
    for equation in jaxpr.eqns:
        for inner in _inner(equation):
            if equation.primitive.name == "pallas_call":
                name = str(equation.params["name"])
                found[name] = {"dots": len(_products(inner)), **_heaviest_loop(inner, passes)}
            else:
                found |= pallas_products(inner, passes)
    return found


NO_LOOP = {"loop_flops": 0, "loop_depth": 0, "inner_passes": 1}


def _heaviest_loop(jaxpr: Any, passes: int | None) -> dict[str, int]:
    """The outermost loop with the most FLOP in a pass; where it holds loops of unknown length, the
    heaviest of those instead."""
    best = NO_LOOP
    for _, body in _loops(jaxpr):
        inner = [(e.params.get("length", passes), sum(_products(b))) for e, b in _loops(body)]
        if any(length is None for length, _ in inner):
            deeper = _heaviest_loop(body, passes)
            found = deeper | {"loop_depth": deeper["loop_depth"] + 1}
        else:
            again = sum((length - 1) * flops for length, flops in inner)
            found = {
                "loop_flops": sum(_products(body)) + again,
                "loop_depth": 0,
                "inner_passes": max((length for length, _ in inner), default=1),
            }
        best = max(best, found, key=lambda x: x["loop_flops"])
    return best


def _loops(jaxpr: Any) -> list[tuple[Any, Any]]:
    """(equation, body) of the outermost loops that have products."""
    found = []
    for equation in jaxpr.eqns:
        for inner in _inner(equation):
            if equation.primitive.name not in ("while", "scan"):
                found += _loops(inner)
            elif _products(inner):
                found.append((equation, inner))
    return found


def _products(jaxpr: Any) -> list[int]:
    """FLOP of each product, inside loops and branches too."""
    own = [_flops(e) for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    return own + [n for e in jaxpr.eqns for j in _inner(e) for n in _products(j)]


def _flops(product: Any) -> int:
    """Two for each multiplication of a dot_general."""
    (contracted, _), _ = product.params["dimension_numbers"]
    left = product.invars[0].aval.shape
    length = math.prod(left[axis] for axis in contracted)
    return 2 * length * math.prod(product.outvars[0].aval.shape)


def _inner(equation: Any) -> list[Any]:
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
    # A closed jaxpr holds an open one, which alone has equations.
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if _is_jaxpr(leaf)]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


if __name__ == "__main__":
    main()
