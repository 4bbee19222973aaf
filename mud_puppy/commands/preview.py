"""preview: what a run will see of its data."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mud_puppy.config.keys import Config
from mud_puppy.config.schema import AT_LEAST_1, key

_flag = partial(key, "preview")


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Show examples as a run will see them, with what is trained on, or read, coloured."""

    n: int = _flag(3, "rows to show", AT_LEAST_1)


def run_preview(args: Preview, source: Any, flags: Mapping[str, Any]) -> None:
    """Prints the first examples of the config `source` with `flags` on top, and what was cut or
    left out of them."""
    config = Config.load(source, flags, {"output": "-"})
    from mud_puppy.data import preview_text, read_rows
    from mud_puppy.run.datasets import encode_options
    from mud_puppy.run.kinds import kind_of
    from mud_puppy.run.vocabulary import run_tokenizer

    kind = kind_of(config)
    found = read_rows(config.dataset, config.on_bad_rows, convert=kind.convert)
    tokenizer = run_tokenizer(config)
    data = kind.encode(found.rows[: args.n], tokenizer, encode_options(config))
    examples = _marked(config, data.examples, tokenizer)
    word = "read" if config.method == "rm" else "trained"
    print(preview_text(examples, tokenizer, len(examples), sys.stdout.isatty(), word))
    print(f"{len(found)} rows in {config.dataset}", *data.report.lines(), sep="\n")
    if found.bad.count:
        print(f"{found.bad.count} bad rows left out", *found.bad.messages, sep="\n")
    if found.unused_columns:
        print("columns not used:", ", ".join(found.unused_columns))


def _marked(config: Config, examples: Any, tokenizer: Any) -> Any:
    """Weighted as the method has it, where that is no matter of the examples alone."""
    import mud_puppy as mp
    from mud_puppy.data.preview import rewarded, with_prompt
    from mud_puppy.run.vocabulary import with_scores

    if config.method == "preference" and config.train_on_prompt:
        return [with_prompt(pair) for pair in examples]
    if config.method != "rm":
        return examples
    # transformers reads a reward by the pad token of config.json.
    shaped, shapes = mp.abstract(config.model, trust_remote_code=config.trust_remote_code)
    shaped, _ = with_scores(config, shaped, shapes, tokenizer.pad_token_id)
    pad = json.loads(shaped.arch.config).get("pad_token_id")
    return [rewarded(example, pad) for example in examples]
