"""What a run leaves, and what the verbs make of it: the model or adapter, merged, in codes.

`check_result` and the verbs find out before the work what could not be written after it.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mud_puppy.config import DTYPES, Config
from mud_puppy.errors import UserError
from mud_puppy.export import check_codes, save_hf, save_merged, save_quantized
from mud_puppy.model import Model, abstract, load, load_tokenizer
from mud_puppy.model.load import check_dtype
from mud_puppy.model.names import hf_names
from mud_puppy.model.save import write_tokenizer
from mud_puppy.parallel import make_mesh
from mud_puppy.run.adapted import tokenizer_of, with_head_of
from mud_puppy.run.checkpoint import Checkpoints
from mud_puppy.run.prepare import load_params, merge_scheme, on_grid, prepare
from mud_puppy.run.vocabulary import run_tokenizer
from mud_puppy.weights import (
    Scheme,
    adapter_head,
    finish_fake_quant,
    load_adapter,
    merge_lora,
    merge_quantized,
    merged_view,
    quantize,
    quantizer,
    save_adapter,
    strip_fake_quant,
)

Tree = Any


def check_result(config: Config, model: Model, shapes: Tree) -> None:
    """UserError, before the run, for codes that it would make at its end but cannot: rows that no
    group divides, formats and groups that no layout holds. model, shapes: as of `abstract`."""

    def prepared(params: Tree) -> Tree:
        return on_grid(config, params) if config.method == "qat" else params

    if config.method == "qat":
        check_codes(model, shapes, lambda p: finish_fake_quant(prepared(p)))
    if config.merge_lora and config.merged_as not in DTYPES:
        check_codes(model, shapes, lambda p: merged_params(config, prepared(p), config.merged_as))


def merge_adapter(
    model_source: str | Path,
    adapter_dir: str | Path,
    output: str | Path,
    dtype: str | None = "bfloat16",
    scheme: Scheme | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Base model + PEFT adapter -> one HF folder. The base is read in the dtype it is stored in.

    scheme: codes that the merged model is stored in, from sums in bfloat16, instead of `dtype`. The
    adapter of a reward model, whose base is a language model, makes a reward model of it, with the
    tokenizer of the adapter.
    """
    check_dtype(dtype)
    shaped = abstract(model_source, trust_remote_code=trust_remote_code)
    scores = adapter_head(adapter_dir) is not None
    if scores:
        tokenizer = tokenizer_of(model_source, adapter_dir, trust_remote_code)
    else:
        tokenizer = _own_tokenizer(model_source, trust_remote_code)
    pad = tokenizer.pad_token_id if scores else None
    shaped = with_head_of(*shaped, adapter_dir, pad)
    if scheme is not None:
        merged = partial(merge_quantized, scheme=scheme, dtype="bfloat16")
        check_codes(*shaped, merged)
    model, params = load(model_source, dtype=None, trust_remote_code=trust_remote_code)
    model, params = with_head_of(model, params, adapter_dir, pad)
    params = load_adapter(params, adapter_dir)
    if scheme is None:
        save_merged(model, params, output, dtype, tokenizer)
    else:
        codes = merge_quantized(params, scheme, "bfloat16")
        save_quantized(model, codes, output, tokenizer=tokenizer)


def quantize_model(
    source: str | Path,
    output: str | Path,
    scheme: Scheme,
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
) -> None:
    """A model -> a folder of it in codes. Each tensor is encoded as it is read; dtype: of what
    stays in floats. What cannot be encoded or written is a UserError before weights are read."""
    shaped, shapes = abstract(source, trust_remote_code=trust_remote_code)
    tokenizer = _own_tokenizer(source, trust_remote_code)
    check_codes(shaped, shapes, lambda p: quantize(p, **asdict(scheme)))
    encode, names = quantizer(scheme), hf_names(shaped.arch, shapes)
    with tqdm(total=sum(map(len, names.values())), unit="tensor", disable=None) as bar:

        def on_leaf(path: str, array: Any) -> Any:
            bar.update()
            return encode(path, array)

        model, params = load(
            source, dtype=dtype, on_leaf=on_leaf, trust_remote_code=trust_remote_code
        )
    save_quantized(model, params, output, dtype, tokenizer)


def _own_tokenizer(source: str | Path, trust_remote_code: bool) -> Any:
    """The tokenizer that is Python of the model's own; None: the tokenizer's files are copied."""
    return load_tokenizer(source, trust_remote_code=True) if trust_remote_code else None


def export_run(
    run: str | Path, output: str | Path, step: int | None = None, merge: bool = False
) -> None:
    """A run's checkpoint as other programs load it: model, adapter, or (merge) the merged model.

    run: the run's output folder; step: of which checkpoint, None for the newest. The base model is
    read again from where the run had it.
    """
    folder = Path(run).expanduser()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no run is here (there is no config.yaml)")
    config = Config.load(folder / "config.yaml")
    if config.method == "gptq":
        raise UserError(f"{folder}: a run of method gptq has no checkpoints; its model is in gptq/")
    if merge and not config.adapts:
        raise UserError(f"{folder}: a run of method {config.method} has no adapter to merge")
    mesh = make_mesh()  # the devices of here, which may not be those of the run
    with jax.set_mesh(mesh):
        model, params = load_params(config, mesh)
        # The length of the run decides the learning rate alone, which nothing here asks for.
        prepared = prepare(config, model, params, mesh, total_steps=1)
        state = Checkpoints(folder).replace(prepared.state, step).state
        tokenizer = run_tokenizer(config)
        if merge:
            write_merged(config, output, model, prepared.params(state), tokenizer)
        else:
            write_result(config, Path(output), model, prepared.params(state), tokenizer)


def write_result(config: Config, out: Path, model: Model, params: Tree, tokenizer: Any) -> None:
    """What a run leaves in `out`: a model or an adapter, with the tokenizer; of method qat the
    codes that were trained too."""
    dtype = DTYPES[config.precision]
    if config.method == "qat":
        codes = merge_lora(finish_fake_quant(params))
        save_quantized(model, codes, out / f"qat_{config.qat_format}", dtype, tokenizer)
        params = strip_fake_quant(params)
    if not config.adapts:
        save_hf(model, params, out, dtype, tokenizer)
        return
    save_adapter(model, params, out)
    write_tokenizer(out, None, tokenizer)


def write_merged(
    config: Config, out: str | Path, model: Model, params: Tree, tokenizer: Any
) -> None:
    """The merged model, stored as the config says: in a precision, or in codes."""
    how = config.merged_as
    if how in DTYPES:
        save_merged(model, strip_fake_quant(params), out, DTYPES[how], tokenizer)
    else:
        codes = merged_params(config, params, how)
        save_quantized(model, codes, out, DTYPES[config.precision], tokenizer)


def merged_params(config: Config, params: Tree, how: str) -> Tree:
    """Params of which a forward pass is that of the merged model; how: a precision, or the config's
    `merged_as`."""
    if config.method == "qat" and how == config.qat_format:
        return merge_lora(finish_fake_quant(params))  # the codes that were trained
    params = strip_fake_quant(params)
    if how in DTYPES:
        return merged_view(params, DTYPES[how])
    return merge_quantized(params, merge_scheme(config), "bfloat16")
