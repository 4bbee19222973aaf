"""A GGUF file's own codes as `Quantized` leaves, nothing lost.

    Q4_0                       int4, groups of 32
    Q4_1, Q4_K                 int4 with minimums, groups of 32
    Q5_0, Q8_0                 int8, groups of 32
    Q6_K                       int8, groups of 16

The layers of a weight are one leaf. Where their types differ, it is int4 with minimums if that
holds them all (Q4_0, Q4_1, Q4_K), int8 if that does (Q4_0, Q5_0, Q8_0, Q6_K), and floats otherwise:
a file that llama.cpp calls Q4_K_M has Q6_K in some layers of two weights. Scales are float16 as in
the file, or float32 where they are a K-quant's products. A code times its scale is exact in
float32, so that the leaves decode to the bits of `gguf.dequantize`, compiled (FMA) or not.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model import gguf_blocks
from mud_puppy.model.gguf import Encoded
from mud_puppy.model.tensors import Stored

log = logging.getLogger("mud_puppy")

KEPT = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
_FLOATS = {"F32", "F16", "BF16", "F64"}
_HINT = "load without keep_codes (method qlora: name another quant_backend) to decode and quantize"


class GgufCodes:
    """Which weights of a GGUF file are in codes, and their leaves: what `Codes` is for folders.

    Weights that are stored as floats stay so; those that no leaf holds are decoded, which one line
    of the log says. UserError for a file without any codes to keep.
    """

    def __init__(
        self, where: Path, names: dict[str, list[str]], tensors: Mapping[str, Stored]
    ) -> None:
        self.parts: dict[str, list[str]] = {}  # each weight is one tensor, under its own name
        self._stacks: dict[str, tuple[list[Encoded], Target]] = {}
        decoded: Counter[str] = Counter()
        for leaf, weights in names.items():
            if leaf not in ("embed", "head") and not leaf.endswith("/weight"):
                continue
            found = [tensors[name] for name in weights if name in tensors]
            stack = [tensor for tensor in found if isinstance(tensor, Encoded)]
            types = {tensor.type for tensor in stack}
            if (target := _target(types)) is not None:
                self._stacks[leaf] = stack, target
            elif types - _FLOATS:
                decoded[", ".join(sorted(types))] += len(stack)
        if not self._stacks:
            listed = f"{', '.join(KEPT[:-1])} or {KEPT[-1]}"
            raise UserError(f"{where}: no weight is stored in {listed} alone: {_HINT}")
        if decoded:
            told = (f"{count} weights stored as {types}" for types, count in decoded.items())
            log.warning(
                "%s: decoded to floats, for the layers of a weight are kept in one format: %s",
                where,
                "; ".join(told),
            )

    def holds(self, leaf: str) -> bool:
        return leaf in self._stacks

    def read(self, leaf: str, shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
        """The leaf of each layer ([out, in], or [E, out, in] of experts) of a stack of this shape,
        or the one."""
        stack, target = self._stacks[leaf]
        own = shape[1:] if leaf.startswith("layers/") else shape
        each = own[0] if len(own) == 3 else 1
        for i in range(0, len(stack), each):
            parts = [_leaf(tensor, own[-2:], dtype, target) for tensor in stack[i : i + each]]
            if len(own) == 3:
                yield jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *parts)
            else:
                yield jax.tree.map(jnp.asarray, parts[0])


def say_decoded(where: Path, tensors: Iterable[Stored]) -> None:
    """One line of the log on what of a file's codes `load` decodes when it keeps none."""
    types = Counter(t.type for t in tensors if isinstance(t, Encoded) and t.type not in _FLOATS)
    if not types:
        return
    told = ", ".join(f"{count} in {type}" for type, count in types.items())
    hint = "; keep_codes (method qlora: quant_backend stored) keeps them"
    hint = hint if set(types) & {*KEPT} else ""
    log.warning("%s: weights decoded to floats: %s%s", where, told, hint)


@dataclass(frozen=True)
class Target:
    """The leaf that the layers of a weight become."""

    format: str
    group: int = 32
    minimum: bool = False
    scales: Any = np.float16


def _target(types: set[str]) -> Target | None:
    """The leaf that holds layers of these types; None: none does, or they are floats."""
    scales = np.float32 if types & {"Q4_K", "Q6_K"} else np.float16
    if not types:
        return None
    if types <= {*gguf_blocks.INT4}:
        return Target("int4", minimum=types != {"Q4_0"}, scales=scales)
    if types <= {*gguf_blocks.INT8}:
        return Target("int8", 16 if "Q6_K" in types else 32, scales=scales)
    return None


def _leaf(tensor: Encoded, shape: tuple[int, ...], dtype: str, target: Target) -> Quantized:
    """The leaf [out, in], in numpy arrays. UserError for scales that are no numbers."""
    rows = tensor.blocks()
    with np.errstate(all="ignore"):  # of scales that are no numbers, which are refused below
        of = gguf_blocks.int4 if target.format == "int4" else gguf_blocks.int8
        codes, scales, minimum = of(rows, tensor.type)
    if not (np.isfinite(scales).all() and (minimum is None or np.isfinite(minimum).all())):
        raise UserError(f"{tensor.where} holds a NaN or an infinity: the file is corrupt")
    if target.format == "int4":
        codes = (codes[:, ::2] << 4) | codes[:, 1::2]
    # Types of longer groups beside those of shorter ones: the same scale for each part.
    scales = np.repeat(scales, shape[-1] // target.group // scales.shape[1], axis=1)
    lowest = minimum.astype(target.scales) if target.minimum and minimum is not None else None
    return Quantized(
        codes,
        scales.astype(target.scales),
        minimum=lowest,
        format=target.format,
        dtype=jnp.dtype(dtype),
    )
