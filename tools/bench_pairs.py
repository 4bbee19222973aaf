"""What a DPO step costs: with the prompt of each pair twice, with it once (`shared_prefix`), and
beside a supervised step of as many tokens; random weights of real shapes.

    python tools/bench_pairs.py --shape llama-3.2-1b --prompt 0.5 0.8

The variants of one share of prompt tokens are timed in turns, so that all see the same card. Prints
a line a variant: the median step, what it saves of the step with two prompts, and the memory that
its compiled step asks for. Runs on whatever device JAX finds.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from bench_step import batch_of, random_run

from mud_puppy.config import DTYPES, Config
from mud_puppy.data import PairExample, collate_pairs
from mud_puppy.data.example import Example
from mud_puppy.parallel import make_mesh
from mud_puppy.plan.shapes import SHAPES
from mud_puppy.run.prepare import Prepared


@dataclass
class Variant:
    """A step, ready to be timed."""

    name: str
    run: Prepared
    batch: dict[str, np.ndarray]
    memory: int
    state: Any
    times: list[float] = field(default_factory=list)

    def step(self) -> None:
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.run.step(self.state, self.batch))
        self.times.append(time.perf_counter() - start)


def pairs(args: argparse.Namespace, share: float, vocab: int, once: bool) -> dict[str, np.ndarray]:
    """A batch [1, rows, T] of random pairs, of which `share` of each sequence is the prompt."""
    rng = np.random.default_rng(0)
    prompt = round(args.length * share)

    def answer(prompted: np.ndarray) -> Example:
        told = rng.integers(0, vocab, args.length - prompt).astype(np.int32)
        weights = np.zeros(args.length, np.float32)
        weights[prompt:] = 1.0
        return Example(np.concatenate([prompted, told]), weights, "random")

    def pair() -> PairExample:
        prompted = rng.integers(0, vocab, prompt).astype(np.int32)
        return PairExample(answer(prompted), answer(prompted), prompt, prompt_once=once)

    rows = [[pair() for _ in range(args.per_row)] for _ in range(args.rows)]
    # A multiple of 128, as the loader's rows are.
    length = -(-sum(p.size for p in rows[0]) // 128) * 128
    batch = collate_pairs(rows, length, args.per_row, shared_prefix=once)
    return {name: x[None] for name, x in batch.items()}


def variant(args: argparse.Namespace, name: str, share: float, mesh: jax.sharding.Mesh) -> Variant:
    method = {"tune": args.tune, "method": "preference"} if name != "sft" else {"method": args.tune}
    config = Config.load(
        {"model": "random", "dataset": "random", "output": "random", "precision": args.precision}
        | {"gradient_checkpointing": args.remat, "shared_prefix": name == "once"}
        | method
    )
    arch, run = random_run(config, args.shape, mesh)
    if name == "sft":
        tokens = 2 * args.per_row * args.length
        batch = batch_of(np.random.default_rng(0), args.rows, tokens, arch.vocab_size, args.length)
    else:
        batch = pairs(args, share, arch.vocab_size, once=name == "once")
    used = run.lower(batch).compile().memory_analysis()
    assert used is not None
    memory = used.argument_size_in_bytes + used.output_size_in_bytes
    memory += used.temp_size_in_bytes - used.alias_size_in_bytes
    made = Variant(name, run, batch, memory, run.state)
    made.step()  # compiles
    made.step()
    made.times.clear()
    return made


def compare(args: argparse.Namespace, share: float, mesh: jax.sharding.Mesh) -> None:
    made = [variant(args, name, share, mesh) for name in ("sft", "twice", "once")]
    for _ in range(args.steps):
        for one in made:
            one.step()
    sft, twice, _ = made
    before = statistics.median(twice.times)
    for one in made:
        took = statistics.median(one.times)
        tokens = one.batch["tokens"].size
        print(
            f"{args.shape} {args.tune} {args.precision}, {args.rows} rows of {args.per_row} pairs "
            f"of 2 x {args.length}, prompt {share:.0%}: {one.name:5s} {tokens} tokens, "
            f"{took * 1e3:.1f} ms (min {min(one.times) * 1e3:.1f}, max {max(one.times) * 1e3:.1f})"
            f", {1 - took / before:+.1%} of twice; {one.memory / 2**30:.2f} GiB, "
            f"{one.memory / sft.memory:.3f}x sft; {jax.devices()[0].device_kind}, "
            f"jax {jax.__version__}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--tune", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--per-row", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="tokens of prompt and one answer")
    parser.add_argument("--prompt", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    mesh = make_mesh(None)
    with jax.set_mesh(mesh):
        for share in args.prompt:
            compare(args, share, mesh)


if __name__ == "__main__":
    main()
