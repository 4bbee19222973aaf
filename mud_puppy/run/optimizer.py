"""Optimizers from optax, as one transformation over the trained leaves.

Norms and biases are not decayed (as in transformers' Trainer), nor are learned ranges. LoRA+
(arXiv:2402.12354) multiplies the whole update of every `b`. Stacked layers are one leaf
[n, out, in]; Adafactor clips and Muon orthogonalises each matrix of the stack on its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mud_puppy.run.eight_bit import scale_by_adam_8bit, scale_by_lion_8bit

Tree = Any


def make_optimizer(
    name: str,
    rate: optax.Schedule,
    train: Tree,
    *,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    loraplus_lr_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """name: adamw, adafactor, lion, sgd or muon, adamw_8bit or lion_8bit; beta1, beta2 and epsilon
    are adamw's and adamw_8bit's.

    Clipping is the step's, which reports the norm before it.
    """
    rule = _rules(train, beta1, beta2, epsilon)[name]
    return optax.chain(
        rule,
        optax.add_decayed_weights(weight_decay, mask=jax.tree.map_with_path(_decayed, train)),
        optax.scale_by_learning_rate(rate),
        _scale_b(loraplus_lr_ratio),
    )


def _rules(train: Tree, beta1: float, beta2: float, epsilon: float) -> dict[str, Any]:
    return {
        "adamw": optax.scale_by_adam(beta1, beta2, epsilon),
        # Not scaled by the parameter's size (transformers' Trainer neither): a fresh B is zero and
        # would move by 1e-3 of the rate.
        "adafactor": optax.chain(optax.scale_by_factored_rms(), _clip_rms()),
        "adamw_8bit": scale_by_adam_8bit(beta1, beta2, epsilon),
        "lion": optax.scale_by_lion(),
        "lion_8bit": scale_by_lion_8bit(b1=0.9, b2=0.99),
        "sgd": optax.identity(),
        "muon": _muon(train),
    }


def _clip_rms() -> optax.GradientTransformation:
    """Adafactor's clipping (1804.04235, 5): no matrix moves by more than 1 in the mean square."""

    def clip(path: tuple, u: jax.Array) -> jax.Array:
        # Each layer's, and each expert's.
        first = max(1, u.ndim - 2) if "layers" in _names(path) else 0
        own = tuple(range(first, u.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=own, keepdims=True))
        return u / jnp.maximum(1.0, rms)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(clip, updates))


def _muon(train: Tree) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, Adam for embedding, head, norms and biases."""
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    labels = jax.tree.map_with_path(
        lambda path, x: "muon" if _is_stack_of_matrices(path, x) else "adam", train
    )
    dims = jax.tree.map(lambda label: matrix if label == "muon" else optax.MaskedNode(), labels)
    return optax.partition(
        {
            "muon": optax.chain(
                contrib.scale_by_muon(weight_dimension_numbers=lambda params: dims),
                optax.stateless(lambda updates, params: jax.tree.map(_like_adam, updates)),
            ),
            "adam": optax.scale_by_adam(),
        },
        labels,
    )


def _is_stack_of_matrices(path: tuple, x: Any) -> bool:
    """[n, out, in], or [n, E, out, in] of experts; not so learned ranges [n, out, groups], experts'
    biases [n, E, out] and norms of each head."""
    names = _names(path)
    return "layers" in names and x.ndim >= 3 and names[-1] in ("weight", "a", "b", "base")


def _like_adam(update: jax.Array) -> jax.Array:
    """An orthogonal update with the size of one of Adam's, so that its rates serve (2502.16982)."""
    return update * (0.2 * max(update.shape[-2:]) ** 0.5)


def _scale_b(ratio: float) -> optax.GradientTransformation:
    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        scaled = jax.tree.map_with_path(
            lambda path, u: u * ratio if _names(path)[-1] == "b" else u, updates
        )
        return (updates if ratio == 1.0 else scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _decayed(path: tuple, leaf: Any) -> bool:
    name = _names(path)[-1]
    return not (name.endswith(("norm", "bias")) or name == "range")


def _names(path: tuple) -> list[str]:
    """Keys of a tree path as texts, whatever kind of node they belong to."""
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def global_norm(tree: Tree) -> jax.Array:
    """The float32 norm of all leaves as one vector."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
