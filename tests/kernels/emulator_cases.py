"""What the emulator runs: one entry a kernel and shape, odd shapes among them.

A case is a function -> (op, reference, arguments). `op(*arguments)` calls the kernels; `reference`
computes the same from the same arguments and is run in float64. All arguments are differentiated;
what is not differentiable is closed over. Keep them small: waves run one after another, at 2 to 30
seconds a case.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.kernels import (
    decode_attention,
    flash_attention,
    grouped_matmul,
    linear_cross_entropy,
)
from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import FP8
from mud_puppy.kernels.qgemm import qgemm
from mud_puppy.kernels.quantized_matmul import quantized_matmul

random = np.random.default_rng


def _normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jnp.asarray(random(seed).standard_normal(shape, np.float32)).astype(dtype)


def attention(
    T: int,
    S: int,
    H: int,
    K: int,
    D: int,
    Dv: int | None = None,
    dtype: Any = jnp.bfloat16,
    **options: Any,
):
    """Queries [1, T, H, D] on S keys of K heads."""
    shapes = (1, T, H, D), (1, S, K, D), (1, S, K, Dv or D)
    args = tuple(_normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    op = partial(flash_attention, **options)
    return partial(op, implementation="pallas"), partial(op, implementation="reference"), args


def attention_with_everything(T: int, H: int, D: int):
    """Two segments, softcap, sinks, dropout and a bias of the scores."""
    segments = jnp.asarray([[1] * (T // 3) + [2] * (T - T // 3)], jnp.int32)
    args = [_normal(i, 1, T, H, D) for i in range(3)]
    args += [_normal(3, H, dtype=jnp.float32), _normal(4, 1, H, T, T, dtype=jnp.float32)]
    options = dict(softcap=20.0, segment_ids=segments, dropout=0.1, dropout_seed=7)

    def op(implementation: str, q: Any, k: Any, v: Any, sinks: Any, bias: Any) -> Any:
        extras = dict(sinks=sinks, bias=bias, implementation=implementation)
        return flash_attention(q, k, v, **options, **extras)

    return partial(op, "pallas"), partial(op, "reference"), tuple(args)


def decode(B: int, T: int, S: int, H: int, K: int, D: int, **options: Any):
    """T new tokens a row on caches of S slots that are filled to different places."""
    args = (_normal(0, B, T, H, D), _normal(1, B, S, K, D), _normal(2, B, S, K, D))
    last = random(3).integers(S // 2, S - T, (B, 1))
    positions = jnp.asarray(last + np.arange(T), jnp.int32)

    def op(implementation: str, q: Any, k: Any, v: Any) -> Any:
        return decode_attention(q, k, v, positions, implementation=implementation, **options)

    return partial(op, "pallas"), partial(op, "reference"), args


def decode_pages(B: int, S: int, H: int, K: int, D: int, page: int):
    """One new token a row on caches in pages that lie in another order; softcap and sinks."""
    count = S // page
    args = (_normal(0, B, 1, H, D), *(_normal(i, B * count, page, K, D) for i in (1, 2)))
    args += (_normal(4, H, dtype=jnp.float32),)
    table = jnp.asarray(random(5).permutation(B * count).reshape(B, count), jnp.int32)
    positions = jnp.asarray(random(3).integers(S // 2, S - 1, (B, 1)), jnp.int32)
    options: dict[str, Any] = dict(page_table=table, softcap=20.0)

    def op(implementation: str, q: Any, k: Any, v: Any, sinks: Any) -> Any:
        extras = dict(sinks=sinks, implementation=implementation)
        return decode_attention(q, k, v, positions, **options, **extras)

    return partial(op, "pallas"), partial(op, "reference"), args


def decode_int8(B: int, T: int, S: int, H: int, K: int, D: int):
    """T new tokens a row on int8 caches, a scale for each slot and head."""
    k, v = (jnp.asarray(random(i).integers(-127, 128, (B, S, K, D)), jnp.int8) for i in (1, 2))
    scales = [jnp.asarray(random(i).uniform(0.005, 0.02, (B, S, K)), jnp.float32) for i in (3, 4)]
    last = random(3).integers(S // 2, S - T, (B, 1))
    positions = jnp.asarray(last + np.arange(T), jnp.int32)

    def op(implementation: str, q: Any) -> Any:
        extras: dict[str, Any] = dict(
            k_scales=scales[0], v_scales=scales[1], implementation=implementation
        )
        return decode_attention(q, k, v, positions, **extras)

    return partial(op, "pallas"), partial(op, "reference"), (_normal(0, B, T, H, D),)


def cross_entropy(T: int, D: int, V: int, *, frozen: bool = False, **options: Any):
    """T tokens, a vocabulary of V, some targets ignored; a frozen head has no gradient."""
    x, head = _normal(0, 1, T, D), _normal(1, V, D) / D**0.5
    targets = jnp.asarray(random(2).integers(0, V, (1, T)), jnp.int32).at[0, ::7].set(-100)

    def op(implementation: str, x: Any, head: Any = head) -> Any:
        return linear_cross_entropy(x, head, targets, implementation=implementation, **options)

    return partial(op, "pallas"), partial(op, "reference"), (x,) if frozen else (x, head)


def quantized(
    format: str,
    rows: int,
    out: int,
    n: int,
    *,
    minimum: bool = False,
    stacked: bool = False,
    **options: Any,
):
    """x [rows, n] on a weight [out, n] that stays in its codes. `minimum`: its zero points stand as
    the value of code 0; `stacked`: it is the second of three layers, read where it lies."""
    weight = quantize(_normal(1, out, n, dtype=jnp.float32), format, **options)
    if minimum:
        lowest = -weight.zeros.astype(jnp.float32) * weight.scales.astype(jnp.float32)
        weight = replace(weight, zeros=None, minimum=lowest.astype(weight.scales.dtype))
    if stacked:
        other = quantize(_normal(2, out, n, dtype=jnp.float32), format, **options)
        weight = jax.tree.map(lambda *leaves: jnp.stack(leaves), other, weight, other)
        weight = replace(weight, layer=jnp.int32(1))

    def op(implementation: str, x: Any) -> Any:
        return quantized_matmul(x, weight, implementation)

    return partial(op, "pallas"), partial(op, "reference"), (_normal(0, rows, n),)


def integers(M: int, N: int, K: int):
    """int8 [M, K] on int8 [N, K], exact but for the scale, which alone is differentiated."""
    a, b = (
        jnp.asarray(random(i).integers(-128, 128, (n, K)), jnp.int8) for i, n in ((0, M), (1, N))
    )

    def op(implementation: str, scale: Any) -> Any:
        return qgemm(a, b, scale, implementation=implementation)

    scale = jnp.float32(0.01) * (1 + jnp.arange(M))
    return partial(op, "pallas"), partial(op, "xla"), (scale,)


def grouped(sizes: tuple[int, ...], n: int, m: int, format: str | None = None):
    """Rows of n sorted by expert, and each expert's weight [m, n]; with `format` in its codes."""
    x, w = _normal(0, sum(sizes) + 3, n), _normal(1, len(sizes), m, n)
    counts = jnp.asarray(sizes, jnp.int32)
    codes = quantize(w, format) if format else None

    def op(implementation: str, x: Any, w: Any = codes) -> Any:
        return grouped_matmul(x, w, counts, implementation=implementation)

    return partial(op, "pallas"), partial(op, "reference"), (x,) if format else (x, w)


