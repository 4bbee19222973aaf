r"""Direct preference optimization and its relatives: losses of pairs against a reference policy.

With the log-ratios $r_w, r_l$ = log(policy / reference) of the chosen and the rejected answer, DPO
(https://arxiv.org/abs/2305.18290, Eq. 7) is $-\log\sigma(\beta (r_w - r_l))$; the others change
this function. Names, constants and reductions are those of TRL, to which the tests compare each.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from mud_puppy.losses.pairs import Metrics, Pairs, pair_metrics, read_pairs


@dataclass(frozen=True)
class Settings:
    """beta: how strongly the policy is held to the reference. smoothing: the chance that a label is
    wrong. tau: DiscoPOP's temperature. divergence, alpha: of `divergence_score`."""

    beta: float = 0.1
    smoothing: float = 0.0
    tau: float = 0.05
    divergence: str = "reverse_kl"
    alpha: float = 0.5


def dpo(
    scores: dict[str, Any],
    batch: dict[str, Array],
    weight_sum: Float[Array, ""],
    *,
    loss: str | Mapping[str, float] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    discopop_tau: float = 0.05,
) -> tuple[Float[Array, ""], Metrics]:
    r"""The mean over pairs of `loss`: one of LOSSES, or several with their factors.

    scores["chosen"], ["rejected"], ["reference_chosen"], ["reference_rejected"]: log-probabilities
    of the answers [*P], sums over their tokens; scores["nll"] [*P]: for loss "sft" alone, the
    negative log-likelihood of the chosen answers, scaled so that its mean over the step's pairs is
    the mean over their tokens. batch["pair_weights"], ["chosen_tokens"], ["rejected_tokens"]: [*P].
    weight_sum: the pairs of the whole step. No gradient reaches the reference.

    label_smoothing: of sigmoid (conservative DPO), robust, exo_pair, aot and aot_unpaired.
    divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence (of coefficient alpha), in
    the losses of DIVERGENT (https://arxiv.org/abs/2309.16240). Metrics: loss, and beta times the
    log-ratios as rewards/chosen, /rejected, /margins, /accuracies. ValueError for a name, number or
    combination that has no meaning.

    >>> scores = {"chosen": jnp.array([-1.0]), "rejected": jnp.array([-3.0])}
    >>> scores |= {"reference_chosen": jnp.array([-2.0]), "reference_rejected": jnp.array([-2.0])}
    >>> batch = {k: jnp.ones(1) for k in ("pair_weights", "chosen_tokens", "rejected_tokens")}
    >>> value, _ = dpo(scores, batch, jnp.array(1.0), beta=0.5)  # -log sigmoid(0.5 * (1 + 1))
    >>> round(float(value), 4)
    0.3133
    """
    factors = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    own = Settings(beta, label_smoothing, discopop_tau, divergence, alpha)
    check_settings(factors, own)
    pairs = read_pairs(scores, batch)
    losses = jnp.zeros_like(pairs.chosen)
    for name, factor in factors.items():
        losses += factor * (_nll(scores, pairs) if name == "sft" else LOSSES[name](pairs, own))
    total = (losses * pairs.weights).sum() / weight_sum
    rewards = beta * pairs.chosen, beta * pairs.rejected
    return total, pair_metrics(losses, *rewards, pairs.weights)


def divergence_score(ratio: Float[Array, "*P"], own: Settings) -> Float[Array, "*P"]:
    """f'(policy / reference) of an f-divergence, from the log-ratio; constants that cancel in a
    difference are kept as the paper has them (https://arxiv.org/abs/2309.16240)."""
    match own.divergence:
        case "forward_kl":
            return 1 - jnp.exp(-ratio)
        case "js_divergence":
            return math.log(2) + log_sigmoid(ratio)
        case "alpha_divergence" if abs(own.alpha - 1) >= 1e-6:
            # exp(80) is the last decade below float32's largest number.
            power = jnp.minimum((own.alpha - 1) * ratio, 80.0)
            return (jnp.exp(power) - 1) / (own.alpha - 1)
        case _:  # reverse_kl, and alpha's limit at 1
            return ratio


def _nll(scores: dict[str, Array], pairs: Pairs) -> Array:
    return jnp.where(pairs.weights > 0, scores["nll"], 0.0)


def _margin(pairs: Pairs, own: Settings) -> Array:
    return divergence_score(pairs.chosen, own) - divergence_score(pairs.rejected, own)


def _margin_a_token(pairs: Pairs, own: Settings) -> Array:
    chosen = divergence_score(pairs.chosen, own) / pairs.chosen_tokens
    return chosen - divergence_score(pairs.rejected, own) / pairs.rejected_tokens


def _smoothed(margin: Array, own: Settings) -> Array:
    wrong = own.smoothing
    return -(1 - wrong) * log_sigmoid(own.beta * margin) - wrong * log_sigmoid(-own.beta * margin)


def _sigmoid(pairs: Pairs, own: Settings) -> Array:
    """DPO; with smoothing conservative DPO (https://ericmitchell.ai/cdpo.pdf)."""
    return _smoothed(_margin(pairs, own), own)


def _hinge(pairs: Pairs, own: Settings) -> Array:
    """SLiC's hinge on DPO's margin (https://arxiv.org/abs/2309.06657)."""
    return jax.nn.relu(1 - own.beta * _margin(pairs, own))


