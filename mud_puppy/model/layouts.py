"""The layouts of quantized checkpoints, by config.json's `quant_method`: which tensors stand for a
weight, what leaf they become, and how they are read (each in its own file).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.model import (
    awq_format,
    bitsandbytes_format,
    bitsandbytes_int8,
    compressed_config,
    compressed_tensors,
    fp8_format,
    gptq_format,
    mxfp4_format,
)
from mud_puppy.model.read import whole
from mud_puppy.model.tensors import Stored
from mud_puppy.weights import int8_dynamic

Arrays = dict[str, np.ndarray]
Config = Mapping[str, Any]
Names = Collection[str]
Parts = dict[str, str]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """What the tensors of one weight become. codes: in words, alike for leaves that can be stacked;
    "" where they are floats. why: it is floats, or what of the file is not read; for the log."""

    codes: str
    why: str = ""


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint stores its weights.

    parts(HF weight): the names of the tensors that stand for it, by suffix, or None where it is
    stored as it is. kind(weight, tensors by suffix). read(weight, arrays by suffix, shape, dtype):
    the leaf in numpy arrays, or float32 where it is floats. fused: one weight holds all experts and
    has the shape [E, out, in]; else each is one of [out, in].
    """

    parts: Callable[[str], Parts | None]
    kind: Callable[[str, Mapping[str, Stored]], Kind]
    read: Callable[[str, Arrays, Shape, Any], Any]
    fused: bool = False


def layout(config: Config, names: Names) -> Layout:
    """The layout of the checkpoint with this `quantization_config` and these tensors; UserError for
    one that is not read."""
    method = config.get("quant_method")
    if method not in _LAYOUTS:
        raise UserError(
            f"the checkpoint is quantized ({method or 'unknown'}); layouts that load: "
            f"{', '.join(_LAYOUTS)}. Load the unquantized model instead"
        )
    return _LAYOUTS[method](config, names)


def _gptq(config: Config, names: Names) -> Layout:
    gptq_format.check_config(config)
    *needed, index = gptq_format.SUFFIXES

    def parts(weight: str) -> Parts | None:
        module = _module(weight)
        if f"{module}.qweight" not in names:
            return None
        return _join(module, (*needed, index) if f"{module}.{index}" in names else needed)

    def kind(weight: str, tensors: Mapping[str, Stored]) -> Kind:
        groups = (*tensors["scales"].shape, 0)[0]
        if groups and index in tensors:
            why = gptq_format.why_floats(whole(tensors[index]), groups)
            if why:
                return Kind("", why)
        zeros = gptq_format.has_zeros(config, whole(tensors["qzeros"]))
        return Kind(f"{config['bits']} bits, {groups} groups, zero points: {zeros}")

    def read(weight: str, arrays: Arrays, shape: Shape, dtype: Any) -> Any:
        return gptq_format.read(arrays, (shape[0], shape[1]), config, dtype)

    return Layout(parts, kind, read)


def _awq(config: Config, names: Names) -> Layout:
    awq_format.check_config(config)

    def parts(weight: str) -> Parts | None:
        module = _module(weight)
        return _join(module, awq_format.SUFFIXES) if f"{module}.qweight" in names else None

    def kind(weight: str, tensors: Mapping[str, Stored]) -> Kind:
        return Kind("4 bits with zero points")

    def read(weight: str, arrays: Arrays, shape: Shape, dtype: Any) -> Any:
        return awq_format.read(arrays, (shape[0], shape[1]), config, dtype)

    return Layout(parts, kind, read)


