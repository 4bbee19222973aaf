"""One run from config to exported model: the rooms in order.

    python -m mud_puppy.train --config C

is `mud-puppy --config C`, and `mud_puppy.train(config)` the same from Python.
"""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from mud_puppy.config import Config, check_output, clear_output
from mud_puppy.data import batches_apart, prefetch
from mud_puppy.gptq import run_gptq
from mud_puppy.model import Model, abstract
from mud_puppy.parallel import batch_devices, make_mesh
from mud_puppy.results import check_result, merged_params, write_merged, write_result
from mud_puppy.run.cached import with_reference
from mud_puppy.run.checkpoint import Checkpoints
from mud_puppy.run.datasets import RunData, load_data
from mud_puppy.run.loop import Course, Plan, fit
from mud_puppy.run.memory import memory_errors
from mud_puppy.run.prepare import Prepared, check_asked, load_params, prepare
from mud_puppy.run.prompts import uses_chat
from mud_puppy.run.record import changed_keys
from mud_puppy.run.recorder import Recorder
from mud_puppy.run.rollout import check_rollouts, rollouts
from mud_puppy.run.taught import with_teacher
from mud_puppy.run.vocabulary import run_tokenizer, with_room, with_scores
from mud_puppy.sampling import generate

Tree = Any
log = logging.getLogger("mud_puppy")


@dataclass(frozen=True)
class Result:
    """What a run leaves: the folder, the trained model, the last logged numbers.

    reason: "done", "early stopping" or "signal". metrics: the last values by name, such as loss
    and eval_loss. Method gptq trains nothing: 0 steps, metrics of an evaluation set alone.
    """

    output: Path
    model: Model
    params: Tree
    steps: int
    reason: str
    metrics: dict[str, float]


def train(source: Config | Mapping[str, Any] | str | os.PathLike) -> Result:
    """Runs a config (a Config, a dict, or a YAML path); everything is written to its `output`."""
    config = Config.load(source)
    output = check_output(config)
    _keep_compilations()
    if config.method == "gptq":
        model, params, metrics = run_gptq(config, output)
        return Result(output, model, params, 0, "done", metrics)
    mesh = make_mesh(config.mesh)
    shaped, shapes = abstract(config.model, trust_remote_code=config.trust_remote_code)
    check_asked(config, shapes)
    tokenizer = run_tokenizer(config)
    shaped, shapes = with_room(config, shaped, shapes, tokenizer)
    shaped, shapes = with_scores(config, shaped, shapes, tokenizer.pad_token_id)
    check_result(config, shaped, shapes)
    data = load_data(config, shaped, tokenizer, batch_devices(mesh))
    check_rollouts(config, shaped, data.train)
    with jax.set_mesh(mesh), memory_errors():
        data = with_teacher(config, data, shaped.arch.vocab_size, tokenizer, mesh)
        model, params = load_params(config, mesh)
        run = prepare(config, model, params, mesh, _total_steps(config, data))
        del params  # the optimizer's step gives its buffers away
        return _run(config, output, run, data, tokenizer)


