"""Models in codes against the model they were made from: perplexity, and KL of their predictions.

    KL(p || q) = sum_v p(v) (log p(v) - log q(v)),  p the reference's

in nats, the mean over the tokens to which the batches give a weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mud_puppy.model import Inputs, Model
from mud_puppy.model.decoder import logits

Tree = Any
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """loss: mean negative log-likelihood of a token. kl: to the reference. tokens: how many."""

    loss: float
    kl: float
    tokens: float

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss))


def compare(
    model: Model, reference: Tree, params: Tree | None, batches: Iterable[Batch]
) -> Comparison:
    """`params` (None: the reference itself, KL 0) on batches [..., B, T] as the SFT loader makes
    them. Logits of one row at a time exist, of both models."""
    sums = np.zeros(3)
    for batch in batches:
        rows = {key: x.reshape(-1, 1, x.shape[-1]) for key, x in batch.items()}
        sums += np.asarray(_sums(model, reference, params, rows), np.float64)
    loss, kl, tokens = map(float, sums)
    return Comparison(loss / tokens, kl / tokens, tokens)


@partial(jax.jit, static_argnums=0)
def _sums(model: Model, reference: Tree, params: Tree | None, rows: dict[str, Array]) -> Array:
    """Sums of loss and KL over tokens, and of their weights, float32 [3]."""

    def logps(params: Tree, row: dict[str, Array]) -> Array:
        inputs = Inputs(row["tokens"], row["positions"], row["segment_ids"])
        hidden, _, _ = model.forward(params, inputs)
        return jax.nn.log_softmax(logits(model.arch, params, hidden))

    def one(row: dict[str, Array]) -> Array:
        p = logps(reference, row)
        q = p if params is None else logps(params, row)
        loss = -jnp.take_along_axis(q, row["targets"][..., None], axis=-1)[..., 0]
        kl = (jnp.exp(p) * (p - q)).sum(-1)
        # A row of padding may be NaN: a weight of 0 must not keep it.
        seen = row["weights"] > 0
        return jnp.stack(
            [jnp.where(seen, x * row["weights"], 0).sum() for x in (loss, kl, jnp.ones_like(kl))]
        )

    return jax.lax.map(one, rows).sum(0)
