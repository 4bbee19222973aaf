"""Time attention on this machine's GPU: our kernels, cuDNN, XLA, and JAX's own Pallas kernel.

    python tools/bench_attention.py                      # the table of docs/attention.md
    python tools/bench_attention.py --case packed --head 64 --implementation pallas cudnn

Median milliseconds of forward, and of forward and backward in one compiled call; TFLOP/s of the
difference count five products for the backward pass and the lower triangle of a causal mask, for
packed rows too, so that theirs can be compared with whole rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mud_puppy.kernels import flash_attention

IMPLEMENTATIONS = ("pallas", "cudnn", "xla", "stock")


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    T: int
    H: int
    K: int
    D: int
    Dv: int
    segment: int | None = None  # tokens of each example packed into a row

    def flops(self) -> tuple[float, float]:
        """Forward, backward."""
        pairs = self.B * self.H * self.T**2
        return pairs * (self.D + self.Dv), pairs * (3 * self.D + 2 * self.Dv)


def cases(head: int) -> Iterator[Case]:
    yield Case("causal", 4, 4096, 16, 16, head, head)
    yield Case("packed", 4, 4096, 16, 16, head, head, segment=512)
    yield Case("grouped", 4, 4096, 32, 8, head, head)
    yield Case("as many key heads", 4, 4096, 32, 32, head, head)
    if head == 128:
        yield Case("latent (192, 128)", 2, 4096, 16, 16, 192, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--head", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--implementation", nargs="+", default=["pallas", "cudnn", "stock"])
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__, options.dtype)
    print("| case | head | implementation | forward ms | TFLOP/s | backward ms | TFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    for head in options.head:
        for case in cases(head):
            for name in options.implementation if options.case in case.name else ():
                print(_line(case, name, options.dtype), flush=True)


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def _line(case: Case, name: str, dtype: str) -> str:
    head = f"| {case.name} | {case.D} | {name} |"
    try:
        forward, both = _times(case, name, dtype)
    except Exception as error:  # what an implementation cannot do is a line of the table
        return f"{head} {type(error).__name__}: {str(error).splitlines()[0][:80]} |"
    rates = [x / ms / 1e9 for x, ms in zip(case.flops(), (forward, both - forward), strict=True)]
    return f"{head} {forward:.3f} | {rates[0]:.0f} | {both - forward:.3f} | {rates[1]:.0f} |"


def _times(case: Case, name: str, dtype: str) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    B, T = case.B, case.T
    shapes = [(B, T, case.H, case.D), (B, T, case.K, case.D), (B, T, case.K, case.Dv)]
    shapes.append((B, T, case.H, case.Dv))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(a, s, dtype) for a, s in zip(keys, shapes, strict=True))
    ids = None
    if case.segment:
        ids = jnp.broadcast_to(jnp.arange(T) // case.segment, (B, T)).astype(jnp.int32)
    attend = _attend(name, case, ids)
    forward = jax.jit(attend)
    both = jax.jit(lambda q, k, v, g: jax.vjp(attend, q, k, v)[1](g))
    return _median_ms(forward, q, k, v), _median_ms(both, q, k, v, g)


def _attend(name: str, case: Case, ids: Any) -> Callable:
    if name != "stock":
        return partial(flash_attention, segment_ids=ids, implementation=name)
    from jax.experimental.pallas.ops.gpu import attention

    def stock(q: Any, k: Any, v: Any) -> Any:
        k, v = (jnp.repeat(x, case.H // case.K, axis=2) for x in (k, v))
        return attention.mha(q, k, v, ids, sm_scale=case.D**-0.5, causal=True, num_stages=2)

    return stock


def _median_ms(f: Callable, *args: Any) -> float:
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        results = [f(*args) for _ in range(20)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) * 1e3 / 20)
    return statistics.median(times)


if __name__ == "__main__":
    main()
