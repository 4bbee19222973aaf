"""Quantized checkpoints: which of a folder's weights are in codes, their leaves, and back to files.

config.json's `quantization_config` names the layout, whose file knows the tensors that stand for a
weight (`layouts`). Weights that no leaf here holds as they are stored are decoded, which one line
of the log says.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized, dequantize
from mud_puppy.model import (
    bitsandbytes_format,
    compressed_config,
    compressed_tensors,
    gptq_format,
    mxfp4_format,
)
from mud_puppy.model.layouts import Arrays, Config, Kind, layout
from mud_puppy.model.read import whole
from mud_puppy.model.tensors import Stored, check_float
from mud_puppy.weights import Int8Dynamic

log = logging.getLogger("mud_puppy")


def take_config(config: Any) -> Config | None:
    """The `quantization_config` of a transformers config, which is then the unquantized model's."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        del config.quantization_config
    return found


class Codes:
    """What of a checkpoint is in codes: by leaf of the params tree, and by HF tensor.

    names: the HF weights of each leaf, of each layer and in it of each expert; the weights of one
    leaf become codes if all are stored in one way, else floats. `parts`: the tensors that stand for
    each weight. UserError, in the name of `where`, for a layout that is not read and for missing
    tensors.
    """

    def __init__(
        self, where: Path, config: Config, names: dict[str, list[str]], tensors: dict[str, Stored]
    ) -> None:
        self._where, self._tensors = where, tensors
        self._layout = self._named("config", lambda: layout(config, tensors))
        self.parts: dict[str, list[str]] = {}
        self._weights: dict[str, list[str]] = {}
        for leaf, weights in names.items():
            found = {weight: self._parts(weight) for weight in weights}
            # A config may name norms beside linears, or experts that are one tensor, of which no
            # layout but MXFP4's has codes: the tensors decide.
            if not _is_linear(leaf) or not weights[0].endswith(".weight"):
                found = {w: own for w, own in found.items() if own and self._have(own)}
            self.parts |= {weight: [*own.values()] for weight, own in found.items() if own}
            if any(found.values()):
                self._weights[leaf] = weights
        if not self.parts:
            raise UserError(
                f"{where}: config.json has a quantization_config, but no tensor is quantized; "
                "remove it from config.json"
            )
        missing = [p for parts in self.parts.values() for p in parts if p not in tensors]
        if missing:
            raise UserError(
                f"{where}: tensor '{missing[0]}' is missing: the checkpoint is incomplete"
            )
        self._decoded = self._survey()

    def holds(self, leaf: str) -> bool:
        return leaf in self._weights

    def read(self, leaf: str, shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
        """The leaf of each layer ([out, in], or [E, out, in] of experts) of a stack of this shape,
        or the one."""
        weights, own = self._weights[leaf], shape
        if leaf.startswith("layers/"):
            own = shape[1:]
        each = len(weights) // (shape[0] if own != shape else 1)
        decoded = leaf in self._decoded
        for i in range(0, len(weights), each):
            if self._layout.fused or len(own) < 3:
                yield jax.tree.map(jnp.asarray, self._read(weights[i], own, dtype, decoded))
                continue
            experts = [self._read(w, own[1:], dtype, decoded) for w in weights[i : i + each]]
            yield jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *experts)

    def _read(self, weight: str, shape: tuple[int, ...], dtype: str, decoded: bool) -> Any:
        """The leaf of one weight, in numpy arrays; decoded: as floats of `dtype`."""
        parts = self._parts(weight)
        if parts is None:
            return self._floats(weight, shape).astype(dtype)
        arrays = {}
        for suffix, name in parts.items():
            arrays[suffix] = whole(self._tensors[name])
            _check_finite(self._tensors[name], arrays[suffix])
        w = self._named(weight, lambda: self._layout.read(weight, arrays, shape, dtype))
        if not decoded:
            return w
        if isinstance(w, Int8Dynamic):
            w = w.base
        if isinstance(w, Quantized):
            return np.asarray(dequantize(jax.tree.map(jnp.asarray, w), jnp.dtype(dtype)))
        return w.astype(dtype)

    def _floats(self, weight: str, shape: tuple[int, ...]) -> np.ndarray:
        """A weight that is stored as it is, beside others that are in codes."""
        tensor = self._tensors[weight]
        check_float(tensor)
        if tensor.shape != shape:
            raise UserError(f"{tensor.where} has shape {tensor.shape}, expected {shape}")
        return whole(tensor)

    def _survey(self) -> set[str]:
        """The leaves that become floats; says so, and what else is not as the file has it."""
        decoded, said = set(), Counter()
        for leaf, weights in self._weights.items():
            kinds = [self._kind(weight) for weight in weights]
            why = ""
            if len({kind.codes for kind in kinds}) > 1:
                why = "the layers or experts of one weight are stored in different ways"
            why = next((kind.why for kind in kinds if not kind.codes), why)
            if not _is_linear(leaf):
                why = "here they are no linears (routers of experts, heads of scores)"
            if why:
                decoded.add(leaf)
                coded = sum(weight in self.parts for weight in weights)
                said[f"are decoded to floats: {why}"] += coded
            else:
                said.update(kind.why for kind in kinds if kind.why)
        if said:
            total, lines = len(self.parts), said.items()
            told = [f"{count} of {total} quantized weights {what}" for what, count in lines]
            log.warning("%s: %s", self._where, "; ".join(told))
        return decoded

    def _kind(self, weight: str) -> Kind:
        parts = self._parts(weight)
        if parts is None:
            return Kind("floats of the file")
        stored = {suffix: self._tensors[name] for suffix, name in parts.items()}
        return self._named(weight, lambda: self._layout.kind(weight, stored))

    def _parts(self, weight: str) -> Mapping[str, str] | None:
        return self._named(weight, partial(self._layout.parts, weight))

    def _have(self, parts: Mapping[str, str]) -> bool:
        return all(name in self._tensors for name in parts.values())

    def _named(self, what: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except UserError as error:
            raise UserError(f"{self._where}: {what}: {error}") from None


def _is_linear(leaf: str) -> bool:
    """Whether a leaf is a weight that layers take in codes: no norm, bias, router or
    head of scores."""
    inside = leaf.startswith("layers/") and leaf.endswith("/weight")
    return inside or leaf in ("embed", "head")


def _check_finite(stored: Stored, values: np.ndarray) -> None:
    """UserError for scales, or anything but codes, that are not numbers."""
    # float8 is how codes are stored; the other types are of scales, offsets and tables of values.
    scales = values.dtype.kind == "f" or values.dtype == ml_dtypes.bfloat16
    if scales and not np.isfinite(values).all():
        raise UserError(f"{stored.where} holds a NaN or an infinity: the file is corrupt")


@dataclass(frozen=True)
class Writer:
    """pack(leaf of one module) -> tensors by suffix; config: `quantization_config`. between: module
    and suffix in a tensor's name."""

    pack: Callable[[Any], Arrays]
    config: dict[str, Any]
    between: str = "."


def writer(modules: Mapping[str, Any], dtype: str) -> Writer:
    """How these leaves (by HF module; None: not quantized) are written: nf4 as bitsandbytes', the
    rest as compressed-tensors. `dtype`: of the weights that are not in codes."""
    leaves = [w for w in modules.values() if w is not None]
    if not leaves:
        raise UserError("no weight is quantized; save_hf writes such a model")
    if any(map(_is_nf4, leaves)):
        return _nf4_writer(modules, dtype)
    schemes = {
        n: None if w is None else compressed_tensors.scheme_of(w) for n, w in modules.items()
    }

    def pack(w: Any) -> Arrays:
        q = w.base if isinstance(w, Int8Dynamic) else w
        return compressed_tensors.pack(q, compressed_tensors.scheme_of(w))

    return Writer(pack, compressed_config.quantization_config(schemes))


def _nf4_writer(modules: Mapping[str, Any], dtype: str) -> Writer:
    double = {w.nested is not None for w in modules.values() if _is_nf4(w)}
    others = [name for name, w in modules.items() if w is not None and not _is_nf4(w)]
    if others or len(double) > 1:
        what = f"{others[0]} is in other codes" if others else "only some scales are in 8 bits"
        raise UserError(f"bitsandbytes' layout is of nf4 alone, in one form: {what}")
    for w in filter(_is_nf4, modules.values()):
        bitsandbytes_format.check(w)
    plain = [name for name, w in modules.items() if w is None]
    head = modules.get("lm_head") is not None
    config = bitsandbytes_format.quantization_config(double.pop(), dtype, plain, head)
    return Writer(bitsandbytes_format.pack, config)


def _is_nf4(w: Any) -> bool:
    return isinstance(w, Quantized) and w.format == "nf4"


def mxfp4_writer() -> Writer:
    """gpt-oss's layout, which holds the experts of a layer in mxfp4 and all else in floats."""
    skip = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    return Writer(mxfp4_format.pack, mxfp4_format.quantization_config(skip), "_")


def gptq_writer(config: dict[str, Any]) -> Writer:
    """GPTQ's layout for the int4 and int8 leaves of `weights.gptq`; config: that of
    `gptq_format.quantization_config`. Packing is a UserError for leaves of other bits or groups."""

    def pack(w: Any) -> Arrays:
        bits, asked = config["bits"], config["group_size"]
        if w.group != (w.shape[-1] if asked == -1 else asked):
            raise UserError(f"GPTQ: groups of {w.group}, where the config's group_size is {asked}")
        return gptq_format.pack(*gptq_format.unpack(w, bits), bits)

    return Writer(pack, config)
