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
    """-inf for all but the `top_k` largest, then all but the fewest whose mass reaches `top_p`."""
    ordered = -jnp.sort(-logits, axis=-1)
    V = logits.shape[-1]
    last = jnp.where(top_k > 0, jnp.minimum(top_k, V), V) - 1
    ordered = jnp.where(ordered >= ordered[:, last, None], ordered, -jnp.inf)
    mass = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    # top_p 1 is off: rounding in the sum must not cut the tail.
    kept = ((before < top_p) | (top_p >= 1)) & (ordered > -jnp.inf)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)
