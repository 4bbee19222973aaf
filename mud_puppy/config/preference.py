"""Keys of preference tuning and reward models; `keys.Config` has them beside its own.

The names of the losses are those of `mud_puppy.losses` (a test compares): this room imports no jax.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mud_puppy.config.schema import NOT_NEGATIVE, POSITIVE, Limit, Need, Parser, key
from mud_puppy.errors import nearest

Tune = Literal["lora", "qlora", "full"]
Reference = Literal["copy", "cached", "nf4", "int4", "int8", "mxfp4", "fp8"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

# Losses of pairs against a reference; several of them may be added up, with sft (the NLL of the
# chosen answers).
DPO = (
    "sigmoid hinge ipo robust exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero "
    "apo_down discopop sigmoid_norm sft"
).split()
KTO = ("kto", "apo_zero_unpaired")
REFERENCE_FREE = ("orpo", "cpo", "simpo")
PREFERENCES = ("dpo", *DPO, *KTO, *REFERENCE_FREE)
SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo"}
DIVERGENT = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
COUPLED = {"kto", "aot", "aot_unpaired"}  # a batch in parts would have another loss
OBJECTIVES = ("preference", "rm", "prm", "distill")


def parse_losses(value: Any) -> dict[str, float]:
    """{loss: factor} of "ipo", "sigmoid=0.8,sft=0.2" or such a mapping; dpo is sigmoid."""
    if isinstance(value, Mapping):
        parts = [(str(name), factor) for name, factor in value.items()]
    elif isinstance(value, str):
        found = [part.partition("=") for part in value.replace(" ", "").split(",")]
        parts = [(name, factor if sign else 1.0) for name, sign, factor in found]
    else:
        raise ValueError
    losses: dict[str, float] = {}
    for name, factor in parts:
        if name not in PREFERENCES:
            raise ValueError(f"losses are {', '.join(PREFERENCES)}.{nearest(name, PREFERENCES)}")
        name = "sigmoid" if name == "dpo" else name
        if name in losses:
            raise ValueError(f"{name} stands twice")
        losses[name] = float(factor)
        if not 0 < losses[name] < float("inf"):
            raise ValueError(f"the factor of {name} must be above 0")
    alone = [name for name in losses if name not in DPO]
    if not losses or (alone and len(losses) > 1):
        raise ValueError(f"{alone[0]} stands alone" if alone else "there is none")
    if set(losses) == {"sft"}:
        raise ValueError("sft alone has no use for the rejected answers; add another loss")
    return losses


def _preference(value: Any) -> str:
    """One text for all ways of writing it."""
    losses = parse_losses(value)
    if set(losses.values()) == {1.0} and len(losses) == 1:
        return "dpo" if "sigmoid" in losses else next(iter(losses))
    return ",".join(f"{name}={factor:g}" for name, factor in losses.items())


def _with(names: set[str], words: str) -> Need:
    return Need(words, lambda c: c.method == "preference" and bool(names & set(c.losses)))


def _only(names: set[str], words: str) -> Need:
    return Need(words, lambda c: c.method == "preference" and set(c.losses) <= names)


def _listed(names: set[str]) -> str:
    return f"method preference with losses of {', '.join(sorted(names))}"


_PREFERENCE = Need("method preference", lambda c: c.method == "preference")
_OBJECTIVE = Need(f"method {', '.join(OBJECTIVES)}", lambda c: c.method in OBJECTIVES)
_PAIRS = _with(set(DPO), "method preference with a loss of pairs against a reference")
_REFERENCE = Need(
    "method preference with a loss against a reference, and tune full or cached (adapters have "
    "their base; kto meets other answers in each epoch, which cannot be cached)",
    lambda c: (
        c.method == "preference"
        and not set(c.losses) & set(REFERENCE_FREE)
        and (c.tune == "full" or c.reference == "cached")
        and not ("kto" in c.losses and c.reference == "cached")
    ),
)
# The prompt's own tokens are learned where an NLL is.
LEARNS_PROMPTS = Need(
    "supervised training, or method preference with orpo, cpo or sft",
    lambda c: (
        c.method not in OBJECTIVES
        or c.method == "distill"
        or (c.method == "preference" and bool({"orpo", "cpo", "sft"} & set(c.losses)))
    ),
)
_SCORES = Need("method rm on pairs", lambda c: c.method == "rm" and c.reward == "pairs")
_ANY_PAIRS = Need(
    "method preference with a loss of pairs, or method rm on pairs",
    lambda c: (
        (c.method == "preference" and not set(c.losses) & set(KTO))
        or (c.method == "rm" and c.reward == "pairs")
    ),
)
_SHARE = Limit("between 0 and 1", lambda v: 0 <= v <= 1)
_BELOW_HALF = Limit("at least 0 and below 0.5", lambda v: 0 <= v < 0.5)
_LOSSES = Parser(
    f"a loss ({', '.join(PREFERENCES)}) or factors such as sigmoid=0.8,sft=0.2", _preference
)
_ALPHA = Need(
    "f_divergence alpha_divergence", lambda c: c.f_divergence == "alpha_divergence"
) & _only(DIVERGENT, "method preference")

_key = partial(key, "preference and reward")


@dataclass(frozen=True, kw_only=True)
class PreferenceKeys:
    """Keys of methods preference, rm and prm."""

    tune: Tune = _key(
        "lora", "what trains: adapters, adapters on a base in codes, all weights", needs=_OBJECTIVE
    )
    preference: str = _key("dpo", "loss of the preferences", _LOSSES, needs=_PREFERENCE)
    beta: float | None = _key(
        None,
        "how strongly the policy is held to the reference; null: 0.1 (simpo: 2)",
        POSITIVE,
        needs=_PREFERENCE,
    )
    reference: Reference = _key(
        "copy",
        "what is kept of the model as it was: a copy, codes, or (cached) its log-probabilities of "
        "all rows, computed before the training into output/reference",
        needs=_REFERENCE,
    )
    label_smoothing: float = _key(
        0.0, "chance that a preference is the wrong way round", _BELOW_HALF,
        needs=_with(SMOOTHED, _listed(SMOOTHED)),
    )  # fmt: skip
    f_divergence: Divergence = _key(
        "reverse_kl", "divergence from the reference", needs=_only(DIVERGENT, _listed(DIVERGENT))
    )
    f_alpha: float = _key(0.5, "alpha of alpha_divergence", needs=_ALPHA)
    discopop_tau: float = _key(
        0.05, "temperature of discopop", POSITIVE,
        needs=_with({"discopop"}, "method preference with discopop"),
    )  # fmt: skip
    ld_alpha: float = _key(
        1.0, "weight of the longer answer's tokens beyond the other's length (LD-DPO)", _SHARE,
        needs=_PAIRS,
    )  # fmt: skip
    simpo_gamma: float = _key(
        1.0, "margin of simpo", NOT_NEGATIVE, needs=_with({"simpo"}, "method preference with simpo")
    )
    simpo_alpha: float = _key(
        0.0, "shape of simpo's rewards (AlphaPO); 0: log-probabilities",
        needs=_with({"simpo"}, "method preference with simpo"),
    )  # fmt: skip
    cpo_alpha: float = _key(
        1.0, "weight of cpo's NLL of the chosen answers", NOT_NEGATIVE,
        needs=_with({"cpo"}, "method preference with cpo"),
    )  # fmt: skip
    desirable_weight: float = _key(
        1.0, "weight of good answers", NOT_NEGATIVE,
        needs=_with(set(KTO), "method preference with kto or apo_zero_unpaired"),
    )  # fmt: skip
    undesirable_weight: float = _key(
        1.0, "weight of bad answers", NOT_NEGATIVE,
        needs=_with(set(KTO), "method preference with kto or apo_zero_unpaired"),
    )  # fmt: skip
    reward: Literal["pairs", "labels"] = _key(
        "pairs",
        "what a reward model learns from: preferred answers, or answers with numbers",
        needs=Need("method rm", lambda c: c.method == "rm"),
    )
    reward_centering: float = _key(
        0.0, "weight of the squared sum of a pair's rewards", NOT_NEGATIVE, needs=_SCORES
    )
    shared_prefix: bool = _key(
        False, "a pair's prompt is computed once, for both answers", needs=_ANY_PAIRS
    )

    @property
    def losses(self) -> dict[str, float]:
        """{loss: factor} of `preference`."""
        return parse_losses(self.preference)
