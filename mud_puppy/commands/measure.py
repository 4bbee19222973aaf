"""eval: measure a model on text."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from mud_puppy.commands.words import check_words
from mud_puppy.config.keys import DTYPES, MODEL, REMOTE_CODE, Config, Precision
from mud_puppy.config.schema import AT_LEAST_1, AT_LEAST_2, REQUIRED, key
from mud_puppy.errors import UserError

_flag = partial(key, "flags")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a model on text: perplexity, and what codes made of it lose (KL)."""

    model: str = _flag(REQUIRED, MODEL)
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
    trust_remote_code: bool = _flag(False, REMOTE_CODE)


def run_eval(args: Eval) -> None:
    """Prints a line for the model and for each of `against`."""
    import jax
    from tqdm import tqdm

    import mud_puppy as mp
    from mud_puppy.model.load import stored_codes
    from mud_puppy.run.compare import compare
    from mud_puppy.run.datasets import eval_data
    from mud_puppy.weights.quantize import FORMATS, GROUPED

    dtype, trusted = DTYPES[args.precision], args.trust_remote_code
    keys = "model dataset precision max_seq_length batch_size train_on_prompt".split()
    config = Config.load({key: getattr(args, key) for key in keys} | {"output": "none"})
    check_words(args.model, trust_remote_code=trusted)
    shaped, shapes = mp.abstract(args.model, trust_remote_code=trusted)
    if args.group is not None and not set(args.against) & set(GROUPED):
        raise UserError(f"--group: is of the formats {', '.join(GROUPED)}; --against names none")

    def encoded(format: str, params: Any) -> Any:
        return mp.quantize(params, format, group=args.group if format in GROUPED else None)

    stored = stored_codes(args.model, trusted)
    folders = [name for name in args.against if name not in FORMATS]
    for name in args.against:
        if name not in folders and stored is not None:
            raise UserError(
                f"--against: {name} is made of a model in floats, and {args.model} is in codes "
                f"({stored}); name the model that it was made from"
            )
        if name not in folders:
            jax.eval_shape(partial(encoded, name), shapes)
            continue
        ours, theirs = shaped.arch, mp.abstract(name)[0].arch
        if (ours.sizes, ours.layers) != (theirs.sizes, theirs.layers):
            raise UserError(f"--against: {name} is another model than {args.model}")
    held = eval_data(config, shaped, mp.load_tokenizer(args.model, trusted))
    model, params = mp.load(args.model, dtype=dtype, trust_remote_code=trusted)

    def line(name: str, other: Any) -> None:
        steps = tqdm(range(held.steps_per_epoch), name, leave=False, disable=None)
        found = compare(model, params, other, map(held.batch_at, steps))
        print(
            f"{name}: perplexity {found.perplexity:.4f}, loss {found.loss:.4f}, "
            f"KL {found.kl:.5f}, {found.tokens:.0f} tokens",
            flush=True,
        )

    line(args.model, None)
    for name in args.against:
        line(name, mp.load(name, dtype=dtype)[1] if name in folders else encoded(name, params))
