"""Choosing the next token of each row: greedy, or sampled with temperature, top-k and top-p.

The order is that of transformers: temperature, then top-k, then top-p over what is left. Tokens
that tie with the last one kept are kept too.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mud_puppy.errors import UserError


@dataclass(frozen=True)
class Options:
    """How to generate; the values are checked here.

    temperature 0 takes the most probable token. top_k 0 and top_p 1 are off. Row i of a call draws
    from a random stream of its own, a function of `seed` and i alone.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature is {self.temperature}, expected 0 (most probable token) or above"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, expected 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, expected above 0 and at most 1 (off)")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chooser:
    """Options on the device: only `kind` ("greedy", "plain", "truncated") is compiled in."""

    temperature: Any
    top_k: Any
    top_p: Any
    kind: str = field(metadata={"static": True})


def chooser(options: Options) -> Chooser:
    kind = "truncated" if options.top_k or options.top_p < 1 else "plain"
    return Chooser(
        np.float32(options.temperature),
        # Beyond any vocabulary and int32 there is nothing to tell apart.
        np.int32(min(options.top_k, 2**31 - 1)),
        np.float32(options.top_p),
        kind if options.temperature else "greedy",
    )


def choose(
    logits: Float[Array, "B V"], keys: Any, how: Chooser
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """(tokens, their log-probabilities under softmax(logits)); keys: one PRNG key a row.

    The log-probability is the model's own, before temperature and truncation, as `token_logps`
    gives it.
    """
    if how.kind == "greedy":
        tokens = jnp.argmax(logits, axis=-1)
    else:
        # The largest is 0, so that a temperature near 0 overflows to -inf and never to nan.
        scaled = (logits - logits.max(-1, keepdims=True)) / how.temperature
        if how.kind == "truncated":
            scaled = truncate(scaled, how.top_k, how.top_p)
        tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def truncate(logits: Float[Array, "B V"], top_k: Any, top_p: Any) -> Float[Array, "B V"]:
    """-inf for all but the `top_k` largest, then all but the fewest whose mass reaches `top_p`.

    A token stays while the count, or the mass, of those above it is below the bound. The lowest
    place where that holds is found by bisection: on 2 CPU cores, 8 rows of 49,152, that is 19 ms
    and sorting 150, more than a small model's whole step.
    """
    few = jnp.where(top_k > 0, top_k, jnp.inf)
    logits = _above(logits, jnp.ones_like(logits), few)
    # top_p 1 is off: rounding in the sum must not cut the tail.
    share = jnp.where(top_p < 1, top_p, jnp.inf)
    return _above(logits, jax.nn.softmax(logits, axis=-1), share)


def _above(logits: Array, weights: Array, bound: Array) -> Array:
    """logits, -inf where the weights of the larger ones sum to `bound` or more."""
    keys = _ordered(logits)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        above = jnp.where(keys > middle, weights, 0).sum(-1, keepdims=True)
        kept = above < bound
        return jnp.where(kept, low, middle), jnp.where(kept, middle, high)

    ends = keys.min(-1, keepdims=True) - 1, keys.max(-1, keepdims=True)
    _, lowest = jax.lax.fori_loop(0, 32, halve, ends)
    return jnp.where(keys >= lowest, logits, -jnp.inf)


def _ordered(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """The bits of float32 as int32 in the same order, so that halving the range ends at a value."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
