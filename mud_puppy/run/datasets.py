"""The run's data: rows read, split, tokenized and packed, as the config says."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mud_puppy.config import Config
from mud_puppy.data import (
    AnyExample,
    EncodeOptions,
    Loader,
    RatedExample,
    batch_size_for,
    read_rows,
    row_length,
    rows_apart,
    source_names,
    split,
)
from mud_puppy.errors import UserError
from mud_puppy.model import Arch, Model, check_prefix
from mud_puppy.run.kinds import kind_of
from mud_puppy.run.prompts import Prompt, choose_prompts
from mud_puppy.sampling import context_length

log = logging.getLogger("mud_puppy")


@dataclass(frozen=True)
class RunData:
    """What the loop reads: batches to train on, batches to evaluate on, prompts to answer."""

    train: Loader
    evaluation: Loader | None
    prompts: list[Prompt]


def load_data(config: Config, model: Model, tokenizer: Any, batch_devices: int) -> RunData:
    """Reads and tokenizes everything; a fault in the data, or data that the model is not made for,
    is found before its weights are read."""
    rows = list(_read(config.dataset, config))
    held: list[Any] = []
    if config.eval_dataset is not None:
        held = list(_read(config.eval_dataset, config))
    elif config.eval_split is not None:
        rows, held = split(rows, config.eval_split, config.seed)
    what = "observed" if config.method == "gptq" else "train"
    train = _loader(rows, config, model.arch, tokenizer, batch_devices, what)
    evaluation = None
    if held:
        evaluation = _loader(held, config, model.arch, tokenizer, batch_devices, "eval")
    return RunData(train, evaluation, choose_prompts(config, model, tokenizer, held or rows))


def eval_data(config: Config, model: Model, tokenizer: Any) -> Loader:
    """All of `dataset` in order, to be measured or observed, not trained on."""
    rows = list(_read(config.dataset, config))
    return _loader(rows, config, model.arch, tokenizer, 1, "eval")


def encode_options(config: Config) -> EncodeOptions:
    """How the run's rows become examples."""
    return EncodeOptions(
        chat_template=config.chat_template,
        roles_to_train=config.roles_to_train,
        train_on_prompt=config.train_on_prompt,
        max_seq_length=config.max_seq_length,
        on_long=config.on_long,
        on_bad_rows=config.on_bad_rows,
        preprocess_workers=config.preprocess_workers,
    )


def _read(source: str, config: Config) -> tuple[Any, ...]:
    found = read_rows(source, config.on_bad_rows, convert=kind_of(config).convert)
    for message in found.bad.messages:
        log.warning("bad row left out: %s", message)
    if found.bad.count:
        log.warning("%s: %d bad rows left out", source, found.bad.count)
    if found.unused_columns:
        log.info("%s: columns not used: %s", source, ", ".join(found.unused_columns))
    return found.rows


def _loader(
    rows: list[Any], config: Config, arch: Arch, tokenizer: Any, batch_devices: int, what: str
) -> Loader:
    kind = kind_of(config, json.loads(arch.config).get("pad_token_id"))
    data = kind.encode(rows, tokenizer, encode_options(config))
    check_fit(data.examples, config.max_seq_length, arch, tokenizer)
    if kind.kl and arch.learned_positions:
        _check_mixed(data.examples, arch.max_positions)
    for line in data.report.lines():
        log.warning("%s: %s", what, line)
    length = row_length(data.examples, config.max_seq_length, config.pack_sequences)
    if config.shared_prefix:
        check_prefix(arch, length)
    batch_size = rows_of(config, length, batch_devices)
    if config.tokens_per_batch is not None:
        log.info("tokens_per_batch: %d rows of %d a batch", batch_size, length)
    train = what != "eval"
    bins = (
        None if train else rows_apart(data.examples, config.max_seq_length, config.pack_sequences)
    )
    loader = Loader(
        data.examples,
        batch_size,
        accumulation=config.gradient_accumulation if train else 1,
        max_seq_length=config.max_seq_length,
        pack=config.pack_sequences,
        seed=config.seed,
        shuffle=train,
        collate=kind.collate_of(data.examples),
        bins=bins,
    )
    told = loader.describe()
    log.info(
        "%s: %d examples, %d tokens (%d trained) in %d rows of %d, %.1f %% filled",
        what,
        told["examples"],
        told["tokens"],
        told["trained_tokens"],
        told["rows"],
        told["row_length"],
        100 * told["packing_efficiency"],
    )
    if bins is not None:
        names = dict.fromkeys(source_names(data.examples))
        log.info("%s: figures of each source, too: %s", what, ", ".join(names))
    return loader


def rows_of(config: Config, length: int, batch_devices: int) -> int:
    """Rows of `length` tokens in each batch (an accumulation), over all devices."""
    if config.tokens_per_batch is not None:
        rows = batch_size_for(config.tokens_per_batch, length)
        return max(batch_devices, rows // batch_devices * batch_devices)
    if config.batch_size % batch_devices:
        raise UserError(
            f"batch_size {config.batch_size} rows cannot be split over {batch_devices} devices; "
            f"make it a multiple of {batch_devices}, or name fewer devices with --mesh"
        )
    return config.batch_size


def _check_mixed(examples: Sequence[RatedExample], most: int) -> None:
    """A prompt with another's answer must have positions, too: a lookup beyond them would take the
    last one, without a word."""
    asked = max(examples, key=lambda example: example.shared)
    answered = max(examples, key=lambda example: example.size - example.shared)
    answer = answered.size - answered.shared
    if asked.shared + answer > most:
        raise UserError(
            f"preference kto: the prompt of {asked.where} ({asked.shared} tokens) may meet the "
            f"answer of {answered.where} ({answer}), but the model has {most} positions; set "
            f"max_seq_length to at most {most // 2}"
        )


def check_fit(
    examples: Sequence[AnyExample], max_seq_length: int, arch: Arch, tokenizer: Any
) -> None:
    """No example beyond the model's positions (RoPE extrapolates badly) or vocabulary (a lookup
    beyond the embedding would take its last row, without a word)."""
    most = context_length(arch)
    for example in (one for built in examples for one in built.sequences):
        if len(example.tokens) > most:
            raise UserError(
                f"max_seq_length {max_seq_length}: {example.where} has "
                f"{len(example.tokens)} tokens, but the model has {most} positions; set "
                f"max_seq_length to at most {most}"
            )
        if (worst := int(example.tokens.max())) >= arch.vocab_size:
            raise UserError(
                f"{example.where}: token {worst} ({tokenizer.convert_ids_to_tokens(worst)!r}) is "
                f"outside the model's vocabulary of {arch.vocab_size}: use the tokenizer that "
                "belongs to the model, or give the embedding more rows (added_tokens, or "
                "mp.resize_embeddings and mp.save_hf)"
            )
