"""What is asked of all logits of a token at once, without those of all tokens: `over_tokens`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.kernels.cross_entropy.stats import Shape
from mud_puppy.kernels.cross_entropy.xla import by_tokens
from mud_puppy.kernels.matmul import contract_last, exact, matmul


def over_tokens(
    block: Callable[..., Any],
    hidden: Sequence[Float[Array, "B T _"]],
    heads: Sequence[Any],
    softcaps: Sequence[float | None],
    arrays: Sequence[Array] = (),
) -> Any:
    """block(logits [B, C, V] of each of the hidden states, *arrays [B, C, ...]) -> a tree of
    [B, C, ...]; of all tokens, [B, T, ...].

    Of C tokens at a time, and again in the backward pass, so that no [B, T, V] exists. heads:
    weights [V, D], which may differ in both; all logits are cut to the smallest V. softcaps: as of
    `token_logps`. Logits are float32 sums, but of a head that is no array they have the rounding of
    its hidden states' dtype. Differentiable in hidden and heads.
    """
    pairs = list(zip(hidden, heads, strict=True))
    V = [jax.eval_shape(matmul, x[0, :1], head).shape[-1] for x, head in pairs]
    shapes = [Shape(softcap) for softcap in softcaps]

    def one(*parts: Any) -> Any:
        states, others = parts[: len(pairs)], parts[len(pairs) :]
        logits = [
            shape.logits(_logits(x, head))[..., : min(V)]
            for x, head, shape in zip(states, heads, shapes, strict=True)
        ]
        return block(*logits, *others)

    return by_tokens(one, [*hidden, *arrays], sum(V))


def _logits(x: Any, head: Any) -> Any:
    is_array = isinstance(head, jax.Array) or hasattr(head, "__array__")
    return _wide(x, head) if is_array else matmul(x, head).astype(jnp.float32)


@jax.custom_vjp
def _wide(x: Any, head: Any) -> Any:
    """x [B, C, D] @ head.T, rounded nowhere: the products of half precision are exact."""
    return contract_last(x, head.astype(x.dtype), jnp.float32)


def _wide_forward(x: Any, head: Any) -> Any:
    return _wide(x, head), (x, head)


def _wide_backward(kept: Any, g: Any) -> Any:
    x, head = kept
    # In x's dtype: a float32 product of bfloat16 arrays has no tensor cores.
    g, rows = g.astype(x.dtype), head.astype(x.dtype)
    dims = ((0, 1), (0, 1)), ((), ())
    d_head = jax.lax.dot_general(
        g, x, dims, precision=exact(x.dtype), preferred_element_type=jnp.float32
    )
    return contract_last(g, rows.T, jnp.float32).astype(x.dtype), d_head.astype(head.dtype)


_wide.defvjp(_wide_forward, _wide_backward)
