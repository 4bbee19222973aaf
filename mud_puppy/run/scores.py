"""What methods ask of a model: arrays by name, from params and a batch of `data`'s collates.

Each score(model, params, reference, batch, run_layers) is one of `Method`. Log-probabilities are
float32, those of answers sums over their tokens. No gradient reaches `reference`, params of the
same model, or a `Teacher`, or None for a loss that has none. "aux" holds the auxiliary sums of
`Model.forward`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mud_puppy.kernels import token_logps
from mud_puppy.kernels.cross_entropy.logits import over_tokens
from mud_puppy.losses import generalized_jsd, top_k_jsd
from mud_puppy.model import Inputs, Model, head, scan_layers, score_head
from mud_puppy.run.teacher import Teacher

Tree = Any
Batch = dict[str, Array]
Scores = dict[str, Any]


def score_tokens(
    model: Model, params: Tree, reference: Tree, batch: Batch, run_layers: Callable
) -> Scores:
    """Float32 [B, T]: "logps" of every target and "entropy" of every prediction."""
    hidden, aux = _hidden(model, params, batch, run_layers)
    softcap = model.arch.logit_softcap
    logps, entropy = token_logps(hidden, head(params), batch["targets"], softcap=softcap)
    return {"logps": logps, "entropy": entropy, "aux": aux}


def score_pairs(
    model: Model, params: Tree, reference: Tree, batch: Batch, run_layers: Callable
) -> Scores:
    """Of pairs (`data.collate_pairs`): "chosen", "rejected", "nll" [B, M] and, with a reference,
    "reference_chosen", "reference_rejected"."""
    found = score_tokens(model, params, None, batch, run_layers)
    answers = 2 * batch["pair_weights"].shape[-1]
    chosen, rejected = _pairs(_sums(found["logps"], batch, answers))
    # Beside the answer's tokens, which `answers` knows, the prompt's may be learned.
    nll = _of_answers(-found["logps"] * batch["nll_weights"], batch["segment_ids"], answers)
    scores = {"chosen": chosen, "rejected": rejected, "nll": _pairs(nll)[0], "aux": found["aux"]}
    logps = _reference_logps(model, reference, batch, run_layers)
    if logps is None:
        return scores
    chosen, rejected = _pairs(_sums(logps, batch, answers))
    return scores | {"reference_chosen": chosen, "reference_rejected": rejected}


def score_rated(
    model: Model, params: Tree, reference: Tree, batch: Batch, run_layers: Callable
) -> Scores:
    """Of rated answers (`data.collate_rated`): "logps", "reference_logps" [B, M] and, if the batch
    has answers to other prompts, "kl_logps", "reference_kl_logps" [B, M]."""
    found = score_tokens(model, params, None, batch, run_layers)
    answers = batch["answer_weights"].shape[-1]
    scores = {"logps": _sums(found["logps"], batch, answers), "aux": found["aux"]}
    logps = _reference_logps(model, reference, batch, run_layers)
    assert logps is not None  # no loss of rated answers does without
    scores["reference_logps"] = _sums(logps, batch, answers)
    if "kl_tokens" not in batch:
        return scores
    other = {name.removeprefix("kl_"): x for name, x in batch.items() if name.startswith("kl_")}
    for name, of in (("kl_logps", params), ("reference_kl_logps", reference)):
        scores[name] = _sums(_logps(model, of, other, run_layers), other, answers)
    return scores


def score_rewards(
    model: Model, params: Tree, reference: Tree, batch: Batch, run_layers: Callable
) -> Scores:
    """The rewards of all answers at their last tokens: "values" [B, K]; and of pairs "chosen" and
    "rejected" [B, M]."""
    hidden, aux = _hidden(model, params, batch, run_layers)
    last = jnp.take_along_axis(hidden, batch["ends"][..., None], axis=1)
    values = score_head(last, params)[..., 0]
    scores = {"values": values, "aux": aux}
    if "pair_weights" in batch:
        scores["chosen"], scores["rejected"] = _pairs(values)
    return scores


def score_steps(
    model: Model, params: Tree, reference: Tree, batch: Batch, run_layers: Callable
) -> Scores:
    """Of every token "logits" [B, T, labels]."""
    hidden, aux = _hidden(model, params, batch, run_layers)
    return {"logits": score_head(hidden, params), "aux": aux}


def score_distilled(
    model: Model,
    params: Tree,
    reference: Teacher | None,
    batch: Batch,
    run_layers: Callable,
    *,
    beta: float,
    temperature: float,
    supervised: bool = False,
) -> Scores:
    """Of every token "divergence" [B, T]: from the teacher's distribution over the words that both
    models have (`generalized_jsd`), or from the k words of it that the batch names (`top_k_jsd`).
    supervised: "logps" of the targets too."""
    hidden, aux = _hidden(model, params, batch, run_layers)
    measure, states, heads, arrays = top_k_jsd, [hidden], [head(params)], ()
    softcaps = [model.arch.logit_softcap]
    if reference is None:
        arrays = batch["teacher_ids"], batch["teacher_logps"]
    else:
        measure = generalized_jsd
        states.append(_hidden(reference.model, reference.params, batch, run_layers)[0])
        heads.append(head(reference.params))
        softcaps.append(reference.model.arch.logit_softcap)
    block = partial(measure, beta=beta, temperature=temperature)
    scores = {"divergence": over_tokens(block, states, heads, softcaps, arrays), "aux": aux}
    if not supervised:
        return scores
    logps, _ = token_logps(hidden, heads[0], batch["targets"], softcap=softcaps[0])
    return scores | {"logps": logps}


def likeliest(
    teacher: Teacher, batch: Batch, k: int, words: int, temperature: float
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
    """The k likeliest of the first `words` tokens after each of the batch's, and their
    log-probabilities among these, of logits divided by the temperature."""

    def block(logits: Any) -> Any:
        logps = jax.nn.log_softmax(logits[..., :words] / temperature)
        found, ids = jax.lax.top_k(logps, min(k, logps.shape[-1]))
        return ids.astype(jnp.int32), found

    hidden, _ = _hidden(teacher.model, teacher.params, batch, scan_layers)
    softcap = teacher.model.arch.logit_softcap
    return over_tokens(block, (hidden,), (head(teacher.params),), (softcap,))


def _hidden(
    model: Model, params: Tree, batch: Batch, run_layers: Callable
) -> tuple[Float[Array, "B T D"], Tree]:
    # Of pairs with their prompt once (`collate_pairs`).
    prefix_ids = batch.get("prefix_ids")
    inputs = Inputs(
        batch["tokens"], batch["positions"], batch["segment_ids"], prefix_ids=prefix_ids
    )
    hidden, _, aux = model.forward(params, inputs, run_layers=run_layers)
    return hidden, aux


def _reference_logps(
    model: Model, reference: Tree, batch: Batch, run_layers: Callable
) -> Float[Array, "B T"] | None:
    """What was computed before (`run.cached`), or the reference's now; None without either."""
    if "reference_logps" in batch:
        return batch["reference_logps"]
    return None if reference is None else _logps(model, reference, batch, run_layers)


def _logps(model: Model, params: Tree, batch: Batch, run_layers: Callable) -> Float[Array, "B T"]:
    """Log-probabilities of the targets, without a gradient."""
    still = jax.tree.map(jax.lax.stop_gradient, params)
    return score_tokens(model, still, None, batch, run_layers)["logps"]


def _sums(logps: Float[Array, "B T"], batch: Batch, count: int) -> Float[Array, "B K"]:
    return _of_answers(logps * batch["weights"], batch["answers"], count)


def _of_answers(
    values: Float[Array, "B T"], answers: Int[Array, "B T"], count: int
) -> Float[Array, "B K"]:
    """Sums over the tokens of each answer; answers: 1 + its index in the row, 0 for none. A sum
    under a mask, and no scatter, so that it is the same each time."""
    own = answers[:, None, :] == 1 + jnp.arange(count)[None, :, None]
    return jnp.where(own, values[:, None, :], 0.0).sum(-1)


def _pairs(values: Float[Array, "B K"]) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """(chosen, rejected): a row's answers stand in turn."""
    return values[:, 0::2], values[:, 1::2]
