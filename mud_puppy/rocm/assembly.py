"""Disassembly and cycle estimates by LLVM's tools, for tuning and for checking `instructions`.

Needs llvm-objdump and llvm-mca of LLVM 20 or newer (Debian: `apt install llvm-22`); LLVM 19 knows
no gfx950 and refuses the bits that newer compilers leave in fields that an instruction ignores.
llvm-mca knows neither memory latency nor the other waves: a guide for choosing tiles, not a speed.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mud_puppy.errors import UserError
from mud_puppy.rocm import elf, instructions

LEFT_OUT = re.compile(r"s_(c?branch|endpgm|wait|barrier|delay)")
TIMEOUT_S = 10  # it takes well under one
PASSES = 20  # long enough for the start not to show
VERSIONS = range(30, 19, -1)
LINE = re.compile(r"\s+(\S.*?)\s*// ([0-9A-F]{12}): ((?:[0-9A-F]{8} ?)+)")


class NoEstimate(ValueError):
    """llvm-mca cannot say how long a loop takes."""


@dataclass(frozen=True)
class Line:
    at: int  # byte in the kernel's code
    size: int
    text: str


def tool(name: str) -> str:
    """The name of an LLVM tool, the newest; UserError where there is none that is new enough."""
    for candidate in (f"{name}-{v}" for v in VERSIONS):
        if shutil.which(candidate):
            return candidate
    if shutil.which(name):
        said = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"LLVM version (\d+)", said)
        if found and int(found[1]) >= VERSIONS[-1]:
            return name
    raise UserError(f"{name} {VERSIONS[-1]} or newer was not found; on Debian: apt install llvm-22")


def disassemble(path: Path, kernel: str) -> list[Line]:
    """The kernel's code as LLVM reads it. What it cannot read has text that begins ".long".

    Raises UserError where there is no LLVM, NoEstimate where it refuses the file.
    """
    symbol = next(s for s in elf.read(path).symbols() if s.name == kernel)
    command = [tool("llvm-objdump"), "-d", f"--disassemble-symbols={kernel}", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise NoEstimate(f"llvm-objdump refused {path}:\n{result.stderr[:1000]}")
    rows = (LINE.match(line) for line in result.stdout.splitlines())
    lines = [Line(int(m[2], 16) - symbol.address, 4 * len(m[3].split()), m[1]) for m in rows if m]
    return [line for line in lines if line.at < symbol.size]


def cycles(lines: Iterable[Line], loop: instructions.Loop, arch: str) -> float:
    """llvm-mca's cycles for one pass of a loop of that code.

    Jumps, waits and barriers are left out: dependences are modelled without them, and what a wave
    waits for at a barrier depends on the others. Raises NoEstimate.
    """
    inside = (x.text for x in lines if loop.start <= x.at < loop.end)
    body = [_known(text) for text in inside if not LEFT_OUT.match(text)]
    result = _mca(body, arch)
    refused = {int(n) - 1 for n in re.findall(r"^<stdin>:(\d+):", result.stderr, re.MULTILINE)}
    if refused:
        body = [_first_half(text) if i in refused else text for i, text in enumerate(body)]
        result = _mca(body, arch)
    found = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    if not found:
        raise NoEstimate(f"llvm-mca refused the loop:\n{result.stderr[:1000]}")
    return int(found[1]) / PASSES


def _mca(body: list[str], arch: str) -> subprocess.CompletedProcess[str]:
    command = [tool("llvm-mca"), "-mtriple=amdgcn", f"-mcpu={arch}", f"-iterations={PASSES}"]
    text = "\n".join(body)
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as slow:
        # Seen with long loops of CDNA: it ran for ten minutes.
        raise NoEstimate(f"llvm-mca took longer than {TIMEOUT_S} s") from slow


def _known(text: str) -> str:
    return "v_nop" if text.startswith(".long") else text


def _first_half(text: str) -> str:
    """Of a dual instruction, the first operation: it takes the same slot. LLVM 22 prints pairs for
    gfx1201 (one register as the second source of both) that it does not read."""
    first = text.split(" :: ")[0].replace("v_dual_", "v_")
    return first + ", vcc_lo" if "v_cndmask" in first else first