CASES = {
    "attention 128": partial(attention, 128, 128, 1, 1, 128),
    "attention odd, grouped heads, window": partial(attention, 83, 99, 2, 1, 64, window=40),
    "attention, heads of 192 and 128": partial(attention, 70, 70, 1, 1, 192, 128),
    "attention, float16": partial(attention, 64, 64, 1, 1, 64, dtype=jnp.float16, causal=False),
    "attention with everything": partial(attention_with_everything, 77, 2, 64),
    "attention with everything, even": partial(attention_with_everything, 64, 1, 64),
    "decode": partial(decode, 2, 1, 256, 4, 2, 128),
    "decode odd, 5 tokens, window": partial(decode, 2, 5, 333, 6, 2, 64, window=100),
    "decode, pages": partial(decode_pages, 2, 256, 4, 2, 128, 64),
    "decode odd, pages": partial(decode_pages, 3, 336, 6, 2, 64, 16),
    "decode, int8": partial(decode_int8, 2, 1, 256, 4, 2, 128),
    "decode odd, int8, 3 tokens": partial(decode_int8, 2, 3, 333, 6, 2, 64),
    "cross entropy": partial(cross_entropy, 64, 128, 512),
    "cross entropy odd, smoothing": partial(cross_entropy, 37, 80, 301, label_smoothing=0.1),
    "cross entropy, frozen head": partial(cross_entropy, 64, 128, 512, frozen=True),
    "cross entropy odd, frozen head": partial(cross_entropy, 37, 80, 301, frozen=True),
    "cross entropy, frozen head, z-loss": partial(
        cross_entropy, 40, 96, 260, frozen=True, z_loss=0.1, softcap=10.0
    ),
    "cross entropy odd, frozen head, z-loss": partial(
        cross_entropy, 21, 144, 139, frozen=True, z_loss=0.1
    ),
    "quantized nf4": partial(quantized, "nf4", 1, 128, 512),
    "quantized nf4 odd, one row": partial(quantized, "nf4", 1, 80, 640),
    "quantized nf4 odd": partial(quantized, "nf4", 7, 80, 640),
    "quantized nf4, doubly": partial(quantized, "nf4", 1, 128, 512, double=True),
    "quantized nf4 odd, doubly": partial(quantized, "nf4", 7, 80, 640, double=True),
    "quantized nf4, stacked": partial(quantized, "nf4", 1, 128, 512, stacked=True),
    "quantized nf4 odd, doubly, stacked": partial(
        quantized, "nf4", 7, 80, 640, double=True, stacked=True
    ),
    "quantized int4": partial(quantized, "int4", 1, 128, 512),
    "quantized int4 odd, one row": partial(quantized, "int4", 1, 80, 640),
    "quantized int4 odd": partial(quantized, "int4", 7, 80, 640, group=128),
    "quantized int4, zero points": partial(quantized, "int4", 16, 128, 512, zero_points=True),
    "quantized int4 odd, zero points": partial(
        quantized, "int4", 7, 80, 640, group=32, zero_points=True
    ),
    "quantized int4, minimum": partial(
        quantized, "int4", 16, 128, 512, group=32, zero_points=True, minimum=True
    ),
    "quantized int4 odd, minimum": partial(
        quantized, "int4", 7, 80, 640, zero_points=True, minimum=True
    ),
    "quantized mxfp4": partial(quantized, "mxfp4", 3, 128, 512),
    "quantized mxfp4, one row": partial(quantized, "mxfp4", 1, 128, 512),
    "quantized mxfp4 odd, one row": partial(quantized, "mxfp4", 1, 80, 640),
    "quantized mxfp4 odd": partial(quantized, "mxfp4", 7, 80, 640),
    "quantized int8": partial(quantized, "int8", 3, 128, 512),
    "quantized int8 odd": partial(quantized, "int8", 7, 80, 640),
    "quantized int8 odd, groups": partial(quantized, "int8", 7, 80, 640, group=128),
    **{
        f"quantized {format}{name}": partial(quantized, format, *shape)
        for format in FP8
        for name, shape in (("", (16, 128, 512)), (" odd", (7, 80, 640)))
    },
    "grouped": partial(grouped, (64, 64), 128, 128),
    "grouped odd, an empty group": partial(grouped, (17, 0, 50), 80, 144),
    "grouped odd, nf4": partial(grouped, (17, 0, 50), 192, 144, format="nf4"),
    "qgemm": partial(integers, 64, 64, 128),
    "qgemm odd": partial(integers, 37, 80, 96),
}
