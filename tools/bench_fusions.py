"""Whether a fused kernel for norms, rope, SwiGLU or LoRA could win: python tools/bench_fusions.py

Times what XLA makes of our own functions, forward and VJP, in bfloat16 on the device at hand, and
divides by the least time that their bytes take at the speed of a large copy measured here (for
LoRA: by the time of the same matmuls without the adapter). A hand-written kernel cannot win more
than what is left above 1. Random data; medians; buffers rotate so that nothing stays in the L2.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.model.norm import rms_norm
from mud_puppy.model.rope import rotate
from mud_puppy.weights import Lora, linear, linears

COPIES = 4
BF16 = 2  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    args = parser.parse_args()
    N, D, F = args.tokens, args.width, args.mlp
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16, N {N} D {D} F {F}")
    speed = copy_speed(N, F)
    print(f"copy: {speed / 1e12:.2f} TB/s")
    for name, f, shapes in elementwise(N, D, F):
        bench_bytes(name, f, shapes, speed)
    bench_lora(N, D, F)


def elementwise(N: int, D: int, F: int) -> list[tuple]:
    """(name, f, argument shapes)"""
    H, hd = D // 128, 128
    norm = partial(rms_norm, eps=1e-5)
    cos = jnp.ones((1, N, hd // 2), jnp.float32)
    return [
        ("rmsnorm", norm, [(N, D), (D,)]),
        ("residual + rmsnorm", lambda x, h, s: norm(x + h, s), [(N, D), (N, D), (D,)]),
        ("swiglu", lambda g, u: jax.nn.silu(g) * u, [(N, F), (N, F)]),
        ("rope of q", lambda q: rotate(q, cos, cos), [(1, N, H, hd)]),
    ]


def bench_bytes(name: str, f: Callable, shapes: list, speed: float) -> None:
    sets = [tuple(normal(i, s) for s in shapes) for i in range(COPIES)]
    out = jax.eval_shape(f, *sets[0])
    inputs = sum(x.size for x in sets[0]) * BF16
    forward = inputs + out.size * BF16
    backward = 2 * inputs + out.size * BF16  # inputs, their gradients, the cotangent

    def vjp(args: Any, g: Any) -> Any:
        return jax.vjp(f, *args)[1](g)

    g = normal(9, out.shape)
    report(name, "forward", time_ms(jax.jit(f), sets), forward / speed * 1e3)
    report(name, "vjp", time_ms(jax.jit(vjp), [(s, g) for s in sets]), backward / speed * 1e3)


def bench_lora(N: int, D: int, F: int, rank: int = 16) -> None:
    """Gate and up, then down, as one layer's MLP runs them: the adapter's cost over none."""
    up, down = normal(1, (F, D)), normal(2, (D, F))
    x, g = normal(3, (N, D)), normal(4, (N, D))

    def factors(w: Any) -> tuple:
        a, b = normal(5, (rank, w.shape[1])), normal(6, (w.shape[0], rank))
        return a.astype(jnp.float32), b.astype(jnp.float32)

    def mlp(train: Any, x: Any) -> Any:
        gate, up, down = train
        h, u = linears(x, [gate, up])
        return linear(jax.nn.silu(h) * u, down)

    def split(ab: Any, base: Any) -> Any:
        return [Lora(w, a, b, jnp.float32(2.0)) for w, (a, b) in zip(base, ab, strict=True)]

    base = [up, up * 0.5, down]
    ab = [factors(w) for w in base]

    def plain(base: Any, x: Any, g: Any) -> Any:
        y, pull = jax.vjp(lambda x: mlp(base, x), x)
        return y, pull(g)

    def adapted(ab: Any, base: Any, x: Any, g: Any) -> Any:
        y, pull = jax.vjp(lambda ab, x: mlp(split(ab, base), x), ab, x)
        return y, pull(g)

    bare = time_ms(jax.jit(plain), [(base, x, g)])
    report("MLP + LoRA r16", "vjp", time_ms(jax.jit(adapted), [(ab, base, x, g)]), bare)


def report(name: str, what: str, ms: float, floor: float) -> None:
    print(f"{name:22s} {what:8s} {ms:8.3f} ms   floor {floor:8.3f} ms   {ms / floor:5.2f}x")


def copy_speed(N: int, F: int) -> float:
    """Bytes a second, read and written, of x + 1 on [N, F] bfloat16."""
    sets = [(normal(i, (N, F)),) for i in range(COPIES)]
    return 2 * N * F * BF16 / time_ms(jax.jit(lambda x: x + 1), sets) * 1e3


def normal(seed: int, shape: tuple) -> Any:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def time_ms(f: Callable, sets: list, rounds: int = 9, calls: int = 24) -> float:
    """Median over rounds of the time of one call, the argument sets in turn."""
    for s in sets:
        jax.block_until_ready(f(*s))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = [f(*sets[i % len(sets)]) for i in range(calls)][-1]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return statistics.median(times)


if __name__ == "__main__":
    main()
