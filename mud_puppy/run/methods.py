"""A method is data: how rows become batches, what the model is asked, and the loss.

All methods share one step and one loop; a method that needs its own trainer is designed wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from mud_puppy.kernels import token_logps
from mud_puppy.losses import sft
from mud_puppy.model import Inputs, Model, head

Tree = Any


@dataclass(frozen=True)
class Method:
    """score(model, params, reference, batch, run_layers) -> arrays by name, and "aux": the model's
    auxiliary sums {name: (sum, count)} (`Model.forward`), which are metrics and may be penalties;
    loss(scores, batch, weight_sum) -> (scalar, {name: (sum, count)})."""

    score: Callable[..., dict[str, Any]]
    loss: Callable[..., tuple[Array, dict[str, tuple[Array, Array]]]]


def score_tokens(
    model: Model, params: Tree, reference: Tree, batch: dict[str, Array], run_layers: Callable
) -> dict[str, Any]:
    """Log-probability of every target and entropy of every prediction, float32 [B, T]; and aux."""
    inputs = Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden, _, aux = model.forward(params, inputs, run_layers=run_layers)
    softcap = model.arch.logit_softcap
    logps, entropy = token_logps(hidden, head(params), batch["targets"], softcap=softcap)
    return {"logps": logps, "entropy": entropy, "aux": aux}


SFT = Method(score_tokens, sft)
