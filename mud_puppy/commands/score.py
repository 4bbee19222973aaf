"""score: what a reward model or a process reward model says of texts."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from mud_puppy.config.keys import DTYPES, MODEL, REMOTE_CODE, Precision
from mud_puppy.config.output import new_file
from mud_puppy.config.schema import AT_LEAST_1, AT_LEAST_2, REQUIRED, key
from mud_puppy.errors import UserError

_flag = partial(key, "flags")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score texts with a reward model: pairs, answers to rank, texts, steps of reasoning."""

    model: str = _flag(REQUIRED, f"a reward model, or the base of --adapter: {MODEL}")
    dataset: str = _flag(REQUIRED, "file or hub data set")
    output: str = _flag(REQUIRED, "JSONL file to write: the rows with their scores")
    adapter: str | None = _flag(None, "PEFT adapter folder of a reward model")
    column: str = _flag("score", "name of the column of scores")
    precision: Precision = _flag("bf16", "type that the model computes in")
    max_seq_length: int = _flag(
        2048, "longest text in tokens; of a longer one the prompt loses its start", AT_LEAST_2
    )
    batch_size: int = _flag(4, "rows of max_seq_length tokens that are read at a time", AT_LEAST_1)
    chat_template: bool = _flag(True, "use the tokenizer's chat template when it has one")
    on_bad_rows: Literal["stop", "skip"] = _flag("stop", "what to do with a row that is not valid")
    trust_remote_code: bool = _flag(False, REMOTE_CODE)


def run_score(args: Score) -> None:
    """Writes the rows with their scores; prints how the scores agree with what the rows say."""
    path = new_file(args.output)
    from tqdm import tqdm

    import mud_puppy as mp
    from mud_puppy.run.adapted import tokenizer_of, with_head_of
    from mud_puppy.run.datasets import check_fit
    from mud_puppy.run.rewards import check_scores, rewards

    dtype, trusted = DTYPES[args.precision], args.trust_remote_code
    # All that can be wrong is said before weights are read.
    shaped, shapes = mp.abstract(args.model, trust_remote_code=trusted)
    tokenizer = tokenizer_of(args.model, args.adapter, trusted)
    pad = tokenizer.pad_token_id
    if args.adapter is not None:
        shaped, _ = with_head_of(shaped, shapes, args.adapter, pad)
    check_scores(shaped.arch, args.adapter or args.model)
    rows, left_out = _encoded(args, shaped.arch.task, tokenizer)
    examples = [example for row in rows for example in row.examples]
    check_fit(examples, args.max_seq_length, shaped.arch, tokenizer)
    model, params = mp.load(args.model, dtype=dtype, trust_remote_code=trusted)
    if args.adapter is not None:
        model, params = with_head_of(model, params, args.adapter, pad)
        params = mp.load_adapter(params, args.adapter)
    bar = partial(tqdm, desc="score", leave=False, disable=None)
    flat = iter(rewards(model, params, examples, args.max_seq_length, args.batch_size, bar))
    scores = [[next(flat).tolist() for _ in row.examples] for row in rows]
    found = [row.row for row in rows]
    for row, own in zip(found, scores, strict=True):
        if not all(map(math.isfinite, chain(*own))):
            hint = "" if args.precision == "fp32" else "; try --precision fp32"
            raise UserError(f"{row.where}: its score is no finite number{hint}")
    told = _told(found, scores)
    _write(path, args, [_written(args.column, r, s) for r, s in zip(found, scores, strict=True)])
    print(*left_out, *told, f"scores: {args.output}", sep="\n")


def _encoded(args: Score, task: str, tokenizer: Any) -> tuple[Sequence[Any], list[str]]:
    """The rows with their examples, and lines of what was cut, left out or not used."""
    from mud_puppy.data import EncodeOptions, read_rows
    from mud_puppy.data.scorable import one_form, scorable
    from mud_puppy.data.scorable_encoding import encode_scorable

    convert = scorable(task, (args.column, _ranking(args.column)))
    found = read_rows(args.dataset, args.on_bad_rows, convert=convert)
    one_form(found.rows)
    options = EncodeOptions(
        chat_template=args.chat_template,
        max_seq_length=args.max_seq_length,
        on_bad_rows=args.on_bad_rows,
    )
    examples, report = encode_scorable(found.rows, tokenizer, options)
    lines = replace(report, bad=found.bad + report.bad).lines()
    if found.unused_columns:
        lines.append("columns not used: " + ", ".join(found.unused_columns))
    return examples, lines


def _ranking(column: str) -> str:
    return f"{column}_ranking"


def _written(column: str, row: Any, scores: list[list[float]]) -> dict[str, Any]:
    """The row as it was read, with its scores."""
    if row.form == "pairs":
        [chosen], [rejected] = scores
        return row.row | {column: {"chosen": chosen, "rejected": rejected}}
    if row.form == "answers":
        flat = [one for [one] in scores]
        best = sorted(range(len(flat)), key=lambda i: -flat[i])
        return row.row | {column: flat, _ranking(column): best}
    if row.form == "texts":
        return row.row | {column: scores[0][0]}
    return row.row | {column: scores[0]}


def _write(path: Path, args: Score, rows: list[dict[str, Any]]) -> None:
    # Parquet's dates have no form in JSON but their text. Halves of characters, which UTF-8 has
    # not, are escaped as JSON escapes them.
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError as error:
        raise UserError(f"output {args.output}: cannot be written ({error.strerror})") from None


def _told(rows: Sequence[Any], scores: Sequence[list[list[float]]]) -> list[str]:
    """The lines to print: the figures of all rows, and those of each source."""
    import numpy as np

    from mud_puppy.run import calibration

    form, labelled = rows[0].form, rows[0].labels is not None

    def figures(which: Any) -> dict[str, float]:
        own = [scores[i] for i in which]
        known = [rows[i].labels for i in which]
        if form == "pairs":
            return calibration.of_pairs(*np.array(own)[..., 0].T)
        if form == "steps" and labelled:
            right = [np.array(steps) for [steps] in own]
            return calibration.of_steps(right, list(map(np.array, known)))
        flat = np.array([one for texts in own for text in texts for one in text])
        if labelled:
            return calibration.of_labels(flat, np.array(known)[:, 0])
        return calibration.of_scores(flat, "steps" if form == "steps" else "texts")

    told = {"": figures(range(len(rows)))}
    for source, own in calibration.by_source([row.source for row in rows], figures).items():
        told[f"  {source or '(no source)'}: "] = own
    return [name + calibration.described(own) for name, own in told.items()]
