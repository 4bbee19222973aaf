"""Tokens/s and peak memory of the training step with random weights of real shapes.

    python tools/bench_step.py --shape llama-3.2-1b --batch-size 8 --method lora

Runs on whatever device JAX finds; prints one line a configuration with device and versions.
"""

import argparse
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from mud_puppy.config import DTYPES, Config
from mud_puppy.model import Arch, abstract, axes, init
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.plan.shapes import SHAPES, find_shape
from mud_puppy.run.prepare import Prepared, computed, prepare, scheme, transformed
from mud_puppy.weights import quantizer


def batch_of(rng: np.random.Generator, rows: int, length: int, vocab: int, segment: int) -> dict:
    """Random tokens; `segment` tokens an example (0: one example a row)."""
    shape = (1, rows, length)
    slot = np.broadcast_to(np.arange(length), shape)
    each = segment or length
    return {
        "tokens": rng.integers(0, vocab, shape).astype(np.int32),
        "targets": rng.integers(0, vocab, shape).astype(np.int32),
        "positions": (slot % each).astype(np.int32),
        "segment_ids": (slot // each + 1).astype(np.int32),
        "weights": np.ones(shape, np.float32),
    }


def random_run(config: Config, shape: str, mesh: jax.sharding.Mesh) -> tuple[Arch, Prepared]:
    """A run of random weights, made as `load_params` reads them: a tensor at a time. The mesh is to
    be ambient."""
    model, _ = abstract(find_shape(shape))
    stored = DTYPES[config.precision] if config.adapts else "float32"
    encode = quantizer(scheme(config)) if config.trains == "qlora" else None
    params = transformed(config, init(model.arch, jax.random.key(0), stored, encode))
    params = jax.device_put(params, shardings(mesh, axes(model.arch), params))
    return model.arch, prepare(config, computed(config, model), params, mesh, 1000)


def tell(phase: str) -> None:
    print(f"{time.perf_counter():8.1f} s: {phase}", file=sys.stderr, flush=True)


def _gib(name: str) -> str:
    stats = jax.devices()[0].memory_stats() or {}
    return f"{stats.get(name, 0) / 2**30:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--method", choices=("lora", "full", "qlora", "qat"), default="lora")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config keys")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--segment", type=int, default=0, help="tokens of a packed example")
    parser.add_argument("--mesh", help="e.g. data=2,fsdp=4; default: all devices on fsdp")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    config = Config.load(
        dict(
            model="random",
            dataset="random",
            output="random",
            method=args.method,
            precision=args.precision,
            gradient_checkpointing=args.remat,
            **dict(pair.split("=", 1) for pair in args.set),
        )
    )
    # The plan is read off a step compiled ahead of time; the first step then finds it here.
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    mesh = make_mesh(args.mesh)
    with jax.set_mesh(mesh):
        tell("init")
        arch, run = random_run(config, args.shape, mesh)
        tell(f"params: {_gib('bytes_in_use')}, peak of making them {_gib('peak_bytes_in_use')}")
        rng = np.random.default_rng(0)
        batch = batch_of(rng, args.batch_size, args.length, arch.vocab_size, args.segment)
        tell("trace")
        lowered = run.lower(batch)
        tell("compile")
        plan = lowered.compile().memory_analysis()
        tell("steps")
        assert plan is not None
        state, start = run.state, time.perf_counter()
        state, metrics = jax.block_until_ready(run.step(state, batch))
        compile_s, times = time.perf_counter() - start, []
        for _ in range(args.steps):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(run.step(state, batch))
            times.append(time.perf_counter() - start)
    step_s = statistics.median(times)
    planned = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )
    print(
        f"{args.shape} {' '.join([args.method, *args.set])} {args.precision} "
        f"batch {args.batch_size} x {args.length} "
        f"segment {args.segment} remat {args.remat} mesh {dict(mesh.shape)}: "
        f"{args.batch_size * args.length / step_s:,.0f} tokens/s, step {step_s * 1e3:.1f} ms "
        f"(min {min(times) * 1e3:.1f}, max {max(times) * 1e3:.1f}), "
        f"plan {planned / 2**30:.2f} GiB (temporary {plan.temp_size_in_bytes / 2**30:.2f}), "
        f"peak {_gib('peak_bytes_in_use')}, first step {compile_s:.1f} s, "
        f"loss {float(metrics['loss'][0] / metrics['loss'][1]):.3f}; "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
        flush=True,
    )


if __name__ == "__main__":
    main()
