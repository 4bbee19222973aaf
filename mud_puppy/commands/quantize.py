"""quantize: write a model in codes."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from mud_puppy.config.keys import DTYPES, MODEL, REMOTE_CODE, Config, Precision
from mud_puppy.config.output import empty, writable
from mud_puppy.config.quantization import GPTQ_BITS, GPTQ_GROUP, ROW, Backend
from mud_puppy.config.schema import AT_LEAST_1, AT_LEAST_2, INSIDE_1, REQUIRED, key
from mud_puppy.config.source import flag
from mud_puppy.errors import UserError

_flag = partial(key, "flags")
_gptq = partial(key, "flags of --to gptq")
Format = Literal[Backend, "gptq"]
_RESUME = "go on with --resume, or "


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write the model with its linear weights in codes, as transformers and vLLM load them."""

    model: str = _flag(REQUIRED, MODEL)
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
    trust_remote_code: bool = _flag(False, REMOTE_CODE)
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
    folder = empty(args.output)
    from mud_puppy.results import quantize_model
    from mud_puppy.weights import Scheme

    eight = "int8" if args.embeddings else None
    scheme = Scheme(args.to, args.group, double=args.double, embed=eight, head=eight)
    dtype, trusted = DTYPES[args.precision], args.trust_remote_code
    quantize_model(args.model, folder, scheme, dtype, trusted)
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
    fixed = {
        key: getattr(args, key) for key in ("model", "output", "precision", "trust_remote_code")
    }
    given = {key: value for key, value in keys.items() if value is not None}
    config = Config.load(fixed | given | {"method": "gptq"})
    folder = writable(args.output) if config.resume else empty(args.output, _RESUME)
    from mud_puppy.gptq import write_gptq

    write_gptq(config, folder)
    print(f"quantized model: {args.output}")
