"""Batches of pairs, rated answers and answers in steps: the arrays that their losses read.

Every sequence, or what a row holds of it, is a segment, as in `collate_sft`, whose arrays tokens,
positions, segment_ids and targets all batches have. M is `most`, the most examples that a row may
hold; the options of a `collate_*` are given by functools.partial.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from mud_puppy.data.example import Example, PairExample, RatedExample, StepsExample
from mud_puppy.data.loader import Batch, collate_sft, padded_length


def collate_pairs(
    rows: Sequence[Sequence[PairExample]],
    length: int,
    most: int,
    ld_alpha: float = 1.0,
    train_on_prompt: bool = False,
    pad_token_id: int | None = None,
    shared_prefix: bool = False,
) -> Batch:
    """Rows of pairs to arrays of [B, length] and, one for each pair or answer, [B, M] or [B, 2M].

    answers int32 [B, T]: 1 + the answer, in its row, that the target at t is a trained token of
    (chosen of pair i: 2i, rejected: 2i + 1); 0: none. weights [B, T]: 1 on these targets, and
    `ld_alpha` on those beyond the length of the pair's shorter answer (LD-DPO, arXiv 2409.06411).
    nll_weights [B, T]: equal on the trained targets of all chosen answers (with train_on_prompt on
    all targets of their sequences), together the number of pairs.
    ends int32 [B, 2M]: where in the row the sequence's last token stands that is not pad_token_id;
    0: no answer. transformers reads a reward there, also where answers end with what it pads with.
    pair_weights [B, M]: 1, or 0 where there is no pair. margins [B, M]. chosen_tokens,
    rejected_tokens [B, M]: trained tokens of the answers, 1 where there is no pair.
    shared_prefix: for pairs that stand in a row with their prompt once (`PairExample.prompt_once`);
    then also prefix_ids int32 [B, T], of `model.Inputs`. Raises ValueError for such pairs without
    it: the rejected answers would not see their prompts.
    """
    batch, places = _laid(rows, length, 2 * most, pad_token_id)
    trained = batch["weights"] > 0
    shape = (len(rows), most)
    batch |= {name: np.zeros(shape, np.float32) for name in ("pair_weights", "margins")}
    batch |= {name: np.ones(shape, np.float32) for name in ("chosen_tokens", "rejected_tokens")}
    batch["nll_weights"] = np.zeros_like(batch["weights"])
    if shared_prefix:
        batch["prefix_ids"] = np.zeros_like(batch["segment_ids"])
    for b, i, (chosen, rejected) in places:
        pair = rows[b][i]
        prefix = pair.starts[1]
        if shared_prefix:
            batch["prefix_ids"][b, chosen.start : chosen.start + prefix] = i + 1
            batch["prefix_ids"][b, rejected] = -(i + 1) if prefix else 0
        elif prefix:
            raise ValueError(f"{pair.where}: the pair has its prompt once: collate shared_prefix")
        batch["pair_weights"][b, i] = 1.0
        batch["margins"][b, i] = pair.margin
        batch["chosen_tokens"][b, i] = pair.chosen.trained
        batch["rejected_tokens"][b, i] = pair.rejected.trained
        shorter = min(pair.chosen.trained, pair.rejected.trained)
        for place in (chosen, rejected):
            rank = np.cumsum(trained[b, place])
            batch["weights"][b, place][rank > shorter] *= ld_alpha
        learnt = np.s_[chosen.start : chosen.stop - 1] if train_on_prompt else chosen
        batch["nll_weights"][b, learnt] = 1.0 if train_on_prompt else trained[b, learnt]
    total = batch["nll_weights"].sum(dtype=np.float64)
    if total > 0:
        batch["nll_weights"] *= np.float32(batch["pair_weights"].sum() / total)
    return batch


def collate_rated(
    rows: Sequence[Sequence[RatedExample]],
    length: int,
    most: int,
    kl_length: int | None = None,
    pad_token_id: int | None = None,
) -> Batch:
    """Rows of rated answers to arrays of [B, length] and, one for each answer, [B, M].

    answers int32 [B, T]: 1 + the answer, in its row, that the target at t is a trained token of;
    0: none. weights [B, T]: 1 on these targets. ends int32 [B, M]: as of `collate_pairs`.
    answer_weights [B, M]: 1, or 0 where there is none. labels [B, M].
    With kl_length (of `kl_row_length`) also kl_tokens, kl_positions, kl_segment_ids, kl_targets,
    kl_answers, kl_weights [B, kl_length]: each prompt with the answer of the example before it in
    the batch, the first with that of the last (KTO's estimate of the KL, arXiv 2402.01306, sec. 4).
    """
    batch, places = _laid(rows, length, most, pad_token_id)
    shape = (len(rows), most)
    batch |= {name: np.zeros(shape, np.float32) for name in ("answer_weights", "labels")}
    for b, i, _ in places:
        batch["answer_weights"][b, i] = 1.0
        batch["labels"][b, i] = rows[b][i].label
    if kl_length is not None:
        rotated, _ = _laid(_rotated(rows), kl_length, most)
        del rotated["ends"]
        batch |= {f"kl_{name}": array for name, array in rotated.items()}
    return batch


def kl_row_length(examples: Sequence[RatedExample], length: int, most: int) -> int:
    """The length of rows of `most` rotated examples, of which `length` tokens hold the examples as
    they are: an answer of another row may take the place of one of this row."""
    prompt = max(example.shared for example in examples)
    answer = max(example.size - example.shared for example in examples)
    return padded_length(min(length + answer, most * (prompt + answer)))


def collate_steps(rows: Sequence[Sequence[StepsExample]], length: int, most: int) -> Batch:
    """Rows of answers in steps to arrays [B, length]: weights (float32) is 1 on the last token of
    each step (the token itself, not the target), labels (int32) is 1 there if the step is right."""
    batch, places = _laid(rows, length, most)
    del batch["answers"], batch["ends"]
    batch["weights"] = np.zeros((len(rows), length), np.float32)
    batch["labels"] = np.zeros((len(rows), length), np.int32)
    for b, i, (place,) in places:
        batch["weights"][b, place] = rows[b][i].example.weights
        batch["labels"][b, place] = rows[b][i].labels
    return batch


Place = tuple[int, int, tuple[slice, ...]]  # row, example, and where its segments stand in the row


def _laid(
    rows: Sequence[Sequence], length: int, answers: int, pad: int | None = None
) -> tuple[Batch, list[Place]]:
    """The arrays of `collate_sft` of all segments, answers [B, length], ends [B, answers], and
    where everything stands."""
    batch = collate_sft(
        [[one for example in row for one in example.segments] for row in rows], length
    )
    batch["answers"] = np.where(batch["weights"] > 0, batch["segment_ids"], 0)
    batch["ends"] = np.zeros((len(rows), answers), np.int32)
    places = list(_places(rows))
    for b, i, slices in places:
        first = i * len(slices)
        ends = [place.start + last_token(batch["tokens"][b, place], pad) for place in slices]
        batch["ends"][b, first : first + len(slices)] = ends
        for place, start in zip(slices, rows[b][i].starts, strict=True):
            batch["positions"][b, place] += start
    return batch, places


def last_token(tokens: np.ndarray, pad: int | None) -> int:
    """Where the last token stands that is not `pad`: there a reward is read; 0 if all are."""
    others = np.flatnonzero(tokens != (-1 if pad is None else pad))
    return int(others[-1]) if len(others) else 0


def _places(rows: Sequence[Sequence]) -> Iterator[Place]:
    for b, row in enumerate(rows):
        at = 0
        for i, example in enumerate(row):
            slices = []
            for one in example.segments:
                slices.append(slice(at, at + one.size))
                at += one.size
            yield b, i, tuple(slices)


def _rotated(rows: Sequence[Sequence[RatedExample]]) -> list[list[RatedExample]]:
    """The rows with every answer moved on by one example."""
    examples = [example for row in rows for example in row]
    mixed = iter(
        _with_answer(example, before)
        for example, before in zip(examples, [*examples[-1:], *examples[:-1]], strict=True)
    )
    return [[next(mixed) for _ in row] for row in rows]


def _with_answer(asked: RatedExample, answered: RatedExample) -> RatedExample:
    """The prompt of one example with the answer of the other."""
    p, a = asked.shared, answered.shared
    x, y = asked.example, answered.example
    tokens = np.concatenate([x.tokens[:p], y.tokens[a:]])
    weights = np.concatenate([x.weights[:p], y.weights[a:]])
    return RatedExample(Example(tokens, weights, x.where), p, answered.label, answered.source)
