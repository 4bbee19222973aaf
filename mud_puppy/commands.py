"""The verbs of the command line: preview, merge, eval, quantize, export, generate, chat.

A verb is a dataclass of keys (its flags) and a function that calls the room which does the work.
jax and the rooms are imported inside the functions, so that help and errors come at once.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mud_puppy.config.keys import (
    DTYPES,
    GPTQ_BITS,
    GPTQ_GROUP,
    ROW,
    Backend,
    Config,
    Precision,
)
from mud_puppy.config.output import refuse_filled, writable
from mud_puppy.config.schema import (
    AT_LEAST_1,
    AT_LEAST_2,
    INSIDE_1,
    NOT_NEGATIVE,
    REQUIRED,
    Limit,
    Parser,
    key,
)
from mud_puppy.config.source import flag
from mud_puppy.errors import UserError

_flag = partial(key, "flags")
_gptq = partial(key, "flags of --to gptq")
Format = Literal[Backend, "gptq"]
_TOP_P = Limit("above 0 and at most 1", lambda v: 0 < v <= 1)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Show examples as the model will see them, with what is trained on coloured."""

    dataset: str = _flag(REQUIRED, "file or hub data set")
    model: str = _flag(REQUIRED, "model whose tokenizer and chat template are used")
    n: int = _flag(3, "rows to show", AT_LEAST_1)
    max_seq_length: int = _flag(2048, "longest example in tokens", AT_LEAST_2)
    chat_template: bool = _flag(True, "use the tokenizer's chat template when it has one")
    train_on_prompt: bool = _flag(False, "train on every token, not on the answers only")
    roles_to_train: tuple[str, ...] = _flag(("assistant",), "roles that are trained on")
    on_bad_rows: Literal["stop", "skip"] = _flag("stop", "what to do with a row that is not valid")
    trust_remote_code: bool = _flag(False, "let the tokenizer run code from its own folder")


def run_preview(args: Preview) -> None:
    """Prints the examples, and what was cut or left out."""
    import mud_puppy as mp
    from mud_puppy.data import EncodeOptions, encode, preview_text, read_rows

    found = read_rows(args.dataset, args.on_bad_rows)
    tokenizer = mp.load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    options = EncodeOptions(
        chat_template=args.chat_template,
        roles_to_train=args.roles_to_train,
        train_on_prompt=args.train_on_prompt,
        max_seq_length=args.max_seq_length,
        on_bad_rows=args.on_bad_rows,
    )
    data = encode(found.rows[: args.n], tokenizer, options)
    print(preview_text(data.examples, tokenizer, args.n, color=sys.stdout.isatty()))
    print(f"{len(found)} rows in {args.dataset}", *data.report.lines(), sep="\n")
    if found.bad.count:
        print(f"{found.bad.count} bad rows left out", *found.bad.messages, sep="\n")
    if found.unused_columns:
        print("columns not used:", ", ".join(found.unused_columns))


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Add the adapter to the model's weights and write the merged model."""

    model: str = _flag(REQUIRED, "model folder, hub id or GGUF file")
    adapter: str = _flag(REQUIRED, "PEFT adapter folder")
    output: str = _flag(REQUIRED, "folder for the merged model")
    merge_precision: Precision | None = _flag(
        None, "type of the merged weights; null: as the model's are stored"
    )


