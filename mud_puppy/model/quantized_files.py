"""Quantized checkpoints: which layout one is in, and how its modules become leaves and back.

config.json's `quantization_config` names the layout; the tensors that stand for a `{module}.weight`
are known to the layout's own file (`gptq_format`, `compressed_tensors`, `bitsandbytes_format`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.model import bitsandbytes_format, compressed_config, compressed_tensors, gptq_format
from mud_puppy.model.read import whole
from mud_puppy.model.tensors import Stored
from mud_puppy.weights import Int8Dynamic, int8_dynamic

Arrays = dict[str, np.ndarray]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """suffixes(module): the tensors that stand for `{module}.weight`, without "{module}.", or None
    where it is stored as it is. read(module, tensors by suffix, shape, dtype): the leaf."""

    suffixes: Callable[[str], tuple[str, ...] | None]
    read: Callable[[str, Arrays, tuple[int, ...], Any], Any]


def take_config(config: Any) -> Config | None:
    """The `quantization_config` of a transformers config, which is then the unquantized model's."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        del config.quantization_config
    return found


def layout(config: Config, names: Collection[str]) -> Layout:
    """The layout of the checkpoint with this `quantization_config` and these tensors; UserError for
    one that is not read."""
    method = config.get("quant_method")
    if method not in _LAYOUTS:
        raise UserError(
            f"the checkpoint is quantized ({method or 'unknown'}); layouts that load: "
            f"{', '.join(_LAYOUTS)}. Load the unquantized model instead"
        )
    return _LAYOUTS[method](config, names)


def _gptq(config: Config, names: Collection[str]) -> Layout:
    gptq_format.check_config(config)

    def suffixes(module: str) -> tuple[str, ...] | None:
        if f"{module}.qweight" not in names:
            return None
        *needed, index = gptq_format.SUFFIXES
        return (*needed, index) if f"{module}.{index}" in names else tuple(needed)

    def read(module: str, tensors: Arrays, shape: tuple[int, ...], dtype: Any) -> Any:
        return gptq_format.read(tensors, (shape[0], shape[1]), config, dtype)

    return Layout(suffixes, read)


def _compressed(config: Config, names: Collection[str]) -> Layout:
    scheme_for = partial(compressed_config.scheme_for, config)

    def suffixes(module: str) -> tuple[str, ...] | None:
        scheme = scheme_for(module)
        return None if scheme is None else compressed_tensors.suffixes(scheme)

    def read(module: str, tensors: Arrays, shape: tuple[int, ...], dtype: Any) -> Any:
        scheme = scheme_for(module)
        assert scheme is not None, module
        q = compressed_tensors.read(tensors, (shape[0], shape[1]), scheme, dtype)
        return q if scheme.activations == "none" else int8_dynamic(q)

    return Layout(suffixes, read)


def _bitsandbytes(config: Config, names: Collection[str]) -> Layout:
    bitsandbytes_format.check_config(config)

    def suffixes(module: str) -> tuple[str, ...] | None:
        if f"{module}.weight.absmax" not in names:
            return None
        return bitsandbytes_format.suffixes(f"{module}.weight.nested_absmax" in names)

    def read(module: str, tensors: Arrays, shape: tuple[int, ...], dtype: Any) -> Any:
        return bitsandbytes_format.read(tensors, (shape[0], shape[1]), dtype)

    return Layout(suffixes, read)


_LAYOUTS = {"gptq": _gptq, "compressed-tensors": _compressed, "bitsandbytes": _bitsandbytes}


class Codes:
    """What of a checkpoint is in codes: by leaf of the params tree, and by HF tensor.

    `parts`: the tensors that stand for each weight. UserError, in the name of `where`, for a layout
    that is not read, missing tensors, and layers of one stack that are stored in different ways.
    """

    def __init__(
        self, where: Path, config: Config, names: dict[str, list[str]], tensors: dict[str, Stored]
    ) -> None:
        self._where, self._tensors = where, tensors
        self._layout = self._named("config", lambda: layout(config, tensors))
        self.parts: dict[str, list[str]] = {}
        self._modules: dict[str, list[str]] = {}
        for leaf, weights in names.items():
            if leaf not in ("embed", "head") and not leaf.endswith("/weight"):
                continue  # norms and biases
            modules = [name.removesuffix(".weight") for name in weights]
            found = [self._named(module, partial(self._suffixes, module)) for module in modules]
            if not any(found):
                continue
            if not all(found):
                plain, coded = modules[found.index(None)], modules[[*map(bool, found)].index(True)]
                raise UserError(
                    f"{where}: {coded} is quantized and {plain} is not; such mixtures do not load"
                )
            self._modules[leaf] = modules
            for module, weight, suffixes in zip(modules, weights, found, strict=True):
                self.parts[weight] = [f"{module}.{suffix}" for suffix in suffixes]
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

    def holds(self, leaf: str) -> bool:
        return leaf in self._modules

    def read(self, leaf: str, shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
        """The leaf of each layer [out, in] of a stack of this shape, or the one."""
        for module in self._modules[leaf]:
            suffixes = self._suffixes(module) or ()
            arrays = {suffix: whole(self._tensors[f"{module}.{suffix}"]) for suffix in suffixes}
            make = partial(self._layout.read, module, arrays, shape[-2:], dtype)
            yield jax.tree.map(jnp.asarray, self._named(module, make))

    def _suffixes(self, module: str) -> tuple[str, ...] | None:
        return self._layout.suffixes(module)

    def _named(self, what: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except UserError as error:
            raise UserError(f"{self._where}: {what}: {error}") from None


@dataclass(frozen=True)
class Writer:
    """pack(leaf of one module) -> tensors by suffix; config: `quantization_config`."""

    pack: Callable[[Any], Arrays]
    config: dict[str, Any]


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


def gptq_writer(config: dict[str, Any]) -> Writer:
    """GPTQ's layout for the int4 and int8 leaves of `weights.gptq`; config: that of
    `gptq_format.quantization_config`. Packing is a UserError for leaves of other bits or groups."""

    def pack(w: Any) -> Arrays:
        bits, asked = config["bits"], config["group_size"]
        if w.group != (w.shape[-1] if asked == -1 else asked):
            raise UserError(f"GPTQ: groups of {w.group}, where the config's group_size is {asked}")
        return gptq_format.pack(*gptq_format.unpack(w, bits), bits)

    return Writer(pack, config)
