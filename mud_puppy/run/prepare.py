"""From a config to the pieces that the loop runs: params, optimizer, jitted step and evaluation.

Everything is placed on the mesh here: weights, moments and batches get their shardings from one
table (`parallel.rules`), and the step's outputs are pinned to them, so that the second step neither
traces nor moves anything.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mud_puppy.config import DTYPES, Config
from mud_puppy.errors import UserError
from mud_puppy.kernels.formats import GROUPS
from mud_puppy.model import Model, axes, load, scan_layers
from mud_puppy.model.load import stored_codes
from mud_puppy.parallel import batch_sharding, like, replicated, shardings
from mud_puppy.parallel.host import check_offload
from mud_puppy.run.loop import by_source, means
from mud_puppy.run.methods import Method, method_of
from mud_puppy.run.optimizer import make_optimizer
from mud_puppy.run.reference import kept_of, reference
from mud_puppy.run.schedule import schedule
from mud_puppy.run.step import State, init_state, make_eval, make_loss, make_step
from mud_puppy.run.teacher import load_teacher
from mud_puppy.run.vocabulary import SCORES, run_tokenizer, with_room, with_scores
from mud_puppy.weights import (
    Lora,
    Scheme,
    add_lora,
    check_savable,
    combine,
    fake_quant,
    fp8,
    fp8_types,
    freeze_lora,
    is_weight,
    load_adapter,
    match_targets,
    module_names,
    partition,
    quantize,
    quantizer,
    strip_fp8,
    with_dropout,
)
from mud_puppy.weights.tree import is_expert

Tree = Any


@dataclass(frozen=True)
class Prepared:
    """A run ready to go: `step(state, batch)` and `evaluate(state, batches)` are compiled at their
    first call; `frozen` holds what does not train. `evaluate` takes the batches' sources too, and
    gives the figures of each (`loop.by_source`). `measure(params, batches)` is `evaluate` of any
    params of this model. `lower(batch)` lowers the step ahead of time.
    """

    model: Model
    state: State
    frozen: Tree
    step: Callable[[State, dict[str, np.ndarray]], tuple[State, Tree]]
    evaluate: Callable[..., dict[str, float]]
    measure: Callable[[Tree, Any], dict[str, float]]
    lower: Callable[[dict[str, np.ndarray]], jax.stages.Lowered]

    def params(self, state: State) -> Tree:
        """The whole params tree at `state`, dropout and float8 products off."""
        return strip_fp8(with_dropout(combine(state.train, self.frozen), None))


def load_params(config: Config, mesh: Mesh) -> tuple[Model, Tree]:
    """The model in the run's precision, with the adapters that the config asks for.

    Weights that train are float32 (masters); what does not is stored as it is computed with, or
    (qlora) in codes, made as each tensor is read or kept from the file.
    """
    dtype = DTYPES[config.precision]
    stored = dtype if config.adapts else "float32"
    model, params = load(
        config.model,
        dtype=stored,
        mesh=mesh,
        on_leaf=quantizer(scheme(config)) if _encodes(config) else None,
        trust_remote_code=config.trust_remote_code,
        keep_codes=config.quant_backend == "stored",
    )
    model, params = with_room(config, model, params)
    if config.method in SCORES:
        pad = run_tokenizer(config).pad_token_id
        model, params = with_scores(config, model, params, pad)
    params = transformed(config, params)
    params = jax.device_put(params, shardings(mesh, axes(model.arch), params))
    return computed(config, model), params


def computed(config: Config, model: Model) -> Model:
    """The model as the run computes it."""
    return replace(model, dtype=DTYPES[config.precision], tile=config.sequence_tile)


def transformed(config: Config, params: Tree) -> Tree:
    """What the method trains, from a model's params: with adapters, on a grid, in float8."""
    if config.adapts:
        params = _with_adapters(config, params)
    if config.method == "qat":
        params = on_grid(config, params)
    if config.precision.startswith("fp8"):
        params = fp8(params, emulated=config.precision == "fp8-emulated")
    return params


