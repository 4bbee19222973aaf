"""TRL's own loss code on given numbers: its trainers' methods, with a stand-in for the trainer.

Each function takes float64-free torch tensors of answers' log-probabilities and gives TRL's scalar.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer


def _trainer(**fields: Any) -> SimpleNamespace:
    """What the methods read of a trainer in training, on one device."""

    def same(value: Any) -> Any:
        return value

    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def _answers(tokens: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """(model, inputs): the model's log-probabilities are `tokens` [S, T], NaN where there is none.
    Each answer has a token of prompt before it."""
    mask = torch.cat([torch.zeros(len(tokens), 1), (~tokens.isnan()).float()], dim=1).long()
    zeros = torch.zeros_like(tokens)
    out = SimpleNamespace(
        log_probs=tokens.nan_to_num(),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    ids = torch.zeros_like(mask)
    inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids)}
    return lambda **_: out, inputs


def dpo(chosen: Any, rejected: Any, reference: tuple[Any, Any], **settings: Any) -> Any:
    """chosen, rejected: [P, T], a token each, NaN beyond an answer; reference: sums, [P] each."""
    model, inputs = _answers(torch.cat([chosen, rejected]))
    losses = settings.pop("loss")
    trainer = _trainer(
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        f_divergence_type=settings.get("divergence", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("alpha", 0.5),
        ld_alpha=settings.get("ld_alpha"),
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
    )
    inputs |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return DPOTrainer._compute_loss(trainer, model, inputs, False), trainer._metrics["train"]


def kto(logps: Any, labels: Any, reference: Any, kl: tuple[Any, Any], **settings: Any) -> Any:
    """logps: [S, T], a token each; reference: sums, [S]; kl: sums of policy and reference, [S]."""
    model, inputs = _answers(logps)
    trainer = _trainer(
        loss_type=settings["loss"],
        beta=settings["beta"],
        desirable_weight=settings["desirable_weight"],
        undesirable_weight=settings["undesirable_weight"],
        calculate_KL=settings["loss"] == "kto",
        _compute_kl_logps=lambda model, batch: kl[0],
    )
    inputs |= {"label": labels, "ref_logps": reference, "ref_KL_logps": kl[1]}
    return KTOTrainer._compute_loss(trainer, model, inputs, False)


def cpo(chosen: Any, rejected: Any, **settings: Any) -> Any:
    """chosen, rejected: [P], sums or means as the loss wants them. The preference part alone."""
    trainer = _trainer(
        loss_type=settings["loss"],
        beta=settings["beta"],
        alpha=settings.get("alpha", 0.0),
        simpo_gamma=settings.get("gamma", 0.5),
        label_smoothing=settings.get("label_smoothing", 0.0),
    )
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()


def orpo(chosen: Any, rejected: Any, beta: float) -> Any:
    """The odds ratio's part; TRL subtracts it from the NLL. chosen, rejected: means, [P]."""
    return -ORPOTrainer.odds_ratio_loss(_trainer(beta=beta), chosen, rejected)[0].mean()


def reward(chosen: Any, rejected: Any, margins: Any, centering: float | None) -> Any:
    def model(**_: Any) -> Any:
        return SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])

    inputs = {"attention_mask": torch.ones(len(chosen) * 2, 1)}
    if margins is not None:
        # TRL gives them to the model too, which takes what it knows.
        inputs["margin"] = margins
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=centering))
    return RewardTrainer.compute_loss(trainer, model, inputs)
