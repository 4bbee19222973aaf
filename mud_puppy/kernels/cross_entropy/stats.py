"""What a token's logits are reduced to, and the two options that shape the logits.

raw = hidden @ head.T;  logits = softcap tanh(raw / softcap) / temperature
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp


class Stats(NamedTuple):
    """float32, one a token: log p(target), entropy of p in nats, log-sum-exp and mean of logits."""

    logp: Any
    entropy: Any
    lse: Any
    mean: Any


@dataclass(frozen=True)
class Shape:
    """softcap None: no cap. Static under jit."""

    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, raw: Any) -> Any:
        if self.softcap is not None:
            raw = self.softcap * jnp.tanh(raw / self.softcap)
        return raw if self.temperature == 1.0 else raw / self.temperature

    def derivative(self, logits: Any) -> Any:
        """d logits / d raw, from the logits themselves; a scalar without a cap."""
        slope = 1.0 / self.temperature
        if self.softcap is None:
            return slope
        return slope * (1 - jnp.square(logits * (self.temperature / self.softcap)))


def slope_weights(g: Stats, stats: Stats) -> tuple[Any, Any, Any, Any]:
    """(at target, everywhere, on p, on p log p): the loss's slope in each logit is their sum.

    d logp = onehot - p, d lse = p, d mean = 1 / V, d entropy = -p (log p + entropy).
    """
    return g.logp, g.mean, g.lse - g.logp - g.entropy * stats.entropy, -g.entropy
