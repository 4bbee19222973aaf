"""Every key of a run, in one frozen dataclass: the one definition.

YAML keys, command-line flags, help texts and docs/config.md are made from it. Attributes are flat
(`config.lora_r`); sections only group the help. `Config.load` is the way in: it converts, fills in
what depends on the method, and refuses keys that would have no effect. It reads no file but the
config; `check_output` looks at the output folder.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mud_puppy.config.adapters import AdapterKeys
from mud_puppy.config.distillation import DistillKeys
from mud_puppy.config.preference import COUPLED, LEARNS_PROMPTS, OBJECTIVES, PreferenceKeys
from mud_puppy.config.quantization import QuantizationKeys
from mud_puppy.config.refused import refuse
from mud_puppy.config.schema import (
    AT_LEAST_1,
    AT_LEAST_2,
    BELOW_1,
    INSIDE_1,
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    Need,
    Parser,
    key,
    keys_of,
    shown,
    texts,
)
from mud_puppy.config.source import Given, convert_all, from_flags, from_source
from mud_puppy.errors import UserError, nearest

Method = Literal["full", "lora", "qlora", "qat", "gptq", "preference", "rm", "prm", "distill"]
Precision = Literal["bf16", "fp32", "fp16"]
Computed = Literal["bf16", "fp32", "fp16", "fp8", "fp8-emulated"]
Checkpointing = Literal["none", "full", "offload", "attention", "projections"]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant"]
Optimizer = Literal["adamw", "adamw_8bit", "adafactor", "lion", "lion_8bit", "sgd", "muon"]
DTYPES = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "fp8": "bfloat16",  # of all but the products in float8
    "fp8-emulated": "bfloat16",
}
MESH_AXES = ("data", "fsdp")
# Where the weights train, and where adapters do.
LEARNING_RATES = {"preference": (1e-6, 2e-5), "rm": (1e-5, 1e-4), "prm": (1e-5, 1e-4)}
SFT_RATES = (2e-5, 2e-4)
SECTIONS = (
    "run", "data", "training", "preference and reward", "distillation", "LoRA", "quantization",
    "devices",
)  # fmt: skip
MODEL = "model folder, GGUF file or hub id (org/name, or org/name@revision)"
REMOTE_CODE = "run the Python of the model's folder for config and tokenizer"

_TRAINS = Need("a method other than gptq", lambda c: c.method != "gptq")
_NEW_ROWS = Need(
    "method full, or qat without qat_lora (adapters have no rows for new tokens)",
    lambda c: c.trains in ("full", "qat") and not c.adapts,
)
_EVAL = Need("eval_dataset or eval_split", lambda c: c.eval_dataset or c.eval_split) & _TRAINS
_NO_EVAL_SET = Need("no eval_dataset (give one of the two)", lambda c: c.eval_dataset is None)
_NO_TOKENS = Need("no tokens_per_batch (give one of the two)", lambda c: c.tokens_per_batch is None)
_ROLES = Need(
    "train_on_prompt to be false, or method preference, and a method other than rm and prm, which "
    "read answers as a whole",
    lambda c: c.method == "preference" or (c.method not in ("rm", "prm") and not c.train_on_prompt),
)
_NO_WARMUP = Need("warmup_steps 0 (give one of the two)", lambda c: c.warmup_steps == 0) & _TRAINS
_NO_RESUME = Need("resume to be false (give one of the two)", lambda c: not c.resume)
_NO_MESH = Need("no mesh (give one of the two)", lambda c: c.mesh is None)
_RESTARTS = Need(
    "lr_scheduler cosine_with_restarts", lambda c: c.lr_scheduler == "cosine_with_restarts"
)
_POLYNOMIAL = Need("lr_scheduler polynomial", lambda c: c.lr_scheduler == "polynomial")
_ADAMW = (
    Need("optimizer adamw or adamw_8bit", lambda c: c.optimizer in ("adamw", "adamw_8bit"))
    & _TRAINS
)
_SAMPLES = Need("sample_prompts", lambda c: c.sample_prompts != 0)
_TEXTS_OUT = Need(
    "a method other than gptq, and a method that gives texts (0 is none)",
    lambda c: c.sample_prompts == 0 or c.method not in ("gptq", "rm", "prm"),
)


def _mesh(value: Any) -> str:
    """The text itself when its form is right; `parallel.make_mesh` reads it and counts devices."""
    if isinstance(value, Mapping):
        value = ",".join(f"{axis}={size}" for axis, size in value.items())
    if not isinstance(value, str):
        raise ValueError
    parts = [part.partition("=") for part in value.replace(" ", "").split(",")]
    for axis, _, size in parts:
        if axis not in MESH_AXES:
            raise ValueError(f"axes are data and fsdp.{nearest(axis, MESH_AXES)}")
        if not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ValueError(f"{axis} needs a size of at least 1, or -1 for the devices left over")
    if len({axis for axis, _, _ in parts}) < len(parts):
        raise ValueError("an axis stands twice")
    return ",".join(axis + "=" + size for axis, _, size in parts)


def _prompts(value: Any) -> int | tuple[str, ...]:
    """A count, or the prompts themselves; a flag given once or several times arrives as a list."""
    if isinstance(value, list | tuple):
        texts = [text for text in value if isinstance(text, str) and text]
        if not texts or len(texts) < len(value):
            raise ValueError
        "".join(texts).encode()  # bytes of the terminal that are no UTF-8
        if len(texts) > 1 or not texts[0].isdecimal():
            return tuple(texts)
        value = texts[0]
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError
    return int(str(value))


_MESH = Parser("a mesh such as data=2,fsdp=4", _mesh)
_TEXTS = Parser("a text or a list of texts", texts)
_PROMPTS = Parser("a count or a list of prompts", _prompts)

_run = partial(key, "run")
_data = partial(key, "data")
_train = partial(key, "training", needs=_TRAINS)
_devices = partial(key, "devices")


@dataclass(frozen=True, kw_only=True)
class Config(PreferenceKeys, DistillKeys, AdapterKeys, QuantizationKeys):
    """All keys of a run, converted and checked; make one with `Config.load`."""

    model: str = _run(REQUIRED, MODEL)
    dataset: str = _run(REQUIRED, "JSONL, JSON, CSV, parquet or text file, or hub data set")
    output: str = _run(REQUIRED, "folder for the result, checkpoints and report")
    method: Method = _run(
        "lora",
        "what is trained (gptq: nothing, the weights are quantized), or what it is trained for: "
        "preference, rm, prm, distill",
    )
    precision: Computed = _run("bf16", "type that the forward and backward pass compute in")
    seed: int = _run(0, "seed of data order, adapter init, dropout and samples", NOT_NEGATIVE)
    resume: bool = _run(False, "go on from the last checkpoint (gptq: layer) in output")
    overwrite: bool = _run(False, "replace what is in output", needs=_NO_RESUME)
    save_steps: int | None = _run(
        500, "steps between checkpoints; null: only at the end", AT_LEAST_1, needs=_TRAINS
    )
    keep_checkpoints: int = _run(
        3, "checkpoints kept, beside the best one", AT_LEAST_1, needs=_TRAINS
    )
    logging_steps: int = _run(1, "steps between lines of metrics", AT_LEAST_1, needs=_TRAINS)
    log_with: Literal["none", "tensorboard", "wandb"] = _run(
        "none", "where metrics go as well", needs=_TRAINS
    )
    sample_prompts: int | tuple[str, ...] = _run(
        3,
        "prompts answered before and after training: this many of the data's, or these",
        _PROMPTS,
        needs=_TEXTS_OUT,
        repeat=True,
    )
    sample_max_new_tokens: int = _run(64, "longest sample in tokens", AT_LEAST_1, needs=_SAMPLES)

    max_seq_length: int = _data(2048, "longest example in tokens", AT_LEAST_2)
    pack_sequences: bool = _data(True, "put several examples into one row (no attention between)")
    chat_template: bool = _data(True, "use the tokenizer's chat template when it has one")
    added_tokens: tuple[str, ...] | None = _data(
        None,
        "tokens that tokenizer and embedding get before the training",
        _TEXTS,
        needs=_NEW_ROWS,
        repeat=True,
    )
    train_on_prompt: bool = _data(
        False, "train on every token, not on the answers only", needs=LEARNS_PROMPTS
    )
    roles_to_train: tuple[str, ...] = _data(
        ("assistant",), "roles whose messages are trained on", needs=_ROLES
    )
    on_long: Literal["truncate", "skip", "stop"] = _data(
        "truncate", "what to do with a longer example"
    )
    on_bad_rows: Literal["stop", "skip"] = _data("stop", "what to do with a row that is not valid")
    eval_dataset: str | None = _data(None, "file or hub data set to evaluate on")
    eval_split: float | None = _data(
        None, "fraction of the dataset held out to evaluate on", INSIDE_1, needs=_NO_EVAL_SET
    )
    num_workers: int = _data(
        0, "threads that make batches ahead of the step", NOT_NEGATIVE, needs=_TRAINS
    )
    preprocess_workers: int = _data(1, "processes that tokenize", AT_LEAST_1)
    trust_remote_code: bool = _data(False, REMOTE_CODE)

    batch_size: int = _train(
        4,
        "rows a step and accumulation, over all devices (gptq: rows observed at a time)",
        AT_LEAST_1,
        needs=_NO_TOKENS,
    )
    tokens_per_batch: int | None = _train(
        None, "tokens a step and accumulation, instead of batch_size", AT_LEAST_1, needs=None
    )
    gradient_accumulation: int = _train(1, "batches added up for one update", AT_LEAST_1)
    learning_rate: float = _train(
        2e-4,
        "highest learning rate (2e-5 where the weights train; preference: 2e-5, 1e-6; rm, prm: "
        "1e-4, 1e-5)",
        POSITIVE,
    )
    epochs: float | None = _train(
        None, "passes over the data (1 unless max_steps is set; the first reached ends)", POSITIVE
    )
    max_steps: int | None = _train(None, "end after this many updates", AT_LEAST_1)
    lr_scheduler: Schedule = _train("linear", "how the learning rate falls after the warmup")
    lr_restarts: int = _train(3, "cycles of cosine_with_restarts", AT_LEAST_1, needs=_RESTARTS)
    lr_power: float = _train(2.0, "power of polynomial", POSITIVE, needs=_POLYNOMIAL)
    warmup_steps: int = _train(0, "updates until the highest learning rate", NOT_NEGATIVE)
    warmup_ratio: float = _train(0.0, "warmup as a fraction of the run", BELOW_1, needs=_NO_WARMUP)
    optimizer: Optimizer = _train("adamw", "optimizer")
    weight_decay: float = _train(0.0, "decoupled weight decay", NOT_NEGATIVE)
    adam_beta1: float = _train(0.9, "decay of the mean gradient", BELOW_1, needs=_ADAMW)
    adam_beta2: float = _train(0.999, "decay of the squared gradient", BELOW_1, needs=_ADAMW)
    adam_epsilon: float = _train(1e-8, "added to the denominator", POSITIVE, needs=_ADAMW)
    max_grad_norm: float | None = _train(1.0, "clip the gradient's norm; null: never", POSITIVE)
    router_aux_loss_coef: float = _train(
        0.0, "models with experts: weight of the load-balancing loss", NOT_NEGATIVE
    )
    router_z_loss_coef: float = _train(
        0.0, "models with experts: weight of the router z-loss", NOT_NEGATIVE
    )
    gradient_checkpointing: Checkpointing = _train(
        "full",
        "what the backward pass computes again: all, all (inputs on the host), ...",
        off="none",
    )
    sequence_tile: int | None = _train(
        None,
        "tokens of a device's rows that projections and MLP take at a time; null: all",
        AT_LEAST_1,
    )
    eval_steps: int | None = _train(
        None, "updates between evaluations; null: at the end of an epoch", AT_LEAST_1, needs=_EVAL
    )
    early_stopping: int | None = _train(
        None, "end after this many evaluations without a better loss", AT_LEAST_1, needs=_EVAL
    )

    mesh: str | None = _devices(None, "axes and sizes (null: fsdp over all local devices)", _MESH)
    target: str | None = _devices(
        None,
        "AMD card that `mud-puppy plan` compiles for (7900xtx, mi300x), or cpu, gpu; null: what is "
        "here. Training takes what is here",
    )
    device_map: Literal["auto"] = _devices("auto", "auto: all local devices", needs=_NO_MESH)

    @property
    def adapts(self) -> bool:
        """Whether adapters are what trains."""
        return self.trains in ("lora", "qlora") or (self.method == "qat" and self.qat_lora)

    @property
    def trains(self) -> str:
        """What becomes of the weights: full, lora, qlora, qat or gptq."""
        return self.tune if self.method in OBJECTIVES else self.method

    @property
    def merged_as(self) -> str:
        """What the merged model is stored as: one of DTYPES, or a format of codes."""
        computed = "bf16" if self.precision.startswith("fp8") else self.precision
        return self.merge_precision or computed

    @staticmethod
    def load(
        source: "Config | Mapping[str, Any] | str | os.PathLike",
        overrides: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> "Config":
        """The config from a YAML file or a mapping, with `overrides` (flags) on top.

        defaults: of keys that have none and that the caller has no use for.

        Raises UserError, in one line that names file or flag, key and value, for an unknown or
        refused key, a bad value, a missing required key, or a key without effect.
        """
        base = source.to_dict() if isinstance(source, Config) else source
        unused = {name: Given(value, name) for name, value in (defaults or {}).items()}
        return _finish(unused | from_source(base) | from_flags(overrides or {}))

    def to_dict(self) -> dict[str, Any]:
        """All keys that have an effect, as plain YAML values; `load` gives an equal Config."""
        used = [spec for spec in KEYS.values() if _has_effect(spec, self)]
        values = {spec.name: self.__dict__[spec.name] for spec in used}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


KEYS = dict(
    sorted(keys_of(Config).items(), key=lambda item: SECTIONS.index(item[1].metadata["section"]))
)


def _finish(given: dict[str, Given]) -> Config:
    """Convert what was given, fill in the rest, check the keys against each other."""
    for name, item in given.items():
        refuse(name, item.value, item.label)
    asked = convert_all(KEYS, given, missing_hint=" or `{name}:` in the config file")
    values = dict(asked)
    method, adapts = values.get("method", "lora"), Config(**values).adapts
    values.setdefault("learning_rate", LEARNING_RATES.get(method, SFT_RATES)[adapts])
    if method in ("gptq", "rm", "prm"):
        values.setdefault("sample_prompts", 0)
    if values.get("max_steps") is None and values.get("epochs") is None:
        values["epochs"] = 1.0
    config = Config(**values)
    _check_effects(config, given, asked)
    _check_together(config, given)
    return config


def _has_effect(spec: dataclasses.Field, config: Config) -> bool:
    need = spec.metadata["needs"]
    return need is None or bool(need.test(config))


def _check_effects(config: Config, given: dict[str, Given], asked: Mapping[str, Any]) -> None:
    """What is given must have an effect; null, false and 0 say "off", and need none, where they are
    the default."""
    for name, item in given.items():
        spec = KEYS[name]
        off = not asked[name] and not spec.default
        if not off and not _has_effect(spec, config):
            words = spec.metadata["needs"].words
            raise UserError(
                f"{item.label}: {shown(item.value)} has no effect: {name} needs {words}."
            )


def _check_together(config: Config, given: dict[str, Given]) -> None:
    if config.precision.startswith("fp8"):
        label = given["precision"].label
        if config.method == "gptq":
            raise UserError(f"{label}: method gptq has no training products; use bf16.")
        if config.method == "qat":
            raise UserError(f"{label}: method qat rounds the weights to integers; use bf16.")
        if config.method in OBJECTIVES:
            raise UserError(f"{label}: method {config.method} has no float8 products; use bf16.")
        if config.method == "qlora" and config.quant_backend != "fp8":
            raise UserError(
                f"{label}: {config.quant_backend} codes have no float8 products; use bf16, or "
                "quant_backend fp8."
            )
        if config.sequence_tile is not None:
            raise UserError(
                f"{given['sequence_tile'].label}: float8 products take one scale for all tokens of "
                "a batch, and a tile would change it; use bf16."
            )
        if config.quant_group is not None:
            raise UserError(
                f"{given['quant_group'].label}: float8 products take one scale a row; leave it out."
            )
    if config.method == "distill" and not (config.teacher or config.teacher_logits):
        raise UserError(
            "method distill needs a teacher: give --teacher, the model to learn from, or "
            "--teacher-logits."
        )
    losses = set(config.losses) if config.method == "preference" else set()
    if "exo_pair" in losses and not config.label_smoothing:
        raise UserError(
            f"{given['preference'].label}: exo_pair needs label_smoothing above 0; its paper takes "
            "1e-3."
        )
    coupled = COUPLED & losses
    if coupled and config.gradient_accumulation > 1:
        raise UserError(
            f"{given['gradient_accumulation'].label}: {min(coupled)} compares the answers of a "
            "batch with each other, so that its loss is not that of the parts added up; use a "
            "larger batch_size."
        )
    if coupled and config.batch_size == 1 and not config.pack_sequences:
        raise UserError(
            f"{given['batch_size'].label}: {min(coupled)} compares the answers of a batch with "
            "each other, and a batch of 1 without packing has one; use a larger batch_size."
        )
    if config.max_steps is not None and config.warmup_steps > config.max_steps:
        raise UserError(
            f"{given['warmup_steps'].label}: {config.warmup_steps} is more than max_steps "
            f"({config.max_steps}); the warmup must fit into the run."
        )
    if config.tokens_per_batch is not None and config.tokens_per_batch < config.max_seq_length:
        raise UserError(
            f"{given['tokens_per_batch'].label}: {config.tokens_per_batch} is less than "
            f"max_seq_length ({config.max_seq_length}); a batch must hold at least one row."
        )