def run_merge(args: Merge) -> None:
    """Writes the merged model."""
    refuse_filled(args.output)
    writable(args.output)
    from mud_puppy.export import merge_adapter

    dtype = None if args.merge_precision is None else DTYPES[args.merge_precision]
    merge_adapter(args.model, args.adapter, args.output, dtype)
    print(f"merged model: {args.output}")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write the model with its linear weights in codes, as transformers and vLLM load them."""

    model: str = _flag(REQUIRED, "model folder, hub id or GGUF file")
    to: Format = _flag(REQUIRED, "format of the linear weights of the layers")
    output: str = _flag(REQUIRED, "folder for the quantized model")
    group: int | None = _flag(
        None,
        "weights that share a scale; null: 64 (nf4, int4, gptq), 32 (mxfp4) or a row; -1: a row",
        GPTQ_GROUP,
    )
    double: bool | None = _flag(None, "nf4's scales in 8 bits too; null: yes")
    embeddings: bool = _flag(False, "embedding and head in int8 too (not with nf4)")
    precision: Precision = _flag(
        "bf16", "type of the weights that are not in codes (gptq: and what the model computes in)"
    )
    dataset: str | None = _gptq(None, "text or chat file, or hub data set, to observe; required")
    samples: int | None = _gptq(None, "rows that are observed; null: 128", AT_LEAST_1)
    max_seq_length: int | None = _gptq(None, "tokens of a row; null: 2048", AT_LEAST_2)
    batch_size: int | None = _gptq(None, "rows observed at a time; null: 4", AT_LEAST_1)
    bits: int | None = _gptq(None, "bits of a code; null: 4", GPTQ_BITS)
    actorder: bool | None = _gptq(None, "inputs with a large Hessian diagonal first; null: yes")
    damp_percent: float | None = _gptq(
        None, "share of the Hessian's mean diagonal added to it; null: 0.01", INSIDE_1
    )
    symmetric: bool | None = _gptq(None, "no zero points but the middle; null: yes")
    awq: bool | None = _gptq(None, "enlarge inputs that matter first (AWQ); null: no")
    resume: bool | None = _gptq(None, "go on with the layers in output/unfinished; null: no")


def run_quantize(args: Quantize) -> None:
    """Writes the quantized model, a tensor at a time."""
    if args.to == "gptq":
        _run_gptq(args)
        return
    for name in _GPTQ_ONLY:
        if getattr(args, name) is not None:
            raise UserError(f"{flag(name)}: is of --to gptq; leave it out")
    if args.group == ROW:
        raise UserError(f"--group: -1 is of --to gptq; {args.to} takes a size, or leave it out")
    if args.double is not None and args.to != "nf4":
        raise UserError(f"--double: {args.to} has no scales in 8 bits; leave it out")
    if args.embeddings and args.to == "nf4":
        raise UserError("--embeddings: bitsandbytes' layout holds nf4 alone; leave it out")
    refuse_filled(args.output)
    writable(args.output)
    import mud_puppy as mp
    from mud_puppy.export import save_quantized
    from mud_puppy.weights import Scheme, quantizer

    eight = "int8" if args.embeddings else None
    scheme = Scheme(args.to, args.group, double=args.double, embed=eight, head=eight)
    dtype = DTYPES[args.precision]
    model, params = mp.load(args.model, dtype=dtype, on_leaf=quantizer(scheme))
    save_quantized(model, params, args.output, dtype)
    print(f"quantized model: {args.output}")


# The verb's flags that only gptq has, and the keys of a run that they stand for.
_GPTQ_ONLY = {
    **{name: name for name in ("dataset", "max_seq_length", "batch_size", "resume")},
    **{n: f"gptq_{n}" for n in "samples bits actorder damp_percent symmetric awq".split()},
}


def _run_gptq(args: Quantize) -> None:
    """`method gptq` on one device, with the output folder itself for the model."""
    if args.double is not None or args.embeddings:
        what = "--embeddings" if args.embeddings else "--double"
        raise UserError(f"{what}: gptq has no such option; leave it out")
    if args.dataset is None:
        raise UserError("dataset is missing: --to gptq observes the model on it; give --dataset.")
    keys = {"gptq_group_size": args.group, "mesh": "data=1,fsdp=1"}
    keys |= {key: getattr(args, name) for name, key in _GPTQ_ONLY.items()}
    fixed = {key: getattr(args, key) for key in ("model", "output", "precision")}
    given = {key: value for key, value in keys.items() if value is not None}
    config = Config.load(fixed | given | {"method": "gptq"})
    if not config.resume:
        refuse_filled(args.output, "go on with --resume, or ")
    folder = writable(args.output)
    from mud_puppy.gptq import write_gptq

    write_gptq(config, folder)
    print(f"quantized model: {args.output}")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a model on text: perplexity, and what codes made of it lose (KL)."""

    model: str = _flag(REQUIRED, "model folder, hub id or GGUF file")
    dataset: str = _flag(REQUIRED, "text or chat file, or hub data set")
    against: tuple[str, ...] = _flag(
        (), "formats to try (nf4, int4, int8, mxfp4, fp8) or folders of the model in codes"
    )
    group: int | None = _flag(
        None, "weights that share a scale in the formats that have a choice; null: their own",
        AT_LEAST_2,
    )  # fmt: skip
    precision: Precision = _flag("bf16", "type that the model computes in")
    max_seq_length: int = _flag(1024, "longest example in tokens", AT_LEAST_2)
    batch_size: int = _flag(4, "rows that are read at a time", AT_LEAST_1)
    train_on_prompt: bool = _flag(False, "measure every token, not the answers only")


def run_eval(args: Eval) -> None:
    """Prints a line for the model and for each of `against`."""
    import jax

    import mud_puppy as mp
    from mud_puppy.run.compare import compare
    from mud_puppy.run.datasets import eval_data
    from mud_puppy.weights.quantize import FORMATS, GROUPED

    dtype = DTYPES[args.precision]
    keys = "model dataset precision max_seq_length batch_size train_on_prompt".split()
    config = Config.load({key: getattr(args, key) for key in keys} | {"output": "none"})
    shaped, shapes = mp.abstract(args.model)
    if args.group is not None and not set(args.against) & set(GROUPED):
        raise UserError(f"--group: is of the formats {', '.join(GROUPED)}; --against names none")

    def encoded(format: str, params: Any) -> Any:
        return mp.quantize(params, format, group=args.group if format in GROUPED else None)

    folders = [name for name in args.against if name not in FORMATS]
    for name in args.against:
        if name not in folders:
            jax.eval_shape(partial(encoded, name), shapes)
            continue
        ours, theirs = shaped.arch, mp.abstract(name)[0].arch
        if (ours.sizes, ours.layers) != (theirs.sizes, theirs.layers):
            raise UserError(f"--against: {name} is another model than {args.model}")
    held = eval_data(config, shaped, mp.load_tokenizer(args.model))
    model, params = mp.load(args.model, dtype=dtype)

    def line(name: str, other: Any) -> None:
        found = compare(model, params, other, map(held.batch_at, range(held.steps_per_epoch)))
        print(
            f"{name}: perplexity {found.perplexity:.4f}, loss {found.loss:.4f}, "
            f"KL {found.kl:.5f}, {found.tokens:.0f} tokens",
            flush=True,
        )

    line(args.model, None)
    for name in args.against:
        line(name, mp.load(name, dtype=dtype)[1] if name in folders else encoded(name, params))


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the model or adapter of a run's checkpoint as other programs load it."""

    run: str = _flag(REQUIRED, "a run's output folder, or one checkpoint-N folder in it")
    output: str = _flag(REQUIRED, "folder for the model or adapter")
    step: int | None = _flag(None, "the checkpoint's step; null: the last", AT_LEAST_1)
    merge_lora: bool = _flag(False, "write the merged model instead of the adapter")


