"""How true a plan is: its peak against what the device says it took, for real shapes.

    python tools/plan_truth.py                    # on the GPU at hand: predicted and measured
    python tools/plan_truth.py --target mi300x    # the same configs by the compiler for a card

Weights are random. A case is planned in one process and run in another, which finds the compiled
step in a cache of its own: compiling tries kernels out, in memory that is no part of a step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from bench_step import batch_of, random_run

from mud_puppy.config import Config
from mud_puppy.parallel import make_mesh
from mud_puppy.plan import plan

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "1B full, 8 x 2,048": ("llama-3.2-1b", {"method": "full", "batch_size": 8}),
    "1B full, 8-bit states, 2 x 8,192": (
        "llama-3.2-1b",
        {"method": "full", "optimizer": "adamw_8bit", "batch_size": 2, "max_seq_length": 8192},
    ),
    "1B LoRA, 8 x 2,048": ("llama-3.2-1b", {"method": "lora", "batch_size": 8}),
    "8B LoRA, 4 x 2,048": ("llama-3.1-8b", {"method": "lora", "batch_size": 4}),
    "8B nf4, 1 x 2,048": ("llama-3.1-8b", {"method": "qlora", "batch_size": 1}),
    "8B int4 and int8 embeddings, 1 x 8,192": (
        "llama-3.1-8b",
        {
            "method": "qlora",
            "quant_backend": "int4",
            "quant_embeddings": True,
            "batch_size": 1,
            "max_seq_length": 8192,
        },
    ),
    "8B nf4 r32, offload and tiles, 1 x 32,768": (
        "llama-3.1-8b",
        {
            "method": "qlora",
            "lora_r": 32,
            "quant_embeddings": True,
            "batch_size": 1,
            "max_seq_length": 32768,
            "gradient_checkpointing": "offload",
            "sequence_tile": 2048,
        },
    ),
}


def config_of(name: str) -> Config:
    shape, keys = CASES[name]
    return Config.load({"model": shape, "dataset": "-", "output": "-"} | keys)


def planned(name: str, target: str) -> dict[str, Any]:
    found = plan(config_of(name), target, shape=CASES[name][0], search=False)
    parts = {part: n / 2**30 for part, n in found.parts.items()}
    return {"gib": found.built.needed / 2**30, "parts": parts, "host": found.built.host / 2**30}


def measured(name: str, steps: int = 2) -> dict[str, Any]:
    config = config_of(name)
    mesh = make_mesh("data=1,fsdp=1")
    with jax.set_mesh(mesh):
        arch, run = random_run(config, CASES[name][0], mesh)
        before = memory()["peak_bytes_in_use"]
        rng = np.random.default_rng(0)
        batch = batch_of(rng, config.batch_size, config.max_seq_length, arch.vocab_size, 0)
        state = run.state
        for _ in range(steps):
            state, _ = jax.block_until_ready(run.step(state, batch))
        peak = memory()["peak_bytes_in_use"]
    return {
        "gib": peak / 2**30,
        "before": before / 2**30,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def memory() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {"peak_bytes_in_use": 0}


def apart(*words: str, cache: str) -> dict[str, Any]:
    """One case in a process of its own: a device's peak is that of a process."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="gpu")
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)))
    parser.add_argument("--plan", help="one case, as JSON (for this program itself)")
    parser.add_argument("--run", help="one case, as JSON (for this program itself)")
    args = parser.parse_args()
    if args.plan or args.run:
        print(json.dumps(planned(args.plan, args.target) if args.plan else measured(args.run)))
        return
    for name in [list(CASES)[i] for i in args.cases]:
        with tempfile.TemporaryDirectory() as cache:
            said = apart("--plan", name, "--target", args.target, cache=cache)
            row = f"| {name} | {said['gib']:.3f} |"
            if args.target == "gpu":
                found = apart("--run", name, cache=cache)
                apart_by = 100 * (said["gib"] / found["gib"] - 1)
                row += f" {found['gib']:.3f} | {apart_by:+.2f} % |"
                said |= {"found": found}
        print(row, json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
