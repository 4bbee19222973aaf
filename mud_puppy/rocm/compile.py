"""Compile JAX functions for an AMD card on a machine that has none.

    with Compiler(folder) as compiler:
        result = compiler.compile(Unit("package.module:build", {"rows": 512}, "RX 7900 XTX"))

A worker process, which has no device, loads XLA's ROCm plugin and compiles one unit after another;
the caller's own JAX is not touched. `folder` keeps the kernels' binaries (.hsaco), which `binary`
reads, in a folder of its own for each worker. The unit names a function that builds what is
compiled, so that it can cross to the worker.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.rocm import plugin, settings, standins, targets

START_S = 300.0  # for importing JAX and loading the plugin's 500 MB, seldom more than five


@dataclass(frozen=True)
class Unit:
    """What to compile, for which card.

    `function` is "package.module:name" or "path/file.py:name"; called with `arguments` (JSON
    values) it returns (callable, positional arguments as jax.ShapeDtypeStruct trees), and may add a
    third: how often loops within a kernel's main loop run, where the source does not say. It is
    called and traced while `kernels.target` names the card. `options` are XLA's debug options.

    With `devices` above 0 the function is given `devices=` as well, so many of the card (a list of
    jax.Device that can be compiled for), and returns (traced, mesh, notes): a `jax.stages.Traced`
    whose arguments are placed on them, the ambient mesh to lower it under, and JSON values that
    come back with the result. Its kernels are not looked at.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    card: str = "gfx1100"
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that one call needs on each device, and on the host for it, as XLA planned.

    `peak` is XLA's own estimate of what lives at once; what a device is asked for is `needed`.
    """

    argument: int
    output: int
    alias: int
    temp: int
    peak: int
    host: int

    @staticmethod
    def of(compiled: Any) -> "Memory":
        """Of a `jax.stages.Compiled`."""
        stats = compiled.memory_analysis()
        return Memory(
            argument=stats.argument_size_in_bytes,
            output=stats.output_size_in_bytes,
            alias=stats.alias_size_in_bytes,
            temp=stats.temp_size_in_bytes,
            peak=stats.peak_memory_in_bytes,
            host=stats.host_argument_size_in_bytes
            + stats.host_output_size_in_bytes
            - stats.host_alias_size_in_bytes
            + stats.host_temp_size_in_bytes,
        )

    @property
    def needed(self) -> int:
        """Arguments, results that take no argument's place, and one block of temporaries."""
        return self.argument + self.output - self.alias + self.temp


