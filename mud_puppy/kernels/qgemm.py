"""`qgemm`: int8 x int8, summed exactly in int32, then scaled. `fbgemm`: bias and activation on top.

    y = a_scale * b_scale * sum_k (a - a_zero) (b - b_zero)

The zero points are taken out of the finished sums, in integers: sum ab - b_zero sum a - a_zero
sum b + K a_zero b_zero. `xla` leaves the product to XLA (cuBLASLt on NVIDIA), `pallas` is a
Pallas-Triton kernel on the integer matrix instructions, which serves on AMD.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels import selfcheck, target, tuned
from mud_puppy.kernels.matmul import matmul

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
OP = "qgemm"


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
    [N, 1]. Not differentiable. Raises ValueError for shapes that do not fit, and for
    implementation="pallas" where sizes have no tile.
    """
    (M, K), N = a.shape, b.shape[0]
    if b.shape[1] != K:
        raise ValueError(f"expected b [N, {K}], got {b.shape}")
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
        y = y + bias.astype(y.dtype)
    return y if activation is None else ACTIVATIONS[activation](y)


def _column(value: Any, size: int) -> Array:
    value = jnp.asarray(value)
    if value.size not in (1, size):
        raise ValueError(f"expected one number or {size}, got {list(value.shape)}")
    return value.reshape(-1, 1)


def _row(value: Any, size: int) -> Array:
    return _column(value, size).reshape(1, -1)


# The product in integers, [M, N] int32.


def _product(a: Array, b: Array, implementation: str | None) -> Array:
    if implementation not in (None, "pallas", "xla"):
        raise ValueError(f"unknown implementation '{implementation}'; choose pallas or xla")
    reason = _refusal(a, b) if implementation == "pallas" or _on_rocm() else "XLA is faster"
    if implementation == "pallas" and reason:
        raise ValueError(f"the Pallas kernel cannot serve this product: {reason}")
    if implementation == "xla" or reason:
        return _xla(a, b)
    return _pallas(a, b)


def _on_rocm() -> bool:
    return target.current().platform == "rocm"


def _refusal(a: Array, b: Array) -> str | None:
    N, K = b.shape
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual:
        return f"the operands may be split over a mesh of {mesh.size} devices"
    if N % 16 or K % 32:
        return f"b is [{N}, {K}], not multiples of [16, 32]"
    return selfcheck.fault(OP, _case)


def _case() -> tuple[float, float]:
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.randint(k, (96, 256), -127, 128, jnp.int8) for k in keys)
    return float(jnp.abs(_pallas(a, b) - _xla(a, b)).max()), 0.0


def _xla(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


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
