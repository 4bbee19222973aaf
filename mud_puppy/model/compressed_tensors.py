"""The compressed-tensors layout of quantized linears, both ways, one module at a time, in numpy.

    int-quantized    weight int8 [out, in]; weight_scale [out, 1], [out, groups] or [1];
                     weight_zero_point int8 like the scales, where codes are not symmetric
    pack-quantized   weight_packed int32: codes + 2^(bits - 1) in consecutive bits, first lowest;
                     weight_scale; weight_shape int64 [2]; weight_zero_point packed along `out`

Which module has which is said in config.json (`compressed_config`). Source: the library's
compressors, https://github.com/vllm-project/compressed-tensors at 0.20. Floats (fp8, nvfp4, mxfp4)
are not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.weights import Int8Dynamic


@dataclass(frozen=True)
class Scheme:
    """How one module is stored.

    bits: 4 or 8. group: inputs that share a scale, or "row" or "tensor" (as `kernels.quantize`).
    activations: "none" or "int8" (dynamic, a scale each token). packed: pack-quantized.
    """

    bits: int
    group: int | str = "row"
    symmetric: bool = True
    activations: str = "none"
    packed: bool = False


def scheme_of(w: Quantized | Int8Dynamic, packed: bool | None = None) -> Scheme:
    """The scheme that a leaf is written in; UserError where the layout has none.

    packed: None packs int4 unless its activations are int8 (as llm-compressor does). vLLM runs
    weights without activations from packed ones only, int8 too.
    """
    activations = "int8" if isinstance(w, Int8Dynamic) else "none"
    q = w.base if isinstance(w, Int8Dynamic) else w
    if q.format not in ("int8", "int4") or q.minimum is not None:
        raise UserError(
            f"compressed-tensors holds int8 and int4 with scales and zero points, not {q.format}"
            + (" with minimums" if q.minimum is not None else "")
        )
    bits, group = int(q.format[3:]), q.group
    if q.scales.shape[-1] == 1:
        group = "row" if q.scales.shape[-2] == q.shape[-2] else "tensor"
    if packed is None:
        packed = bits == 4 and activations == "none"
    return Scheme(bits, group, q.zeros is None, activations, packed)


def suffixes(scheme: Scheme) -> tuple[str, ...]:
    """The tensors that stand for `{module}.weight`, without "{module}."."""
    names = ("weight_packed", "weight_scale", "weight_shape")
    names = names if scheme.packed else ("weight", "weight_scale")
    return names if scheme.symmetric else (*names, "weight_zero_point")


def pack(q: Quantized, scheme: Scheme) -> dict[str, np.ndarray]:
    """The tensors of one module [out, in], by `suffixes`; scales keep their dtype."""
    codes, offset = _codes(q), 1 << (scheme.bits - 1)
    scales = np.asarray(q.scales)
    tensors = {"weight_scale": scales.reshape(1) if scheme.group == "tensor" else scales}
    zeros = None if q.zeros is None else np.asarray(q.zeros)
    if scheme.packed:
        tensors["weight_packed"] = _pack(codes, scheme.bits)
        tensors["weight_shape"] = np.array(codes.shape, np.int64)
        if zeros is not None:
            tensors["weight_zero_point"] = _pack(zeros.T, scheme.bits).T
    else:
        tensors["weight"] = _signed(codes, offset)
        if zeros is not None:
            tensors["weight_zero_point"] = _signed(zeros, offset)
    return {name: np.ascontiguousarray(tensors[name]) for name in suffixes(scheme)}


def read(
    tensors: Mapping[str, np.ndarray], shape: tuple[int, int], scheme: Scheme, dtype: Any
) -> Quantized:
    """The inverse of `pack`, in numpy; dtype: what `dequantize` returns. UserError for tensors that
    are missing, left over, or of another shape than a weight of `shape` has."""
    out, size = shape
    if set(tensors) != set(suffixes(scheme)):
        raise UserError(f"expected {', '.join(suffixes(scheme))}; got {', '.join(sorted(tensors))}")
    groups = 1 if isinstance(scheme.group, str) else -(-size // scheme.group)
    if isinstance(scheme.group, int) and size % scheme.group:
        raise UserError(f"rows of {size} are not whole groups of {scheme.group}")
    rows = (1,) if scheme.group == "tensor" else (out, groups)
    scales = _checked(tensors, "weight_scale", rows).reshape(-1, groups)
    offset, zeros = 1 << (scheme.bits - 1), None
    if scheme.packed:
        given = _checked(tensors, "weight_shape", (2,)).tolist()
        if given != [out, size]:
            raise UserError(f"weight_shape says {given}, expected {[out, size]}")
        words = _checked(tensors, "weight_packed", (out, _words(size, scheme.bits)), np.int32)
        codes = _unpack(words, scheme.bits, size)
        if not scheme.symmetric:
            packed = _words(out, scheme.bits), groups
            words = _checked(tensors, "weight_zero_point", packed, np.int32)
            zeros = _unpack(words.T, scheme.bits, out).T
    else:
        codes = _unsigned(_checked(tensors, "weight", (out, size), np.int8), offset)
        if not scheme.symmetric:
            zeros = _unsigned(_checked(tensors, "weight_zero_point", rows, np.int8), offset)
    if scheme.bits == 8:
        return Quantized(_signed(codes, 128), scales, format="int8", dtype=np.dtype(dtype))
    if size % 2:
        raise UserError(f"rows of {size} are odd, and int4 is held in pairs")
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    return Quantized(pairs, scales, zeros, format="int4", dtype=np.dtype(dtype))


def _codes(q: Quantized) -> np.ndarray:
    """uint8 [out, in], 0 for the lowest code."""
    codes = np.asarray(q.codes)
    if q.format == "int8":
        return _unsigned(codes, 128)
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(len(codes), -1)


def _signed(codes: np.ndarray, offset: int) -> np.ndarray:
    return (codes.astype(np.int16) - offset).astype(np.int8)


def _unsigned(codes: np.ndarray, offset: int) -> np.ndarray:
    return (codes.astype(np.int16) + offset).astype(np.uint8)


def _words(n: int, bits: int) -> int:
    return -(-n * bits // 32)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, n] as int32 [rows, words]."""
    tail = -codes.shape[1] % (32 // bits)
    padded = np.pad(codes, ((0, 0), (0, tail)))
    if bits == 4:
        padded = padded[:, ::2] | (padded[:, 1::2] << 4)
    return np.ascontiguousarray(padded).view("<i4")


def _unpack(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The inverse of `_pack`."""
    codes = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return codes[:, :n]


def _checked(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: Any = None
) -> np.ndarray:
    tensor = np.asarray(tensors[name])
    if tensor.shape != shape or dtype not in (None, tensor.dtype):
        kind = "" if dtype is None else np.dtype(dtype).name
        raise UserError(
            f"{name} is {tensor.dtype.name}{list(tensor.shape)}, expected {kind}{list(shape)}"
        )
    return tensor