@dataclass(frozen=True)
class Kernel:
    """One kernel launch: its symbol, how it is launched, the binary that holds it, its source.

    `binary` is None for the kernels that XLA makes itself, and for Pallas kernels of which several
    different ones have one name. Of the Pallas source: `dots` matrix products, and the loop with
    the most of them (an outermost one, unless its inner loops are of unknown length: then
    `loop_depth` levels further in), `loop_flops` in one pass by the whole block, while the loops
    within it make `inner_passes` each.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int  # of a block
    dynamic_lds_bytes: int  # asked for at launch, beside what the binary declares
    dots: int
    loop_flops: int
    loop_depth: int
    inner_passes: int
    binary: Path | None


@dataclass(frozen=True)
class Compiled:
    unit: Unit
    memory: Memory
    kernels: tuple[Kernel, ...]  # in launch order; a loop's body stands here once
    seconds: float
    notes: Any = None


class CompileError(RuntimeError):
    """Building, tracing or compiling a unit failed; the message ends with the compiler's words,
    which `said` is alone."""

    def __init__(self, unit: Unit, said: str):
        super().__init__(f"{unit.function} {dict(unit.arguments)}: {said}")
        self.said = said


class Compiler:
    """A worker process that compiles units; it starts with the first and ends with the block."""

    def __init__(self, folder: Path | None = None, plugin_folder: Path | None = None):
        self._library = plugin.find(plugin_folder)
        self._scratch = None if folder else tempfile.TemporaryDirectory(prefix="mud-puppy-rocm-")
        self.folder = Path(folder or self._scratch.name).resolve()  # pyright: ignore
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"binaries cannot be kept in {self.folder}: {problem}") from problem
        self._process: subprocess.Popen | None = None
        self._own = self.folder  # of the worker that runs

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._scratch:
            self._scratch.cleanup()

    def compile(self, unit: Unit, timeout_s: float = 600.0) -> Compiled:
        """Raises CompileError; after a crash or a time-out the next unit gets a new worker.

        Raises UserError for an unknown card, and where no worker can start.
        """
        targets.card(unit.card)  # an unknown card is the caller's mistake, not the compiler's
        answer = self._ask(unit, timeout_s)
        if "error" in answer:
            raise CompileError(unit, answer["error"])
        kernels = [
            Kernel(**{**k, "grid": tuple(k["grid"]), "binary": self._path(k["binary"])})
            for k in answer["kernels"]
        ]
        memory = Memory(**answer["memory"])
        return Compiled(unit, memory, tuple(kernels), answer["seconds"], answer.get("notes"))

    def _path(self, name: str | None) -> Path | None:
        return self._own / name if name else None

    def _ask(self, unit: Unit, timeout_s: float) -> dict[str, Any]:
        line = json.dumps(
            {
                "function": unit.function,
                "arguments": dict(unit.arguments),
                "card": targets.card(unit.card).name,
                "options": dict(unit.options),
                "devices": unit.devices,
            }
        )
        if self._process is None:
            self._start()
        process = self._process
        assert process and process.stdin
        said = self._log.stat().st_size
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return {"error": self._last_words(said)}
        answer = self._answer(timeout_s)
        if answer is None:
            self._stop()
            return {"error": f"compiling took longer than {timeout_s:g} s"}
        return answer or {"error": self._last_words(said)}

    def _answer(self, timeout_s: float) -> dict[str, Any] | None:
        """The worker's next line; empty if it died, None if it says nothing for so long."""
        assert self._process and self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not ready:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else {}

    def _start(self) -> None:
        # XLA's binaries tell nothing of who wanted them: no other worker's may lie beside them.
        self._own = Path(tempfile.mkdtemp(prefix="worker-", dir=self.folder))
        environment = dict(os.environ)
        environment |= {
            "XLA_FLAGS": " ".join(settings.FLAGS),  # what a run on the card has
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "TF_ROCM_KEEP_XLA_TEMPFILES": "1",
            "TMPDIR": str(self._own),
            "TF_CPP_MIN_LOG_LEVEL": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from it leaves no binary
        }
        command = [sys.executable, "-m", "mud_puppy.rocm.worker", str(self._library)]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [*command, str(standins.default_cache())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        answer = self._answer(START_S)
        if answer is None:
            self._stop()
            raise UserError(f"XLA's ROCm compiler did not start within {START_S:g} s")
        if not answer.get("ready"):
            words = answer.get("fault") or self._last_words(0)
            self._stop()
            raise UserError(words)

    @property
    def _log(self) -> Path:
        return self._own / "worker.log"

    def _last_words(self, said: int) -> str:
        """What the worker wrote to its log after that many bytes, before it died."""
        assert self._process
        try:
            status = str(self._process.wait(timeout=10))
        except subprocess.TimeoutExpired:
            status = "none: it hangs"
        self._stop()
        log = self._log.read_bytes()[said:].decode(errors="replace")
        words = log.strip().splitlines()[-12:]
        return "\n".join([f"the compiler crashed (exit status {status})", *words])

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()


def compile_all(units: Iterable[Unit], folder: Path | None = None) -> list[Compiled | CompileError]:
    """Compile every unit in one worker; a unit that fails gives its error in its place."""
    results: list[Compiled | CompileError] = []
    with Compiler(folder) as compiler:
        for unit in units:
            try:
                results.append(compiler.compile(unit))
            except CompileError as error:
                results.append(error)
    return results


def available() -> bool:
    """Whether a plugin that fits this JAX is here."""
    try:
        plugin.find()
    except UserError:
        return False
    return True
