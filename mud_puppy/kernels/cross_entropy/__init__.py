"""`linear_cross_entropy` and `token_logps`: hidden @ head.T -> what a loss needs, no [B, T, V].

One core reduces each token's logits to `Stats` and is differentiable in hidden and in head:
`xla` (blocks of tokens, chunks of the head), `pallas` (a GEMM with the reduction in its epilogue),
or `reference` (all logits), which only tests ask for. A head that is neither an array nor
`Quantized` (an adapter) goes through `matmul`, and its logits have the rounding of hidden's dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from mud_puppy.kernels import choice, selfcheck, target
from mud_puppy.kernels.arguments import INTEGERS, check_array, check_static
from mud_puppy.kernels.cross_entropy import pallas, reference, xla
from mud_puppy.kernels.cross_entropy.stats import Shape, Stats
from mud_puppy.kernels.formats import Quantized, dequantize, sliced
from mud_puppy.kernels.matmul import matmul
from mud_puppy.kernels.varying import alike

OP = "cross-entropy"
IMPLEMENTATIONS = ("pallas", "xla", "reference")


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Any,
    targets: Int[Array, "B T"],
    *,
    weights: Float[Array, "B T"] | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    implementation: str | None = None,
) -> Array:
    """Cross-entropy of softmax(hidden @ head.T) with the targets, float32.

    A token's loss is -log p(target), and with label smoothing e (arXiv:1512.00567)
    (1 - e) (-log p(target)) + e mean_v(-log p(v)), plus z_loss * lse^2 (arXiv:2204.02311), times
    its weight. Tokens whose target is `ignore_index` count nothing. `reduction`: "none" [B, T];
    "sum"; "mean" over the sum of the weights (over the tokens that count, without weights), 0 where
    that is 0. `softcap` c makes the logits c tanh(logits / c), as Gemma 2 has them.

    Differentiable in hidden, head (a weight [V, D]) and weights. Raises ValueError for shapes that
    do not fit and for options out of their range; a target that is no word of the head and not
    `ignore_index` makes the loss NaN.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is none of 'mean', 'sum', 'none'")
    check_static(OP, softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss)
    if not 0 <= label_smoothing <= 1 or not z_loss >= 0:
        raise ValueError(
            f"expected label_smoothing from 0 to 1 and z_loss from 0; got {label_smoothing} and "
            f"{z_loss}"
        )
    _check(hidden, targets, softcap)
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"expected weights {targets.shape} as the targets, got {weights.shape}")
    counts = targets != ignore_index
    known = jnp.where(counts, targets, 0)
    only_logp = not label_smoothing and not z_loss
    stats = _stats(hidden, head, known, Shape(softcap), implementation, only_logp)
    loss = -stats.logp
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (stats.lse - stats.mean)
    if z_loss:
        loss += z_loss * jnp.square(stats.lse)
    shares = jnp.where(counts, 1.0 if weights is None else weights.astype(jnp.float32), 0.0)
    loss = jnp.where(counts, loss, 0.0) * shares
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = shares.sum()
    return loss.sum() / jnp.where(total == 0, 1.0, total)