def on_grid(config: Config, params: Tree) -> Tree:
    """Method qat's rounding of the linears, adapters included."""
    group = config.qat_group or (GROUPS["int4"] if config.qat_format == "int4" else None)
    options = {"activations": config.qat_activations, "ranges": config.qat_ranges}
    return fake_quant(params, config.qat_format, group=group, **options)


def _with_adapters(config: Config, params: Tree) -> Tree:
    if config.adapter is not None:
        params = load_adapter(params, config.adapter)
        stack = config.adapter_mode == "stack"
        params = freeze_lora(params) if stack else _set_dropout(params, config.lora_dropout)
    if config.adapter is None or config.adapter_mode == "stack":
        params = add_lora(
            params,
            config.lora_r,
            config.lora_alpha,
            config.lora_targets,
            key=jax.random.key(config.seed % 2**32),
            dropout=config.lora_dropout,
            rslora=config.lora_rslora,
            dora=config.lora_dora,
        )
    check_savable(params)  # not after hours of training
    return params


def _encodes(config: Config) -> bool:
    """Whether the run makes codes of what it reads."""
    return config.trains == "qlora" and config.quant_backend != "stored"


def scheme(config: Config) -> Scheme:
    """What method qlora makes of the weights."""
    eight = "int8" if config.quant_embeddings else None
    double = config.quant_backend == "nf4" and config.quant_double
    return Scheme(config.quant_backend, config.quant_group, double=double, embed=eight, head=eight)


def merge_scheme(config: Config) -> Scheme:
    """What becomes of a merged model's weights, where it is stored in codes."""
    how = config.merged_as
    base = scheme(config) if _encodes(config) else Scheme()
    if how != base.format:
        base = Scheme(how, embed=base.embed, head=base.head)
    # bitsandbytes' layout holds nf4 alone.
    return replace(base, embed=None, head=None) if how == "nf4" else base


def check_asked(config: Config, shapes: Tree) -> None:
    """UserError for what the config asks of a model or device that does not have it: LoRA targets,
    groups that divide no row (shapes as of `abstract`), float8 products, pinned host memory."""
    if config.precision == "fp8":
        fp8_types()
    if config.gradient_checkpointing == "offload":
        check_offload()
    if config.adapts and (config.adapter is None or config.adapter_mode == "stack"):
        match_targets(module_names(shapes), config.lora_targets)
    if router_penalties(config) and not any(map(is_expert, module_names(shapes))):
        raise UserError(
            f"{config.model}: this model has no experts, and so no router losses: leave out "
            "router_aux_loss_coef and router_z_loss_coef"
        )
    if layout := stored_codes(config.model, config.trust_remote_code):
        _check_stored(config, layout)
    if _encodes(config):
        jax.eval_shape(lambda p: quantize(p, **asdict(scheme(config))), shapes)


def router_penalties(config: Config) -> dict[str, float]:
    """The auxiliary losses of routers that the config asks for (`balance.router_losses`)."""
    asked = {
        "load_balance": config.router_aux_loss_coef,
        "router_z": config.router_z_loss_coef,
    }
    return {name: factor for name, factor in asked.items() if factor}


def _check_stored(config: Config, layout: str) -> None:
    """UserError for a checkpoint in codes, where the method would train or make them."""
    codes = f"{config.model}: the model's weights are in codes ({layout})"
    if config.trains in ("full", "qat"):
        raise UserError(f"{codes}, which do not train: use method lora, or the unquantized model")
    if _encodes(config):
        raise UserError(f"{codes} already: use method lora (or quant_backend stored)")
    if config.precision.startswith("fp8") and layout != "compressed-tensors":
        raise UserError(f"{codes}, which have no float8 products: use another precision")


def _set_dropout(params: Tree, rate: float) -> Tree:
    """This run's rate on the adapters that it trains, whatever they were trained with before."""

    def change(w: Any) -> Any:
        return replace(w, dropout=rate) if isinstance(w, Lora) else w

    return jax.tree.map(change, params, is_leaf=is_weight)