def _ipo(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2310.12036, Eq. 17, of log-ratios a token, as its authors ran it."""
    return (_margin_a_token(pairs, own) - 1 / (2 * own.beta)) ** 2


def _exo(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2402.00856, Eq. 16: KL(policy's choice || smoothed label)."""
    margin = own.beta * _margin(pairs, own)
    right, wrong = math.log1p(-own.smoothing), math.log(own.smoothing)
    first = sigmoid(margin) * (log_sigmoid(margin) - right)
    return first + sigmoid(-margin) * (log_sigmoid(-margin) - wrong)


def _nca(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2402.05369, of two answers."""
    chosen, rejected = own.beta * pairs.chosen, own.beta * pairs.rejected
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def _robust(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2403.00409: unbiased where labels are flipped by chance."""
    margin, wrong = own.beta * _margin(pairs, own), own.smoothing
    clean = -(1 - wrong) * log_sigmoid(margin)
    return (clean + wrong * log_sigmoid(-margin)) / (1 - 2 * wrong)


def _bco(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2404.04656 on pairs, without its running threshold."""
    return -log_sigmoid(own.beta * pairs.chosen) - log_sigmoid(-own.beta * pairs.rejected)


def _sppo(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2405.00675, Eq. 4.7, the winner winning with probability 1."""
    half = 0.5 / own.beta
    return (pairs.chosen - half) ** 2 + (pairs.rejected + half) ** 2


def _aot(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2406.05882, paired: the policy's margins, sorted, against the sorted
    margins of the reference. Couples all pairs of a batch."""
    return _sorted_against(pairs.margin, pairs.reference_margin, pairs.weights, own)


def _aot_unpaired(pairs: Pairs, own: Settings) -> Array:
    """The same of the chosen answers' log-ratios against those of the rejected."""
    return _sorted_against(pairs.chosen, pairs.rejected, pairs.weights, own)


def _sorted_against(upper: Array, lower: Array, weights: Array, own: Settings) -> Array:
    """Smoothed losses of sorted(upper) - sorted(lower), each at the place of its upper value.
    Pairs of weight 0 come last in both, so that they meet each other alone."""
    shape, used = upper.shape, weights.ravel() > 0
    upper, lower = (jnp.where(used, x.ravel(), jnp.inf) for x in (upper, lower))
    places = jnp.argsort(upper)
    kept = used[places]
    first, second = (jnp.where(kept, x, 0.0) for x in (upper[places], jnp.sort(lower)))
    losses = _smoothed(first - second, own)
    return jnp.zeros_like(losses).at[places].set(losses).reshape(shape)


def _apo_zero(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2408.06266, Eq. 7: for chosen answers better than the model's own."""
    return 1 - sigmoid(own.beta * pairs.chosen) + sigmoid(own.beta * pairs.rejected)


def _apo_down(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2408.06266, Eq. 8: for chosen answers worse than the model's own."""
    margin = own.beta * (pairs.chosen - pairs.rejected)
    return sigmoid(own.beta * pairs.chosen) + 1 - sigmoid(margin)


def _discopop(pairs: Pairs, own: Settings) -> Array:
    """https://arxiv.org/abs/2406.08414, Eq. 5: logistic and exponential loss, mixed by the
    margin."""
    margin = own.beta * _margin(pairs, own)
    mix = sigmoid(margin / own.tau)
    return -log_sigmoid(margin) * (1 - mix) + jnp.exp(-margin) * mix


def _sigmoid_norm(pairs: Pairs, own: Settings) -> Array:
    """DPO of log-ratios a token (https://arxiv.org/abs/2411.15124)."""
    return -log_sigmoid(own.beta * _margin_a_token(pairs, own))


LOSSES: dict[str, Callable[[Pairs, Settings], Array]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": _nca,
    "bco_pair": _bco,
    "sppo_hard": _sppo,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
SMOOTHED = frozenset({"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"})
DIVERGENT = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
COUPLED = frozenset({"aot", "aot_unpaired"})  # their value depends on which pairs share a batch


def check_settings(names: Collection[str], own: Settings) -> None:
    """ValueError, in one line, for losses and settings that mean nothing together."""
    known = (*LOSSES, "sft")
    for name in names:
        if name not in known:
            raise ValueError(f"loss '{name}' is not one of {', '.join(known)}")
    if not names:
        raise ValueError("loss names none")
    if own.beta <= 0:
        raise ValueError(f"beta must be above 0, not {own.beta}")
    if own.divergence not in DIVERGENCES:
        raise ValueError(f"divergence '{own.divergence}' is not one of {', '.join(DIVERGENCES)}")
    if own.divergence != "reverse_kl" and (other := sorted(set(names) - DIVERGENT)):
        raise ValueError(f"loss '{other[0]}' has no {own.divergence}; leave divergence out")
    if own.smoothing and not set(names) & SMOOTHED:
        raise ValueError(f"label_smoothing is of the losses {', '.join(sorted(SMOOTHED))}")
    if not 0 <= own.smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {own.smoothing}")
    if "exo_pair" in names and own.smoothing == 0:
        raise ValueError("loss 'exo_pair' needs label_smoothing above 0; its paper takes 1e-3")


ipo = partial(dpo, loss="ipo")
