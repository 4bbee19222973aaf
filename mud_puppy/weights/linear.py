"""`linear(x, w)` and `embed(w, tokens)`: one dispatch point for whatever a weight is.

The Lora cases are registered on `kernels.matmul`, so that kernels which take a weight (the
cross-entropy's head) serve adapters without importing this room.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mud_puppy.kernels import Quantized, dequantize, matmul
from mud_puppy.kernels.formats import decoded_scales
from mud_puppy.weights.leaf import FakeQuant, Fp8, Int8Dynamic, Lora
from mud_puppy.weights.rounding import round_weight


def linear(x: Float[Array, "*B n"], w: Any) -> Float[Array, "*B m"]:
    """x[..., in] @ w[out, in].T -> [..., out] in x's dtype, whatever w is."""
    return matmul(x, w)


def linears(x: Float[Array, "*B n"], ws: Sequence[Any]) -> list[Float[Array, "*B m"]]:
    """`[linear(x, w) for w in ws]`; plain adapters that share the input are computed together."""
    if not all(isinstance(w, Lora) and w.key is None for w in ws):
        return [linear(x, w) for w in ws]
    ranks = [w.a.shape[-2] for w in ws]
    z = matmul(x, jnp.concatenate([w.a for w in ws], axis=-2))
    parts = jnp.split(z, [sum(ranks[:i]) for i in range(1, len(ranks))], axis=-1)
    return [_add(matmul(x, w.base), part, w) for w, part in zip(ws, parts, strict=True)]


def embed(w: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the embedding w [V, D]."""
    if isinstance(w, Quantized):
        return _decoded_rows(w, tokens)
    if not isinstance(w, Lora):
        return w[tokens]
    base = embed(w.base, tokens)
    return base + (w.scale * (w.b[tokens] @ w.a)).astype(base.dtype)


def _decoded_rows(w: Quantized, rows: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    if w.nested is not None:
        w = replace(w, scales=decoded_scales(w), nested=None, offset=None)

    def take(x: Array) -> Array:
        return x if x.shape[0] == 1 else x[rows]  # one scale for all rows

    return dequantize(jax.tree.map(take, w))


def lora_delta(w: Lora) -> Float[Array, "... out in"]:
    """scale * b @ a, float32."""
    # HIGHEST: GPUs would round the factors to TF32, and a merged model keeps that error.
    ba = jnp.einsum("...or,...ri->...oi", w.b, w.a, precision=jax.lax.Precision.HIGHEST)
    return ba * w.scale[..., None, None]


def dense(w: Any) -> Float[Array, "... out in"]:
    """The plain matrix that w stands for: float32 where codes were decoded or an adapter added."""
    if isinstance(w, Fp8 | Int8Dynamic):
        return dense(w.base)
    if isinstance(w, FakeQuant):
        return round_weight(dense(w.base), w.range, w.format, w.group)
    if isinstance(w, Quantized):
        return dequantize(w, jnp.float32)
    if not isinstance(w, Lora):
        return w
    merged = dense(w.base).astype(jnp.float32) + lora_delta(w)
    if w.magnitude is None:
        return merged
    return merged * (w.magnitude / jnp.linalg.norm(merged, axis=-1))[..., None]


@matmul.register(Lora)
def _lora_matmul(w: Lora, x: Array) -> Array:
    """[..., in] @ (base + scale b a).T; with a key, dropout on the adapter's input only."""
    z = matmul(_dropout(x, w), w.a)
    return _add(matmul(x, w.base), z, w)


def _add(y: Array, z: Array, w: Lora) -> Array:
    """y + scale * z @ b.T, times DoRA's magnitude over the (constant) norm of the merged rows."""
    y = y + matmul(z * w.scale.astype(z.dtype), w.b)
    if w.magnitude is None:
        return y
    norm = jax.lax.stop_gradient(
        jnp.linalg.norm(dense(w.base).astype(jnp.float32) + lora_delta(w), axis=-1)
    )
    return y * (w.magnitude / norm).astype(y.dtype)


def _dropout(x: Array, w: Lora) -> Array:
    if w.key is None or w.dropout == 0.0:
        return x
    keep = jax.random.bernoulli(w.key, 1 - w.dropout, x.shape)
    return jnp.where(keep, x / (1 - w.dropout), 0).astype(x.dtype)
