"""`qgemm`: int8 x int8, summed exactly in int32, then scaled. `fbgemm`: bias and activation on top.

    y = a_scale * b_scale * sum_k (a - a_zero) (b - b_zero)

The zero points are taken out of the finished sums, in integers: sum ab - b_zero sum a - a_zero
sum b + K a_zero b_zero. `pallas` is a Pallas-Triton kernel on the integer matrix instructions and
serves on GPUs; `xla` is XLA's product of int8. Both are compared with exact sums before their first
use on a GPU: XLA 0.11.2 gave twice the sum on an H100 (--xla_gpu_autotune_level=0). Where XLA's is
refused, parts of K are multiplied in bfloat16, whose float32 sums are exact, and added in int32.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from mud_puppy.kernels import choice, selfcheck, target, tuned
from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.arguments import INTEGERS, check_array, check_kind
from mud_puppy.kernels.matmul import matmul

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
OP = "qgemm"
PALLAS, XLA = "qgemm's Pallas kernel", "XLA's product of int8"
PART = 1024  # products of at most 2^14 sum to at most 2^24, which float32 counts exactly


def qgemm(
    a: Int8[Array, "M K"],
    b: Int8[Array, "N J"],
    a_scale: Any = 1.0,
    b_scale: Any = 1.0,
    a_zero: Any = None,
    b_zero: Any = None,
    *,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """[M, N] in `dtype`; with dtype=int32 the sums before scaling.

    a_scale and a_zero are numbers, or one for each row [M] or [M, 1]; b's are numbers, [N] or
    [N, 1]. Zero points are integers. Not differentiable. Raises ValueError for shapes and dtypes
    that do not fit, and for implementation="pallas" where sizes have no tile.
    """
    for name, x, axes in (("a", a, "M K"), ("b", b, "N K")):
        check_array(OP, name, x, axes, (jnp.int8,))
    (M, K), N = a.shape, b.shape[0]
    if b.shape[1] != K:
        raise ValueError(f"expected b [N, {K}], got {b.shape}")
    a_zero, b_zero = _integers("a_zero", a_zero), _integers("b_zero", b_zero)
    sums = _product(a, b, implementation)
    if b_zero is not None:
        sums -= _row(b_zero, N) * a.astype(jnp.int32).sum(1)[:, None]
    if a_zero is not None:
        sums -= _column(a_zero, M) * b.astype(jnp.int32).sum(1)[None, :]
    if a_zero is not None and b_zero is not None:
        sums += K * _column(a_zero, M) * _row(b_zero, N)
    if jnp.dtype(dtype) == jnp.int32:
        return sums
    scales = _column(a_scale, M) * _row(b_scale, N)
    return (sums.astype(jnp.float32) * scales).astype(dtype)


def fbgemm(
    x: Float[Array, "*B n"],
    w: Any,
    bias: Float[Array, " J"] | None = None,
    activation: str | None = None,
) -> Float[Array, "*B m"]:
    """activation(x @ w.T + bias) in x's dtype, for any weight that `matmul` serves (`Quantized`).

    activation: "relu", "gelu" (tanh form), "silu" or None. Differentiable in x and bias.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}': {', '.join(ACTIVATIONS)} or None")
    y = matmul(x, w)
    if bias is not None:
        if bias.shape != y.shape[-1:]:
            raise ValueError(f"expected a bias [{y.shape[-1]}], got {list(bias.shape)}")
        y = y + lax.broadcast_to_rank(bias.astype(y.dtype), y.ndim)
    return y if activation is None else ACTIVATIONS[activation](y)


def _integers(name: str, zero: Any) -> Array | None:
    """A zero point as int32: in int8, K times two of them would overflow."""
    if zero is None:
        return None
    zero = jnp.asarray(zero)
    check_kind(OP, name, zero, INTEGERS)
    return zero.astype(jnp.int32)


def _column(value: Any, size: int) -> Array:
    value = jnp.asarray(value)
    if value.size not in (1, size):
        raise ValueError(f"expected one number or {size}, got {list(value.shape)}")
    return value.reshape(-1, 1)


def _row(value: Any, size: int) -> Array:
    return _column(value, size).reshape(1, -1)


# The product in integers, [M, N] int32.


