"""What works on this device: `python -m mud_puppy.doctor.probe`, one JSON object a line.

Each check says what it is about to do before it does it, so that whoever reads the lines (`watch`)
knows where a process ended that a driver killed. Small shapes: the answer is right or wrong, not
fast or slow.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mud_puppy import kernels
from mud_puppy.doctor.watch import Check, Device
from mud_puppy.kernels import selfcheck, target
from mud_puppy.model import scan_layers
from mud_puppy.parallel.host import pinned_host_fault

LONGEST = 300  # characters of a problem
Result = tuple[str | None, str]  # what is wrong, what else is known


@dataclass(frozen=True)
class Step:
    kind: str
    name: str
    run: Callable[[], Result]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what drivers print is no answer

    def say(**row: Any) -> None:
        print(json.dumps(row), file=answers, flush=True)

    for device in devices():
        say(device=dataclasses.asdict(device))
    say(doing="making the cases")
    for step in steps():
        say(doing=f"{step.kind} {step.name}")
        say(check=dataclasses.asdict(check(step)))


def devices() -> Iterator[Device]:
    """JAX's local devices; the first call starts JAX."""
    here = target.current()
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        limit = int(stats.get("bytes_limit", 0))
        yield Device(here.platform, here.arch, device.device_kind, limit)


def steps() -> list[Step]:
    """All that is tried here, kernels first."""
    found = [
        Step("kernel", name, functools.partial(kernel, name, case))
        for name, case in kernels.selfchecks()
    ]
    return [
        *found,
        Step("pinned_host", "an array to the host's memory and back", pinned_host),
        Step("offload", "gradients of gradient_checkpointing: offload", offload),
        Step("all-reduce", f"over {jax.local_device_count()} device(s)", all_reduce),
        Step("matmul", "bfloat16", functools.partial(matmul, jnp.bfloat16, 2.0**-7)),
        Step("matmul", "float32", functools.partial(matmul, jnp.float32, 1e-3)),
    ]


def check(step: Step) -> Check:
    """Runs a step; what it raises is what is wrong."""
    try:
        problem, note = step.run()
    except Exception as error:  # whatever the compiler or the driver raises
        problem, note = f"{type(error).__name__}: {error}", ""
    if problem:  # of a compiler's pages the first line says what it is about
        problem = problem.splitlines()[0][:LONGEST]
    return Check(step.kind, step.name, problem, note)


def kernel(name: str, case: selfcheck.Case) -> Result:
    return selfcheck.judge(name, case), ""


def pinned_host() -> Result:
    return pinned_host_fault(), ""


def offload() -> Result:
    """Gradients through three layers whose inputs wait on the host, against those kept here."""
    if pinned_host_fault() is not None:
        return None, "not tried, for it needs pinned_host"
    r = np.random.default_rng(0)
    w, x = (jnp.asarray(r.normal(size=s) / 8, jnp.float32) for s in ((3, 64, 64), (2, 16, 64)))

    def layers(blocks: Any, x: Any, cache: None, layer: Any) -> tuple[Any, None, None]:
        return jnp.tanh(x @ blocks[0]["w"]), cache, None

    def loss(w: Any, remat: str) -> Any:
        return (scan_layers(layers, [{"w": w}], x, None, 0, remat)[0] ** 2).sum()

    want, got = (
        np.asarray(jax.jit(jax.grad(functools.partial(loss, remat=remat)))(w))
        for remat in ("none", "offload")
    )
    error = _error(got, want)
    return (None if error <= 1e-3 else f"gradients differ by {error:.2g}"), ""


def all_reduce() -> Result:
    """The sum of one array a device, which every device gets."""
    local = jax.local_devices()
    mesh = Mesh(np.array(local), ("all",))
    x = np.random.default_rng(0).integers(-99, 99, (len(local), 4096)).astype(np.float32)
    of = jax.shard_map(
        lambda part: jax.lax.psum(part, "all"),
        mesh=mesh,
        in_specs=PartitionSpec("all"),
        out_specs=PartitionSpec(),
    )
    got = jax.jit(of)(x)
    parts = [np.asarray(shard.data)[0] for shard in got.addressable_shards]
    wrong = sum(not np.array_equal(part, x.sum(0)) for part in parts)
    return (f"{wrong} of {len(local)} devices got another sum" if wrong else None), ""


def matmul(dtype: Any, allowed: float) -> Result:
    """A product of 512 terms against float64; the error is in parts of the largest result."""
    r = np.random.default_rng(0)
    a, b = (jnp.asarray(r.normal(size=(512, 512)), dtype) for _ in range(2))
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    error = _error(np.asarray(jax.jit(jnp.matmul)(a, b), np.float64), want)
    note = f"error {error:.0e}"
    return (None if error <= allowed else f"{note}, allowed {allowed:.0e}"), note


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """NaN where there is one, which no bound allows."""
    return float(np.abs(got - want).max() / np.abs(want).max())


if __name__ == "__main__":
    main()