def token_logps(
    hidden: Float[Array, "B T D"],
    head: Any,
    targets: Int[Array, "B T"],
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log p(target), entropy of p in nats), float32 [B, T].

    p = softmax(logits / temperature), logits = hidden @ head.T, under `softcap` c
    c tanh(logits / c). `head` is a weight [V, D]; targets are in [0, V). A negative one, as -100,
    is ignored: its log p is 0. One from V on makes it NaN. Both results are differentiable in
    hidden and in head, and nothing is computed for the one that is not differentiated.
    """
    check_static(OP, softcap=softcap, temperature=temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    _check(hidden, targets, softcap)
    stats = _stats(hidden, head, targets, Shape(softcap, float(temperature)), implementation)
    return jnp.where(targets < 0, 0.0, stats.logp), stats.entropy


def _check(hidden: Any, targets: Any, softcap: float | None) -> None:
    check_array(OP, "hidden", hidden, "B T D")
    check_array(OP, "targets", targets, "B T", INTEGERS)
    if targets.shape != hidden.shape[:2]:
        raise ValueError(f"expected targets {hidden.shape[:2]}, got {targets.shape}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive; got {softcap}")


def _stats(
    hidden: Any,
    head: Any,
    targets: Any,
    shape: Shape,
    implementation: str | None,
    keep: bool = True,
) -> Stats:
    B, T, D = hidden.shape
    if _is_array(head):
        check_array(OP, "head", head, "V D")
    if _is_weight(head) and (head.shape[1:] != (D,) or not D or not head.shape[0]):
        raise ValueError(f"expected a head [V, {D}], got {head.shape}")
    if not targets.size:
        return Stats(*[jnp.zeros((B, T), jnp.float32)] * 4)
    inside = (targets >= 0) & (targets < _words(hidden, head))
    known = jnp.where(inside, targets, 0).astype(jnp.int32)
    found = _inside(hidden, head, known, shape, implementation, keep)
    # No word's log p: a wrong label must not pass for a loss.
    return found._replace(logp=jnp.where(inside, found.logp, jnp.nan))


def _words(hidden: Any, head: Any) -> int:
    """V"""
    if _is_weight(head):
        return head.shape[0]
    return jax.eval_shape(lambda x: matmul(x, head), hidden).shape[-1]


def _inside(
    hidden: Any, head: Any, targets: Any, shape: Shape, implementation: str | None, keep: bool
) -> Stats:
    """`_stats` of targets in [0, V)."""
    if not _is_weight(head):
        if implementation not in (None, "xla"):
            raise ValueError(f"{implementation} cannot serve a head of type {type(head).__name__}")
        return xla.through_matmul(hidden, partial(matmul, w=head), targets, shape)
    head = sliced(head) if isinstance(head, Quantized) else head
    name = _choose(implementation, hidden, head)
    if name == "reference":
        head = dequantize(head) if isinstance(head, Quantized) else head
        return reference.stats(hidden, head, targets, shape)
    head = head if isinstance(head, Quantized) else jnp.asarray(head)
    hidden, head, targets = alike((hidden, head, targets))
    return _core(hidden, head, targets, shape, {"pallas": pallas, "xla": xla}[name], keep)


def _is_weight(head: Any) -> bool:
    """Whether the implementations read its rows; an adapter goes through `matmul`."""
    return isinstance(head, Quantized) or _is_array(head)


def _is_array(head: Any) -> bool:
    return isinstance(head, jax.Array) or hasattr(head, "__array__")


def _choose(implementation: str | None, hidden: Any, head: Any) -> str:
    order = ("pallas",) if _wins(hidden, head) else ()
    declines = {"pallas": lambda: _declines(hidden, head)}
    return choice.choose(OP, implementation, IMPLEMENTATIONS, declines, order)


def _wins(hidden: Any, head: Any) -> bool:
    """Whether the kernels are taken by themselves: where they were measured to be faster.

    On an H100 they are (docs/kernels.md), but for float32, which has no tensor cores of its own,
    and for a head of another dtype, of which they need a copy and XLA a chunk at a time. AMD's
    GEMMs, which XLA calls, have not been compared with them on a card.
    """
    same = head.dtype == hidden.dtype and hidden.dtype != jnp.float32
    return same and target.current().platform == "cuda"


def _declines(hidden: Any, head: Any) -> str | None:
    return pallas.declines(hidden, head) or _fault(hidden.dtype)


def _fault(dtype: Any) -> str | None:
    """What the self-check of the kernels for this dtype found."""
    return selfcheck.fault(_name(dtype), lambda: _case(dtype))


def _name(dtype: Any) -> str:
    return f"cross-entropy kernels for {dtype}"


def selfchecks(name: str) -> list[tuple[str, selfcheck.Case]]:
    """Cases that hold the implementation "pallas" or "xla" against the reference."""
    dtype = jnp.dtype(jnp.bfloat16)
    if name == "pallas":
        return [(_name(dtype), partial(_case, dtype))]
    return [(f"cross-entropy by XLA for {dtype}", partial(_case, dtype, xla))]


def _case(dtype: Any, module: Any = pallas) -> tuple[float, float]:
    """(error, bound) of values and gradients by an implementation."""
    r = np.random.default_rng(0)
    x, w = (jnp.asarray(r.normal(size=s) / 8, dtype) for s in ((1, 300, 256), (1000, 256)))
    y = jnp.asarray(r.integers(0, 1000, (1, 300)), jnp.int32)

    def results(run: Any, x: Any, w: Any) -> list:
        def both(x: Any) -> Any:
            stats = run(x, w, y, Shape(softcap=20.0))
            return stats.logp.sum(), stats

        def smooth(x: Any) -> Any:
            return both(x)[1].mean.sum() + both(x)[1].entropy.sum()

        slope, stats = jax.grad(both, has_aux=True)(x)
        return [slope, jax.grad(smooth)(x), *stats]

    # Arrays go in as arguments, or XLA would compute with them while it compiles.
    got = jax.jit(partial(results, partial(_core, module=module, keep=True)))(x, w)
    want = jax.jit(partial(results, reference.stats))(*(a.astype(jnp.float32) for a in (x, w)))
    pairs = zip(got, want, strict=True)
    errors = [abs(a.astype(jnp.float32) - b).max() / abs(b).max() for a, b in pairs]
    return float(jnp.stack(errors).max()), 4 * float(jnp.finfo(dtype).eps) + 1e-4


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _core(x: Any, head: Any, y: Any, shape: Shape, module: Any, keep: bool) -> Stats:
    """`keep`: a frozen head's d logp / d x is made while the logits are there, and kept."""
    return module.forward(x, head, y, shape)


def _core_forward(x: Any, head: Any, y: Any, shape: Shape, module: Any, keep: bool) -> Any:
    leaves = jax.tree.leaves(head)
    args = x.value, jax.tree.map(lambda leaf: leaf.value, head), y.value
    # The scales of a quantized head do not train.
    trains = len(leaves) == 1 and leaves[0].perturbed
    if trains or not keep:
        stats = module.forward(*args, shape)
        return stats, (args, stats, None, () if trains else None)
    stats, slope = module.forward_and_slope(*args, shape)
    return stats, (args, stats, slope, None)


def _core_backward(shape: Shape, module: Any, keep: bool, residuals: Any, g: Stats) -> Any:
    (x, head, y), stats, slope, trains = residuals
    others = (g.entropy, g.lse, g.mean)
    if slope is not None and all(isinstance(z, SymbolicZero) for z in others):
        return (g.logp[..., None] * slope).astype(x.dtype), None, None
    g = Stats(*(jnp.zeros(y.shape, jnp.float32) if isinstance(z, SymbolicZero) else z for z in g))
    if trains is None:
        return module.backward(x, head, y, stats, g, shape), None, None
    # XLA's for all: a block of `pallas` has few tokens, and d head would be read and written for
    # each (on an H100 77 ms instead of 68).
    return *xla.backward_with_head(x, head, y, stats, g, shape), None


_core.defvjp(_core_forward, _core_backward, symbolic_zeros=True)
