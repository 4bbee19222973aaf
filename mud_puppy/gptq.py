"""Method gptq: from a config to a model folder in GPTQ's layout, which transformers and vLLM load.

    folder/              the model in codes, its tokenizer, quantize_config.json as AutoGPTQ's
    folder/unfinished/   layers that are done, which `resume` goes on from; gone at the end

What can be known without the weights is checked before they are read.
"""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from tqdm.contrib.logging import logging_redirect_tqdm

from mud_puppy.config import DTYPES, Config, clear_output
from mud_puppy.data import Batch, Loader
from mud_puppy.errors import UserError
from mud_puppy.export import save_quantized
from mud_puppy.model import Model, abstract, load, load_tokenizer
from mud_puppy.model.gptq_format import check_shape, quantization_config
from mud_puppy.model.load import stored_codes
from mud_puppy.model.quantized_files import gptq_writer
from mud_puppy.parallel import make_mesh
from mud_puppy.run.calibrate import GptqOptions, check_fit, linears, quantize_gptq
from mud_puppy.run.compare import compare
from mud_puppy.run.datasets import load_data
from mud_puppy.run.memory import memory_errors
from mud_puppy.run.progress import Progress
from mud_puppy.run.record import changed_keys, run_record

Tree = Any
log = logging.getLogger("mud_puppy")

_UNFINISHED = "unfinished"


def run_gptq(config: Config, output: Path) -> tuple[Model, Tree, dict[str, float]]:
    """A run of method gptq: `write_gptq` into `output`/gptq, and what the run was into `output`."""
    if config.resume and (changes := changed_keys(output, config.to_dict())):
        raise UserError(
            f"{output}: the run began with other settings, --resume cannot change them: "
            f"{'; '.join(changes)}"
        )

    def begin() -> None:
        if config.overwrite:
            clear_output(output)
        if not (output / "config.yaml").exists():
            run_record(output, config.to_dict())

    return write_gptq(config, output / "gptq", begin)


def write_gptq(
    config: Config, folder: Path, begin: Callable[[], None] = lambda: None
) -> tuple[Model, Tree, dict[str, float]]:
    """(model, params in codes, metrics) of the config's model, which is written into `folder`.

    metrics: loss, perplexity and KL on the evaluation set, if there is one. begin() is called when
    all inputs have been read and found sound. UserError for what is not, and where `config.resume`
    finds something else in the folder than layers to go on from.
    """
    if config.resume:
        _check_unfinished(folder)
    options, dtype = gptq_options(config), DTYPES[config.precision]
    shaped, shapes = abstract(config.model, trust_remote_code=config.trust_remote_code)
    _check_model(config, shapes, options)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    data = load_data(config, shaped, tokenizer, batch_devices=1)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), memory_errors():
        model, params = load(config.model, dtype, mesh, trust_remote_code=config.trust_remote_code)
        model = replace(model, dtype=dtype)
        begin()
        batches = observed(data.train, config.gptq_samples)
        codes = _quantized(model, params, batches, options, folder / _UNFINISHED)
        _write(model, codes, folder, dtype, tokenizer, options)
        log.info("GPTQ: %s", folder)
        return model, codes, _measured(model, params, codes, data.evaluation)


def gptq_options(config: Config) -> GptqOptions:
    """What the config's keys ask of GPTQ."""
    size = config.gptq_group_size
    return GptqOptions(
        bits=config.gptq_bits,
        group=size if size > 0 else "row",
        symmetric=config.gptq_symmetric,
        act_order=config.gptq_actorder,
        damp=config.gptq_damp_percent,
        awq=config.gptq_awq,
    )


def observed(loader: Loader, samples: int) -> list[Batch]:
    """Batches of the first `samples` rows in the loader's order, which its seed shuffles.

    Rows beyond them in the last batch are padding, so that all batches have one shape.
    """
    rows = min(samples, len(loader.rows))
    log.info("GPTQ: observes %d of %d rows of %d tokens", rows, len(loader.rows), loader.length)
    full, rest = divmod(rows, loader.batch_size)
    batches = [loader.batch_at(step) for step in range(full + (rest > 0))]
    if rest:
        for array in batches[-1].values():
            array[:, rest:] = 0
    return batches


def _check_unfinished(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _UNFINISHED).is_dir():
        raise UserError(
            f"{folder}: holds no unfinished layers to resume from (the model is finished, or it is "
            "another folder); name another one"
        )


def _check_model(config: Config, shapes: Tree, options: GptqOptions) -> None:
    if stored_codes(config.model, config.trust_remote_code) is not None:
        raise UserError(
            f"{config.model}: its weights are in codes already (config.json has a "
            "quantization_config); name the model that they were made from"
        )
    check_fit(shapes, options)
    for name, w in linears(shapes):
        try:
            check_shape(w.shape[-2:], options.bits)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def _quantized(
    model: Model, params: Tree, batches: list[Batch], options: GptqOptions, unfinished: Path
) -> Tree:
    shown = Progress(model.arch.layers, unit="layer")

    def tell(done: int, _: int) -> None:
        shown.update(done, {})

    # What a layer lost is logged, and must stand above the bar.
    loggers = [log] if log.handlers else []
    with closing(shown), logging_redirect_tqdm(loggers):
        return quantize_gptq(model, params, batches, options, folder=unfinished, progress=tell)


def _write(
    model: Model, codes: Tree, folder: Path, dtype: str, tokenizer: Any, options: GptqOptions
) -> None:
    config = quantization_config(
        options.bits,
        options.group,
        options.symmetric,
        options.act_order,
        options.damp,
        options.awq,
        options.clip,
    )
    text = json.dumps(config, indent=2) + "\n"
    try:
        (folder / "quantize_config.json").write_text(text)
    except OSError as error:
        raise UserError(f"{folder}: the model cannot be written: {error}") from None
    layout = gptq_writer(config)
    save_quantized(model, codes, folder, dtype, tokenizer, layout=layout)
    shutil.rmtree(folder / _UNFINISHED)


def _measured(model: Model, params: Tree, codes: Tree, held: Loader | None) -> dict[str, float]:
    if held is None:
        return {}
    metrics = {}
    for name, other in {"_original": None, "": codes}.items():
        found = compare(model, params, other, map(held.batch_at, range(held.steps_per_epoch)))
        metrics[f"eval_loss{name}"] = found.loss
        metrics[f"eval_perplexity{name}"] = found.perplexity
        metrics["eval_kl"] = found.kl
    log.info(
        "eval: perplexity %.4f, was %.4f; KL %.5f to the original",
        metrics["eval_perplexity"],
        metrics["eval_perplexity_original"],
        metrics["eval_kl"],
    )
    return metrics