def _run(config: Config, output: Path, run: Prepared, data: RunData, tokenizer: Any) -> Result:
    if config.overwrite:  # only now: whatever is wrong with the inputs has been said
        clear_output(output)
    data = with_reference(config, output, run, data)
    checkpoints = Checkpoints(output, config.keep_checkpoints)
    state, course = run.state, Course()
    if config.resume and checkpoints.latest() is not None:
        if changes := changed_keys(output, config.to_dict()):
            log.warning("not the settings that the run began with: %s", "; ".join(changes))
        _, state, meta = checkpoints.replace(state)
        course = Course(**meta)
    elif config.resume:
        log.warning("%s has no checkpoint yet: the run starts at step 0", output)
    first, plan = int(state.step), _plan(config, data)
    evaluate = _evaluation(run, data)
    with Recorder(config, output, first, plan.total_steps) as record:
        if first == 0:
            record.samples("before", _answers(config, run, state, tokenizer, data))
            if evaluate is not None:
                record(0, evaluate(state))
        steps = range(first, plan.total_steps)
        batches = zip(
            steps, prefetch(data.train, first, plan.total_steps, config.num_workers), strict=True
        )
        sample = rollouts(config, run, data.train, tokenizer)
        ended = fit(run.step, state, batches, evaluate, plan, checkpoints, record, course, sample)
        state, best = ended.state, ended.course.best_step
        if ended.reason == "signal":
            log.warning("stopped at step %d; go on with --resume", int(state.step))
            return _result(output, run, state, ended.reason, record)
        if plan.patience is not None and best not in (None, int(state.step)):
            # Early stopping keeps the best weights, not the last ones.
            _, state, _ = checkpoints.replace(state, best)
        record.samples("after", _answers(config, run, state, tokenizer, data))
        params = run.params(state)
        write_result(config, output, run.model, params, tokenizer)
        if config.merge_lora:
            write_merged(config, output / "merged", run.model, params, tokenizer)
            trained = {} if evaluate is None else evaluate(state)
            _measure_merged(config, run, trained, params, data, record, int(state.step))
        log.info("%s at step %d: %s", ended.reason, int(state.step), output)
        return _result(output, run, state, ended.reason, record)


def _result(output: Path, run: Prepared, state: Any, reason: str, record: Recorder) -> Result:
    return Result(output, run.model, run.params(state), int(state.step), reason, record.latest)


def _total_steps(config: Config, data: RunData) -> int:
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.epochs is not None:
        limits.append(max(1, round(config.epochs * data.train.steps_per_epoch)))
    return min(limits)


def _plan(config: Config, data: RunData) -> Plan:
    return Plan(
        total_steps=_total_steps(config, data),
        logging_steps=config.logging_steps,
        eval_steps=config.eval_steps or data.train.steps_per_epoch,
        save_steps=config.save_steps,
        patience=config.early_stopping,
    )


def _evaluation(run: Prepared, data: RunData) -> Any:
    held = data.evaluation
    if held is None:
        return None
    apart = batches_apart(held)
    sources = [source for source, _ in apart]
    return lambda state: run.evaluate(state, (held.batch_of(rows) for _, rows in apart), sources)


def _measure_merged(
    config: Config,
    run: Prepared,
    trained: dict[str, float],
    params: Tree,
    data: RunData,
    record: Recorder,
    step: int,
) -> None:
    """The evaluation loss of the model as it trained (`trained`) and as it was merged."""
    held = data.evaluation
    if held is None:
        log.info("merged: its loss is not measured; eval_split or eval_dataset would give data")
        return

    def loss(params: Tree) -> float:
        batches = (held.batch_of(rows) for _, rows in batches_apart(held))
        return run.measure(params, batches)["eval_loss"]

    found = {"with its adapter": trained["eval_loss"]}
    for how in dict.fromkeys(("bf16", config.merged_as)):
        found[f"merged {how}"] = loss(merged_params(config, params, how))
    record(step, {f"eval_loss {name}".replace(" ", "_"): value for name, value in found.items()})
    log.info("eval loss: %s", "; ".join(f"{name} {value:.4f}" for name, value in found.items()))


def _answers(
    config: Config, run: Prepared, state: Any, tokenizer: Any, data: RunData
) -> list[tuple[Any, str]]:
    if not data.prompts:
        return []
    texts = generate(
        run.model,
        run.params(state),
        tokenizer,
        data.prompts,
        config.sample_max_new_tokens,
        chat=uses_chat(config),
    )
    return list(zip(data.prompts, texts, strict=True))


def _keep_compilations() -> None:
    """The next run of the same shapes starts without compiling; JAX_COMPILATION_CACHE_DIR wins."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "mud_puppy" / "xla"))


class _Callable(ModuleType):
    """`mud_puppy.train(config)` is the function also where this module was imported first."""

    def __call__(self, source: Config | Mapping[str, Any] | str | os.PathLike) -> Result:
        return train(source)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from mud_puppy.cli import train_main

    sys.exit(train_main())