@dataclass(frozen=True)
class Program:
    """What a run compiles, from params or from their shapes alone.

    init(train) -> State, step(state, frozen, kept, batch) -> (state, metrics) and
    evaluate(train, frozen, kept, batch) -> metrics are jitted; the first two give their first
    argument's buffers away. `loss` is the step's own (`run.step.make_loss`), `places` the state's
    shardings.
    """

    init: Any
    step: Any
    evaluate: Any
    loss: Callable
    places: State


def program(
    config: Config,
    model: Model,
    params: Tree,
    mesh: Mesh,
    total_steps: int,
    method: Method | None = None,
) -> Program:
    """The run's functions with their outputs pinned to the mesh; params may be shapes. method: None
    for the config's own."""
    method = method_of(config) if method is None else method
    train, _ = partition(params)
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    rate = schedule(
        config.lr_scheduler,
        config.learning_rate,
        total_steps,
        warmup,
        config.lr_restarts,
        config.lr_power,
    )
    tx = make_optimizer(
        config.optimizer,
        rate,
        train,
        weight_decay=config.weight_decay,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
    )

    def init(train: Tree) -> State:
        key = jax.random.key((config.seed + 1) % 2**32)
        return init_state(train, tx=tx, key=key, fp16=config.precision == "fp16")

    places = _state_shardings(mesh, model, params, jax.eval_shape(init, train))
    run_layers = partial(scan_layers, remat=config.gradient_checkpointing)
    penalties = router_penalties(config)
    step = make_step(model, method, tx, rate, run_layers, config.max_grad_norm, penalties)
    return Program(
        init=jax.jit(init, out_shardings=places, donate_argnums=0),
        step=jax.jit(step, donate_argnums=0, out_shardings=(places, replicated(mesh))),
        evaluate=jax.jit(make_eval(model, method, run_layers), out_shardings=replicated(mesh)),
        loss=make_loss(model, method, run_layers, penalties),
        places=places,
    )


def prepare(
    config: Config,
    model: Model,
    params: Tree,
    mesh: Mesh,
    total_steps: int,
    method: Method | None = None,
) -> Prepared:
    """Optimizer state on the mesh and the jitted step; nothing is compiled yet."""
    method = method_of(config) if method is None else method
    compiled = program(config, model, params, mesh, total_steps, method)
    kept = load_teacher(config, mesh) if config.asks_teacher else kept_of(config, params)
    train, frozen = partition(params)
    # Given away, because a second copy of what trains may not fit.
    state = compiled.init(train)

    def one_step(state: State, batch: dict[str, np.ndarray]) -> tuple[State, Tree]:
        return compiled.step(state, frozen, kept, put_batch(batch, mesh))

    def whole_set(
        state: State, batches: Any, sources: Sequence[str] | None = None
    ) -> dict[str, float]:
        return on_batches(state.train, frozen, kept, batches, sources)

    def measure(params: Tree, batches: Any) -> dict[str, float]:
        # Of other params the reference is still that of the run.
        before = reference(kept, state.train, frozen) if method.reference else None
        return on_batches(params, jax.tree.map(lambda x: None, params), before, batches)

    def on_batches(
        train: Tree,
        frozen: Tree,
        kept: Tree,
        batches: Any,
        sources: Sequence[str] | None = None,
    ) -> dict[str, float]:
        sums = [compiled.evaluate(train, frozen, kept, put_batch(b, mesh)) for b in batches]
        found = means(sums) | by_source(sums, sources or [""] * len(sums))
        return {f"eval_{name}": value for name, value in found.items()}

    def lower(batch: dict[str, np.ndarray]) -> jax.stages.Lowered:
        return compiled.step.lower(state, frozen, kept, put_batch(batch, mesh))

    return Prepared(model, state, frozen, one_step, whole_set, measure, lower)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    return jax.device_put(batch, {k: batch_sharding(mesh, x.ndim) for k, x in batch.items()})


def _state_shardings(mesh: Mesh, model: Model, params: Tree, state: State) -> State:
    """Trained leaves by the rules, moments like the leaf they belong to, the rest everywhere."""
    train, _ = partition(shardings(mesh, axes(model.arch), params))
    everywhere = replicated(mesh)
    return replace(
        jax.tree.map(lambda leaf: everywhere, state),
        train=train,
        opt_state=like(train, state.opt_state, everywhere),
    )
