"""Functions that the tests compile for AMD cards: each returns (callable, argument shapes)."""

import jax
import jax.numpy as jnp

from mud_puppy.kernels import Quantized, flash_attention
from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.formats import FP8
from mud_puppy.weights import Fp8, fp8_types, linear


def product(size: int = 512, block: int = 32, name: str = "product", along_k: bool = True):
    """a @ b.T in tiles, float32 out: the least kernel with a matrix instruction and a loop.

    Not `along_k`: a @ b, whose b is gathered two bytes at a time, against its order in memory.
    """

    def kernel(a, b, out):
        def step(i, total):
            at = pl.ds(i * block, block)
            right = pl.load(b.at[:, at] if along_k else b.at[at, :])
            return total + pl.dot(pl.load(a.at[:, at]), right, trans_b=along_k)

        zero = jnp.zeros((block, block), jnp.float32)
        pl.store(out, jax.lax.fori_loop(0, size // block, step, zero))

    call = pl.call(
        kernel,
        grid=(size // block, size // block),
        in_specs=[
            pl.BlockSpec((block, size), lambda i, j: (i, 0)),
            pl.BlockSpec((block, size), lambda i, j: (j, 0))
            if along_k
            else pl.BlockSpec((size, block), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((size, size), jnp.float32),
        num_warps=4,
        num_stages=1,
        name=name,
    )
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return call, (x, x)


def spilling(rows: int = 128, columns: int = 64):
    """More registers than there are: a tile of 8,192 float32 in one wave."""

    def kernel(a, out):
        x = pl.load(a)
        pl.store(out, x / jnp.sum(x, 0, keepdims=True) + jnp.sum(x, 1, keepdims=True))

    x = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    call = pl.call(
        kernel,
        grid=(1,),
        in_specs=[pl.BlockSpec(x.shape, lambda i: (0, 0))],
        out_specs=pl.BlockSpec(x.shape, lambda i: (0, 0)),
        out_shape=x,
        num_warps=1,
        num_stages=1,
        name="spilling",
    )
    return call, (x,)


def scanned(size: int = 512):
    """XLA's own kernels beside a Pallas kernel in a loop."""
    call, (x, _) = product(size)

    def f(a, b):
        def body(a, _):
            return jnp.tanh(call(a, b)).astype(a.dtype), jnp.sum(a)

        return jax.lax.scan(body, a, None, length=3)

    return f, (x, x)


def broken():
    raise KeyError("this unit cannot be built")


def crash():
    import os

    os.abort()


def nested(size: int = 1024, block: int = 32, known: bool = True, told: int = 0):
    """For each block of b's columns a loop over the depth: 8 passes, or as many as `count` says
    (which `told` tells the reader)."""

    def kernel(count, a, b, out):
        def columns(j, total):
            def depth(i, total):
                at = pl.ds(i * block, block)
                right = pl.load(b.at[at, pl.ds(j * block, block)])
                return total + pl.dot(pl.load(a.at[:, at]), right)

            return jax.lax.fori_loop(0, 8 if known else count[0], depth, total)

        zero = jnp.zeros((block, block), jnp.float32)
        pl.store(out, jax.lax.fori_loop(0, size // block, columns, zero))

    call = pl.call(
        kernel,
        grid=(size // block,),
        in_specs=[
            pl.BlockSpec((1,), lambda i: (0,)),
            pl.BlockSpec((block, size), lambda i: (i, 0)),
            pl.BlockSpec((size, size), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((block, block), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((size, block), jnp.float32),
        num_warps=4,
        num_stages=1,
        name="nested",
    )
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    args = (jax.ShapeDtypeStruct((1,), jnp.int32), x, x)
    return (call, args, told) if told else (call, args)


def fp8_linear(frozen: bool = True, emulated: bool = False, m: int = 2048, n: int = 4096):
    """A linear of float8 weights, forward and backward, in the target's own float8."""
    types = fp8_types(emulated)
    name = next(k for k, dtype in FP8.items() if jnp.dtype(dtype) == types.forward)
    x, w = jax.ShapeDtypeStruct((m, n), jnp.bfloat16), jax.ShapeDtypeStruct((n, n), jnp.float32)
    codes = jax.ShapeDtypeStruct((n, n), jnp.uint8)
    coded = Quantized(codes, jax.ShapeDtypeStruct((1, 1), jnp.float32), format=name)

    def products(x, w, g):
        if frozen:
            y, pull = jax.vjp(lambda x: linear(x, Fp8(w, types=types)), x)
        else:
            y, pull = jax.vjp(lambda x, w: linear(x, Fp8(w, types=types)), x, w)
        return y, pull(g)

    return products, (x, coded if frozen else w, x)


def plain_product(size: int = 512):
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return (lambda x, y: x @ y), (x, x)


def shared_prefix(width: int = 64, tokens: int = 2048):
    """Attention, forward and backward, of pairs whose prompt stands once in a row."""
    q, k = (jax.ShapeDtypeStruct((1, tokens, heads, width), jnp.bfloat16) for heads in (8, 2))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def f(q, k, v, segment_ids, prefix_ids):
        def total(q, k, v):
            options = {"segment_ids": segment_ids, "prefix_ids": prefix_ids}
            return flash_attention(q, k, v, implementation="pallas", **options).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    return f, (q, k, k, ids, ids)