def _compressed(config: Config, names: Names) -> Layout:
    scheme_for = cache(partial(compressed_config.scheme_for, config))

    def parts(weight: str) -> Parts | None:
        module = _module(weight)
        if (scheme := scheme_for(module)) is None:
            return None
        extras = [name for name in compressed_tensors.EXTRAS if f"{module}.{name}" in names]
        return _join(module, [*compressed_tensors.suffixes(scheme), *extras])

    def kind(weight: str, tensors: Mapping[str, Stored]) -> Kind:
        scheme = scheme_for(_module(weight))
        assert scheme is not None, weight
        given, codes = scheme.unrounded, repr(replace(scheme, unrounded=""))
        return Kind(codes, f"keep their codes, with inputs as they are ({given})" if given else "")

    def read(weight: str, arrays: Arrays, shape: Shape, dtype: Any) -> Any:
        scheme = scheme_for(_module(weight))
        assert scheme is not None, weight
        q = compressed_tensors.read(arrays, (shape[0], shape[1]), scheme, dtype)
        return q if scheme.activations == "none" else int8_dynamic(q)

    return Layout(parts, kind, read)


def _fp8(config: Config, names: Names) -> Layout:
    scheme = fp8_format.scheme(config)

    def parts(weight: str) -> Parts | None:
        module = _module(weight)
        found = [s for s in (*fp8_format.SCALES, *fp8_format.EXTRAS) if f"{module}.{s}" in names]
        return _join(module, ["weight", *found]) if {*fp8_format.SCALES} & {*found} else None

    def kind(weight: str, tensors: Mapping[str, Stored]) -> Kind:
        return Kind(repr(scheme), f"keep their codes, with inputs as they are ({scheme.unrounded})")

    def read(weight: str, arrays: Arrays, shape: Shape, dtype: Any) -> Any:
        return fp8_format.read(arrays, (shape[0], shape[1]), scheme, dtype)

    return Layout(parts, kind, read)


def _bitsandbytes(config: Config, names: Names) -> Layout:
    if config.get("load_in_8bit"):
        return _bitsandbytes_int8(names)
    bitsandbytes_format.check_config(config)

    def parts(weight: str) -> Parts | None:
        module = _module(weight)
        if f"{module}.weight.absmax" not in names:
            return None
        double = f"{module}.weight.nested_absmax" in names
        for type in bitsandbytes_format.TYPES:
            *others, state = bitsandbytes_format.suffixes(double, type)
            if f"{module}.{state}" in names:
                return _join(module, [*others, state])
        return _join(module, bitsandbytes_format.suffixes(double))

    def kind(weight: str, tensors: Mapping[str, Stored]) -> Kind:
        *others, state = tensors
        why = bitsandbytes_format.why_floats(whole(tensors[state]))
        return Kind("", why) if why else Kind(f"nf4 {others} {tensors[others[1]].shape}")

    def read(weight: str, arrays: Arrays, shape: Shape, dtype: Any) -> Any:
        return bitsandbytes_format.read(arrays, (shape[0], shape[1]), dtype)

    return Layout(parts, kind, read)


def _bitsandbytes_int8(names: Names) -> Layout:
    *needed, order = bitsandbytes_int8.SUFFIXES

    def parts(weight: str) -> Parts | None:
        module = _module(weight)
        if f"{module}.SCB" not in names:
            return None
        return _join(module, [*needed, order] if f"{module}.{order}" in names else needed)

    def kind(weight: str, tensors: Mapping[str, Stored]) -> Kind:
        return Kind("int8 rows")

    def read(weight: str, arrays: Arrays, shape: Shape, dtype: Any) -> Any:
        return bitsandbytes_int8.read(arrays, (shape[0], shape[1]), dtype)

    return Layout(parts, kind, read)


def _mxfp4(config: Config, names: Names) -> Layout:
    def parts(weight: str) -> Parts | None:
        found = f"{weight}_{mxfp4_format.SUFFIXES[0]}" in names
        return _join(weight, mxfp4_format.SUFFIXES, "_") if found else None

    def kind(weight: str, tensors: Mapping[str, Stored]) -> Kind:
        return Kind("mxfp4")

    def read(weight: str, arrays: Arrays, shape: Shape, dtype: Any) -> Any:
        return mxfp4_format.read(arrays, shape, dtype)

    return Layout(parts, kind, read, fused=True)


_LAYOUTS = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _join(start: str, suffixes: Iterable[str], joint: str = ".") -> Parts:
    return {suffix: f"{start}{joint}{suffix}" for suffix in suffixes}
