"""The scores that a reward model or a process reward model gives to examples.

They are packed as in training, in batches of one shape, so that one program is compiled; each
example is a segment of its own, and its score is that of the example alone.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from mud_puppy.data import Loader, collate_rated, collate_steps
from mud_puppy.errors import UserError
from mud_puppy.model import Arch, Model, scan_layers
from mud_puppy.run.scores import score_rewards, score_steps

Tree = Any
READ = ("tokens", "positions", "segment_ids", "ends")
# What `rewards` reads: the task and its labels.
KINDS = {("sequence", 1): "a reward model", ("token", 2): "a process reward model"}


def check_scores(arch: Arch, source: Any) -> None:
    """UserError unless it is a model whose scores `rewards` reads."""
    if (arch.task, arch.labels) in KINDS:
        return
    has = "a head of words" if arch.task == "lm" else f"{arch.labels} scores of each {arch.task}"
    raise UserError(
        f"{source}: has {has}; score takes a reward model (1 score of each sequence) or a process "
        "reward model (2 of each token)"
    )


def rewards(
    model: Model,
    params: Tree,
    examples: Sequence[Any],
    max_seq_length: int,
    batch_size: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[Float[np.ndarray, " _"]]:
    """What the model says of each example, in order: float32 [1] of a `RatedExample`, its reward;
    float32 [steps] of a `StepsExample`, the probability that a step is right (label 1).

    The reward is read at the last token that is not the config's pad_token_id, as transformers
    does. batch_size: rows of up to max_seq_length tokens that are read at a time.
    """
    pad = json.loads(model.arch.config).get("pad_token_id")
    sequence = model.arch.task == "sequence"
    collate = partial(collate_rated, pad_token_id=pad) if sequence else collate_steps
    loader = Loader(
        examples, batch_size, max_seq_length=max_seq_length, shuffle=False, collate=collate
    )
    found: dict[int, np.ndarray] = {}
    for step in progress(range(loader.steps_per_epoch)):
        batch = {name: x[0] for name, x in loader.batch_at(step).items()}
        read = {name: x for name, x in batch.items() if name in READ}
        scores = np.asarray(_scores(model, params, read))
        for b, row in enumerate(loader.rows[step * batch_size : (step + 1) * batch_size]):
            for i, example in enumerate(row):
                if sequence:
                    found[example] = scores[b, i : i + 1]
                    continue
                ends = (batch["segment_ids"][b] == i + 1) & (batch["weights"][b] > 0)
                found[example] = scores[b, ends]
    return [found[i] for i in range(len(examples))]


@partial(jax.jit, static_argnums=0)
def _scores(model: Model, params: Tree, batch: dict[str, Array]) -> Float[Array, "B _"]:
    run_layers = partial(scan_layers, remat="none")
    if model.arch.task == "sequence":
        return score_rewards(model, params, None, batch, run_layers)["values"]
    logits = score_steps(model, params, None, batch, run_layers)["logits"]
    return jax.nn.softmax(logits, axis=-1)[..., 1]