def run_export(args: Export) -> None:
    """Writes the checkpoint's model or adapter."""
    run, step = _run_and_step(args)
    refuse_filled(args.output)
    writable(args.output)
    from mud_puppy.export import export_run

    export_run(run, args.output, step=step, merge=args.merge_lora)
    print(f"exported: {args.output}")


def _run_and_step(args: Export) -> tuple[str, int | None]:
    folder = Path(args.run)
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if named is None:
        return args.run, args.step
    if args.step is not None:
        raise UserError(f"--step: {args.run} names the step already; remove one of the two.")
    return str(folder.parent), int(named[1])


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError
    "".join(texts).encode()  # bytes of the terminal that are no UTF-8
    return texts


_PROMPTS = Parser("a non-empty text", _texts)


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What generate and chat share: the model and how it chooses words."""

    model: str = _flag(REQUIRED, "model folder, hub id or GGUF file")
    adapter: str | None = _flag(None, "PEFT adapter folder to add")
    precision: Precision = _flag("bf16", "type that the model computes in")
    max_new_tokens: int = _flag(256, "longest answer in tokens", AT_LEAST_1)
    temperature: float = _flag(0.0, "0 takes the likeliest token; higher is freer", NOT_NEGATIVE)
    top_k: int = _flag(0, "sample from this many likeliest tokens; 0: from all", NOT_NEGATIVE)
    top_p: float = _flag(1.0, "sample from the likeliest tokens of this total probability", _TOP_P)
    seed: int = _flag(0, "seed of the sampling", NOT_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class Generate(Talk):
    """Answer each prompt, one after the other."""

    prompt: tuple[str, ...] = _flag(REQUIRED, "what to answer", _PROMPTS, repeat=True)
    chat_template: bool = _flag(True, "put each prompt into the model's chat template, if any")


def run_generate(args: Generate) -> None:
    """Prints the answers."""
    import mud_puppy as mp

    model, params, tokenizer = _open(args)
    answers = mp.generate(
        model,
        params,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        chat=None if args.chat_template else False,
    )
    print(*answers, sep="\n")


@dataclass(frozen=True, kw_only=True)
class Chat(Talk):
    """Talk to the model, a line at a time; /reset starts over, /exit ends."""

    system: str | None = _flag(None, "what the model is told first")
    max_new_tokens: int = _flag(512, "longest answer in tokens", AT_LEAST_1)
    temperature: float = _flag(0.7, "0 takes the likeliest token; higher is freer", NOT_NEGATIVE)


def run_chat(args: Chat) -> None:
    """Reads lines from the terminal and shows replies while they are generated."""
    from mud_puppy.sampling.chat import chat
    from mud_puppy.sampling.choose import Options

    options = Options(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    chat(*_open(args), options, system=args.system)


def _open(args: Talk) -> tuple[Any, Any, Any]:
    """(model, params, tokenizer), with the adapter if one is named."""
    import mud_puppy as mp

    model, params = mp.load(args.model, dtype=DTYPES[args.precision])
    if args.adapter is not None:
        params = mp.load_adapter(params, args.adapter)
    return model, params, mp.load_tokenizer(args.model)


@dataclass(frozen=True)
class Command:
    """A verb: its keys, which of them may stand without a flag, and what it does."""

    keys: type
    positional: tuple[str, ...]
    run: Callable[[Any], None]

    @property
    def help(self) -> str:
        """Its one line in `mud-puppy --help`."""
        return (self.keys.__doc__ or "").splitlines()[0]


COMMANDS = {
    "preview": Command(Preview, ("dataset",), run_preview),
    "merge": Command(Merge, ("model", "adapter"), run_merge),
    "eval": Command(Eval, ("model",), run_eval),
    "quantize": Command(Quantize, ("model",), run_quantize),
    "export": Command(Export, ("run",), run_export),
    "generate": Command(Generate, ("model",), run_generate),
    "chat": Command(Chat, ("model",), run_chat),
}
