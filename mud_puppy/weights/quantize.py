"""`quantize`: a params tree with its linear weights in codes, and the same for one leaf at a time.

QLoRA (arXiv:2305.14314) is an adapter on top: `add_lora(quantize(params, "nf4"), ...)`. Norms and
biases stay as they are; so do embedding and head unless asked, for they are looked at by every
token and are a small part of a large model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from mud_puppy import kernels
from mud_puppy.errors import UserError, nearest
from mud_puppy.kernels import Quantized
from mud_puppy.weights.leaf import Lora, is_weight

Tree = Any

# The gate of a shared expert, [1, D]: one number a token, which weighs a whole MLP. Routers are no
# linears (`layers/0/0/mlp/router`), and stay floats too.
_GATES = "shared_expert_gate"


def is_rounded(path: str) -> bool:
    """Whether the leaf at a path of `load`'s is a linear of a layer that may be in codes."""
    inside = path.startswith("layers/") and path.endswith("/weight")
    return inside and not path.endswith(f"{_GATES}/weight")


FORMATS = ("nf4", "int4", "int8", "mxfp4", "fp8")
GROUPED = ("nf4", "int4", "int8", "fp8")  # mxfp4's groups are 32


@dataclass(frozen=True)
class Scheme:
    """What becomes of which weight; None keeps it.

    format: of the layers' linear weights. group: inputs that share a scale, "row" or "tensor", None
    for the format's own. double: nf4's scales in 8 bits too. embed, head: their formats. A tied
    head is the embedding.
    """

    format: str | None = "nf4"
    group: int | str | None = None
    zero_points: bool = False
    double: bool | None = None
    embed: str | None = None
    head: str | None = None

    def of(self, path: str) -> Callable[[jax.Array], Quantized] | None:
        """What encodes the leaf at a path of `load`'s ("layers/0/0/mlp/up_proj/weight")."""
        if path in ("embed", "head"):
            format = self.embed if path == "embed" else self.head
            return None if format is None else _encoder(format)
        if self.format is None or not is_rounded(path):
            return None
        return _encoder(self.format, self.group, self.zero_points, self.double)


def quantize(
    params: Tree,
    format: str = "nf4",
    *,
    group: int | str | None = None,
    zero_points: bool = False,
    double: bool | None = None,
    embed: str | None = None,
    head: str | None = None,
) -> Tree:
    """`params` with the linear weights of its layers as `Quantized`, under adapters too.

    format: nf4, int4, int8, mxfp4 or fp8. group: inputs that share a scale, None for the format's
    own (nf4, int4: 64, mxfp4: 32, int8, fp8: a row). zero_points: int4's. double: nf4's scales in 8
    bits too; None means yes, as QLoRA does. embed, head: the format of the embedding [V, D] and of
    an untied head (a tied one is the embedding), None to keep them. UserError for a weight that is
    quantized already or whose rows no group divides.
    """
    change = quantizer(Scheme(format, group, zero_points, double, embed, head))
    return jax.tree.map_with_path(
        lambda path, w: change(path_of(path), w), params, is_leaf=is_weight
    )


def path_of(path: tuple) -> str:
    """A key path of `tree.map_with_path` as `load` writes paths."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def quantizer(scheme: Scheme) -> Callable[[str, jax.Array], Any]:
    """`load`'s `on_leaf`: encodes each tensor as it is read."""

    def on_leaf(path: str, array: Any) -> Any:
        encode = scheme.of(path)
        return array if encode is None else _under_adapters(encode, path, array)

    return on_leaf


def _under_adapters(encode: Callable, path: str, w: Any) -> Any:
    if isinstance(w, Lora):
        return replace(w, base=_under_adapters(encode, path, w.base))
    if isinstance(w, Quantized):
        raise UserError(f"{path} is {w.format} already: quantize the model it was made from")
    if is_weight(w):
        raise UserError(f"{path} is a {type(w).__name__}: quantize the model before it was wrapped")
    try:
        return encode(w)
    except ValueError as error:
        raise UserError(f"{path} cannot be quantized: {error}") from None


def _encoder(
    format: str,
    group: int | str | None = None,
    zero_points: bool = False,
    double: bool | None = None,
) -> Callable[[jax.Array], Quantized]:
    if format not in FORMATS:
        raise UserError(
            f"'{format}' is no format of weights: {', '.join(FORMATS)}.{nearest(format, FORMATS)}"
        )
    double = format == "nf4" if double is None else double
    return partial(_encode, format=format, group=group, zero_points=zero_points, double=double)


@partial(jax.jit, static_argnames=("format", "group", "zero_points", "double"))
def _encode(w: jax.Array, **options: Any) -> Quantized:
    """[out, in], or a stack of them (layers, experts), one matrix after the other: float32 copies
    are of one only."""
    encode = partial(kernels.quantize, **options)
    if w.ndim == 2:
        return encode(w)
    done = jax.lax.map(encode, w.reshape(-1, *w.shape[-2:]))
    return jax.tree.map(lambda x: x.reshape(*w.shape[:-2], *x.shape[1:]), done)