def _product(a: Array, b: Array, implementation: str | None) -> Array:
    order = ("pallas",) if target.current().platform in ("cuda", "rocm") else ()
    declines = {"pallas": lambda: _refusal(a, b)}
    empty = not (a.size and b.size)
    name = choice.choose(OP, implementation, ("pallas", "xla"), declines, order, empty)
    if empty:
        return jnp.zeros((len(a), len(b)), jnp.int32)
    return _pallas(a, b) if name == "pallas" else _xla(a, b)


def _refusal(a: Array, b: Array) -> str | None:
    N, K = b.shape
    if (split := choice.split_over_mesh(a, b)) is not None:
        return split
    if N % 16 or K % 32:
        return f"b is [{N}, {K}], not multiples of [16, 32]"
    if (long := pl.too_long(a, b)) is not None:
        return long
    return selfcheck.fault(PALLAS, functools.partial(_case, _pallas))


def selfchecks(name: str) -> list[tuple[str, selfcheck.Case]]:
    """Cases that hold the implementation "pallas" or "xla" against exact sums."""
    by_xla = (XLA, functools.partial(_case, _xla_int8))
    return [(PALLAS, functools.partial(_case, _pallas)), by_xla] if name == "pallas" else [by_xla]


def _case(product: Any) -> tuple[float, float]:
    """The largest error of an integer product, of which none is allowed."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, (n, 256)).astype(np.int8) for n in (96, 64))
    got = np.asarray(jax.jit(product)(a, b), np.int64)
    return float(np.abs(got - a.astype(np.int64) @ b.T.astype(np.int64)).max()), 0.0


def _xla(a: Array, b: Array) -> Array:
    fault = selfcheck.fault(XLA, functools.partial(_case, _xla_int8))
    if fault is None:
        return _xla_int8(a, b)
    choice.say(logging.WARNING, f"qgemm: {fault}; parts in bfloat16 serve instead")
    return _in_parts(a, b)


def _xla_int8(a: Any, b: Any) -> Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _in_parts(a: Array, b: Array) -> Array:
    """Exact sums of PART products each, by bfloat16 (which holds every int8) and float32."""
    tail = -a.shape[1] % PART

    def parts(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, tail))).astype(jnp.bfloat16)
        return padded.reshape(len(x), -1, PART)

    dims = (((2,), (2,)), ((1,), (1,)))
    sums = lax.dot_general(parts(a), parts(b), dims, preferred_element_type=jnp.float32)
    return sums.astype(jnp.int32).sum(0)


def _pallas(a: Array, b: Array) -> Array:
    (M, K), N = a.shape, b.shape[0]
    tiles = tuned.tiles(OP, "int8")
    rows = min(tiles["rows"], max(16, 1 << (M - 1).bit_length()))
    columns, depth = min(tiles["columns"], N & -N), min(tiles["depth"], K & -K)
    padded = jnp.pad(a, ((0, -M % rows), (0, 0)))

    def kernel(a_ref: Any, b_ref: Any, out_ref: Any) -> None:
        own = pl.ds(pl.program_id(0) * rows, rows)
        others = pl.ds(pl.program_id(1) * columns, columns)

        def step(i: Any, sums: Any) -> Any:
            k = pl.ds(i * depth, depth)
            x, y = pl.load(a_ref.at[own, k]), pl.load(b_ref.at[others, k])
            return sums + pl.dot(x, y, trans_b=True)

        sums = lax.fori_loop(0, K // depth, step, jnp.zeros((rows, columns), jnp.int32))
        pl.store(out_ref.at[own, others], sums)

    run = pl.call(
        kernel,
        grid=(len(padded) // rows, N // columns),
        in_specs=[pl.BlockSpec()] * 2,
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((len(padded), N), jnp.int32),
        num_warps=tiles["num_warps"],
        num_stages=tiles["num_stages"],
        name="qgemm_int8",
    )
    return run(padded, b)[:M]


def rocm_cases(arch: str) -> list[tuple[str, str, dict[str, Any]]]:
    """For tools/rocm_table.py."""
    return [(f"{OP} int8", f"{__name__}:rocm_unit", {})]


def rocm_unit() -> tuple[Any, tuple[Any, ...]]:
    return _pallas, tuple(jax.ShapeDtypeStruct((4096, 4096), jnp.int8) for _ in range(2))
