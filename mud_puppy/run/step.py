"""The training step, one for every method: score, loss, gradient, clip, update.

A step's batch has a leading axis of accumulation steps [A, B, ...], scanned. The weight sum is
counted over all of it, in the method's unit, before the forward pass, so any split of the batch
gives the gradient of the whole. Gradients and their sum are float32 because the trained leaves are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mud_puppy.model import Model
from mud_puppy.run.methods import Method
from mud_puppy.run.optimizer import global_norm
from mud_puppy.run.reference import reference
from mud_puppy.weights import combine, with_dropout, with_scales

Tree = Any
Batch = dict[str, Array]

# torch.amp.GradScaler's constants.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossScale:
    """fp16's dynamic loss scale: halved when a gradient overflows, doubled after a quiet while."""

    scale: Any
    good_steps: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that changes from step to step, and so all that a checkpoint must hold.

    step: int32, updates done. train: the trained leaves (None elsewhere). key: for dropout.
    loss_scale: None unless fp16.
    """

    step: Any
    train: Any
    opt_state: Any
    key: Any
    loss_scale: Any = None


def init_state(train: Tree, tx: optax.GradientTransformation, key: Array, fp16: bool) -> State:
    scale = LossScale(jnp.float32(FIRST_SCALE), jnp.int32(0)) if fp16 else None
    return State(jnp.int32(0), train, tx.init(train), key, scale)


def make_step(
    model: Model,
    method: Method,
    tx: optax.GradientTransformation,
    rate: Callable,
    run_layers: Callable,
    max_grad_norm: float | None,
    penalties: Mapping[str, float] | None = None,
) -> Callable[[State, Tree, Tree, Batch], tuple[State, Tree]]:
    """step(state, frozen, kept, batch) -> (state, metrics); to be jitted by the caller.

    kept: what the reference policy has of its own (`run.reference`). penalties: of `make_loss`.
    metrics: {name: (sum, count)} of the loss, and grad_norm (before clipping), learning_rate and,
    in fp16, loss_scale as (value, 1).
    """

    loss = make_loss(model, method, run_layers, penalties)

    def step(state: State, frozen: Tree, kept: Tree, batch: Batch) -> tuple[State, Tree]:
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
        key = jax.random.fold_in(state.key, state.step)
        weight_sum = jnp.maximum(batch[method.unit].sum(), 1e-6)

        def scaled_loss(train: Tree, micro: Batch, key: Array) -> tuple[Array, Tree]:
            value, metrics = loss(train, frozen, kept, micro, key, weight_sum)
            return value * scale, metrics

        grads, metrics = _accumulate(jax.grad(scaled_loss, has_aux=True), state.train, batch, key)
        grads = jax.tree.map(lambda g: g / scale, grads)
        norm = global_norm(grads)
        if max_grad_norm is not None:
            shrink = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.train)
        train = optax.apply_updates(state.train, updates)
        after = replace(state, step=state.step + 1, train=train, opt_state=opt_state)
        extra = {"grad_norm": norm, "learning_rate": rate(state.step)}
        if state.loss_scale is not None:
            finite = jnp.isfinite(norm)
            after = _keep_if(finite, after, replace(state, step=state.step + 1))
            after = replace(after, loss_scale=_rescale(state.loss_scale, finite))
            extra["loss_scale"] = scale
        return after, metrics | {name: (value, jnp.float32(1)) for name, value in extra.items()}

    return step


def make_loss(
    model: Model,
    method: Method,
    run_layers: Callable,
    penalties: Mapping[str, float] | None = None,
) -> Callable:
    """loss(train, frozen, kept, micro, key, weight_sum) -> (scalar, metrics) of a batch [B, ...].

    penalties: what is added of the model's auxiliary means (`router_losses`), by name, times the
    batch's share of the step's weights.
    """

    def loss(
        train: Tree, frozen: Tree, kept: Tree, micro: Batch, key: Array, weight_sum: Array
    ) -> tuple[Array, Tree]:
        params = with_scales(with_dropout(combine(train, frozen), key))
        before = reference(kept, train, frozen) if method.reference else None
        scores = method.score(model, params, before, micro, run_layers)
        value, metrics = method.loss(scores, micro, weight_sum)
        share = micro[method.unit].sum() / weight_sum
        for name, factor in (penalties or {}).items():
            total, count = scores["aux"][name]
            value += factor * share * total / count
        return value, metrics | scores["aux"]

    return loss


def make_eval(model: Model, method: Method, run_layers: Callable) -> Callable:
    """evaluate(train, frozen, kept, batch) -> metrics, as sums, of one batch [A, B, ...]."""

    def evaluate(train: Tree, frozen: Tree, kept: Tree, batch: Batch) -> Tree:
        params = with_scales(combine(train, frozen))
        before = reference(kept, train, frozen) if method.reference else None

        def body(carry: None, micro: Batch) -> tuple[None, Tree]:
            scores = method.score(model, params, before, micro, run_layers)
            return None, method.loss(scores, micro, jnp.float32(1))[1] | scores["aux"]

        _, metrics = jax.lax.scan(body, None, batch)
        return jax.tree.map(lambda x: x.sum(0), metrics)

    return evaluate


def _accumulate(grad: Callable, train: Tree, batch: Batch, key: Array) -> tuple[Tree, Tree]:
    """Sums of gradients (float32) and metrics over the accumulation axis."""
    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        micro = jax.tree.map(lambda x: x[0], batch)
        return grad(train, micro, jax.random.fold_in(key, 0))

    def body(total: Tree, index: Array) -> tuple[Tree, Tree]:
        micro = jax.tree.map(lambda x: x[index], batch)
        grads, metrics = grad(train, micro, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, train)
    grads, metrics = jax.lax.scan(body, zeros, jnp.arange(count))
    return grads, jax.tree.map(lambda x: x.sum(0), metrics)


def _keep_if(good: Array, new: Tree, old: Tree) -> Tree:
    """`new` where good; a skipped step keeps parameters and moments."""

    def pick(n: Array, o: Array) -> Array:
        if jnp.issubdtype(n.dtype, jax.dtypes.prng_key):
            return n
        return jnp.where(good, n, o)

    return jax.tree.map(pick, new, old)


def _rescale(state: LossScale, finite: Array) -> LossScale:
    quiet = state.good_steps + 1
    grow = finite & (quiet >= GROWTH_INTERVAL)
    factor = jnp.where(finite, jnp.where(grow, GROWTH, 1.0), BACKOFF)
    return LossScale(state.scale * factor, jnp.where(finite & ~grow, quiet, 0))
