"""The GPTQ layout of AutoGPTQ, gptqmodel, vLLM and transformers, both ways, in numpy.

A linear `M` of weight [out, in] is stored without `M.weight`, as SUFFIXES of `M` (a bias stays):

    qweight  int32 [in * bits / 32, out]   codes of one output: a stream of bits down the rows, the
                                           lowest first (3 bits run over the ends of words)
    qzeros   int32 [G, out * bits / 32]    zero points, the same along a row, each less one
    scales   float16 [G, out]
    g_idx    int32 [in]                    the group of each input; absent in old files: i // group

"Less one" is version 1 (`checkpoint_format` "gptq"), which everything reads; "gptq_v2" stores zero
points as they are. Readers of version 1 add the one to packed words, so a zero point of 0 cannot be
written (it would borrow from its neighbour): `weights.gptq` makes none.
"""

from collections.abc import Mapping
from math import gcd
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.kernels.formats import swap_nibbles
from mud_puppy.weights.gptq import BITS

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_FORMATS = ("gptq", "gptq_v2")


def pack(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int
) -> dict[str, np.ndarray]:
    """The tensors of one linear, by suffix.

    codes uint8 [out, in]; scales float [out, G]; zeros uint8 [out, G] in 1..2^bits - 1, or None for
    2^(bits - 1). UserError where `in` or `out` does not fill words, a zero point is 0, or a scale
    is no float16.
    """
    out, n = codes.shape
    check_shape((out, n), bits)
    if zeros is None:
        zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    if not zeros.all():
        raise UserError("GPTQ files hold no zero point of 0: quantize with zero points from 1")
    if not (scales <= np.finfo(np.float16).max).all():
        raise UserError(f"GPTQ: a scale of {scales.max()} is too large for float16")
    groups = scales.shape[1]
    return {
        "qweight": _to_words(codes.T, bits),
        "qzeros": np.ascontiguousarray(_to_words(zeros - 1, bits).T),
        "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
        "g_idx": np.arange(n, dtype=np.int32) // (n // groups),
    }


def unpack(leaf: Quantized, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """codes, scales and zeros that `weights.gptq.to_quantized` made a leaf of (not stacked).
    UserError for a leaf of other codes than of these bits."""
    own = {"int8": 8, "int4": 4}.get(leaf.format)
    found = _unpack(leaf)
    if (found[2] is None and bits != own) or found[0].max() >> bits:
        raise UserError(f"GPTQ: the weights are {leaf.format} codes, not codes of {bits} bits")
    return found


def _unpack(leaf: Quantized) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    codes, scales = np.asarray(leaf.codes), np.asarray(leaf.scales, np.float32)
    zeros = None if leaf.zeros is None else np.asarray(leaf.zeros)
    if leaf.format == "int8":
        return (
            codes.view(np.uint8) ^ 128,
            scales,
            None if zeros is None else zeros.view(np.uint8) ^ 128,
        )
    if leaf.format != "int4" or leaf.minimum is not None:
        raise UserError(f"GPTQ holds int4 and int8 with zero points, not {leaf.format}")
    both = np.stack([codes >> 4, codes & 15], axis=-1)
    return both.reshape(*codes.shape[:-1], -1), scales, zeros


def why_floats(index: np.ndarray, groups: int) -> str:
    """Why a weight with this g_idx is decoded; "" for one that stays in codes."""
    if index.ndim != 1 or _ordered(index, groups):
        return ""  # a shape that does not fit is `read`'s to name
    return "their groups are not in the order of the inputs (GPTQ's desc_act without static groups)"


def has_zeros(config: Mapping[str, Any], qzeros: np.ndarray) -> bool:
    """Whether the leaf holds zero points: always, unless all are the middle by the config and in
    the file."""
    bits = int(config["bits"])
    fits = qzeros.ndim == 2 and qzeros.dtype == np.int32 and not qzeros.shape[1] % _words(bits)
    if not config.get("sym", True) or not fits:  # what does not fit is `read`'s to name
        return True
    return bool((_zeros(config, qzeros) != 1 << (bits - 1)).any())


def read(
    tensors: Mapping[str, np.ndarray], shape: tuple[int, int], config: Mapping[str, Any], dtype: Any
) -> Quantized | np.ndarray:
    """The weight [out, in] of the tensors of one linear (by suffix), of a `quantization_config`;
    dtype: what `dequantize` returns.

    float32 [out, in] where `why_floats` says so. UserError for shapes that do not fit.
    """
    bits, groups = int(config["bits"]), _groups(tensors["scales"])
    out, n = shape
    check_shape((out, n), bits)
    expected = {
        "qweight": (n * bits // 32, out),
        "qzeros": (groups, out * bits // 32),
        "scales": (groups, out),
        "g_idx": (n,),
    }
    for suffix, size in expected.items():
        if suffix not in tensors:
            continue
        if suffix != "scales" and tensors[suffix].dtype != np.int32:
            raise UserError(f"GPTQ tensor '{suffix}' is {tensors[suffix].dtype.name}, not int32")
        if tensors[suffix].shape != size:
            raise UserError(
                f"GPTQ tensor '{suffix}' has shape {tensors[suffix].shape}, but a weight "
                f"{shape} of {bits} bits in {groups} groups says {size}"
            )
    zeros = _zeros(config, tensors["qzeros"])
    scales = np.ascontiguousarray(tensors["scales"].T.astype(np.float32))
    index = tensors.get("g_idx", np.arange(n) // -(-n // groups))
    if n % groups or not _ordered(index, groups):
        if index.min() < 0 or index.max() >= groups:
            raise UserError(f"GPTQ tensor 'g_idx' names group {index.max()} of {groups}")
        codes = _from_words(tensors["qweight"], bits).T
        return (codes.astype(np.float32) - zeros[:, index]) * scales[:, index]
    stored = zeros if has_zeros(config, tensors["qzeros"]) else None
    if bits == 8:
        # As `weights.gptq.to_quantized`, in numpy: both lowered by 128.
        codes = (_bytes(tensors["qweight"]) ^ 128).view(np.int8)
        own = None if stored is None else (stored ^ 128).view(np.int8)
        return Quantized(codes, scales, own, format="int8", dtype=np.dtype(dtype))
    if stored is None and bits < 4:  # int4 without zero points means 8
        stored = zeros
    return Quantized(
        _pairs(tensors["qweight"], bits), scales, stored, format="int4", dtype=np.dtype(dtype)
    )


def _zeros(config: Mapping[str, Any], qzeros: np.ndarray) -> np.ndarray:
    """uint8 [out, G]"""
    bits = int(config["bits"])
    zeros = _from_words(qzeros.T, bits)
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return zeros


def _groups(scales: np.ndarray) -> int:
    if scales.ndim != 2 or not scales.size:
        raise UserError(f"GPTQ tensor 'scales' has shape {scales.shape}, not (groups, outputs)")
    return scales.shape[0]


def _ordered(index: np.ndarray, groups: int) -> bool:
    n = len(index)
    return not n % groups and bool((index == np.arange(n) // (n // groups)).all())


def _bytes(words: np.ndarray) -> np.ndarray:
    """uint8 [out, bytes], the inputs of each output in order: words are transposed, not codes."""
    return np.ascontiguousarray(words.T.astype("<i4")).view(np.uint8)


def _pairs(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [out, in / 2], int4's two a byte, of qweight."""
    if bits == 4:
        return swap_nibbles(_bytes(words))
    codes = _from_words(words, bits).T
    return np.ascontiguousarray((codes[:, ::2] << 4) | codes[:, 1::2])


def check_shape(shape: tuple[int, int], bits: int) -> None:
    """UserError unless a weight [out, in] fills 32-bit words on both sides, as `pack` needs."""
    need = 32 // gcd(bits, 32)
    for what, size in zip(("outputs", "inputs"), shape, strict=True):
        if size % need:
            raise UserError(
                f"GPTQ: {size} {what} do not fill 32-bit words of {bits} bits; they must be a "
                f"multiple of {need}"
            )


def check_config(config: Mapping[str, Any]) -> None:
    """UserError for a `quantization_config` that `read` does not understand."""
    if config.get("quant_method") != "gptq":
        raise UserError(f"quantization_config: {config.get('quant_method')} is not gptq")
    if config.get("bits") not in BITS:
        raise UserError(f"quantization_config: {config.get('bits')} bits; GPTQ has 2, 3, 4 and 8")
    if (format := config.get("checkpoint_format", "gptq")) not in _FORMATS:
        raise UserError(
            f"quantization_config: checkpoint_format '{format}'; formats that load: "
            f"{', '.join(_FORMATS)}"
        )
    if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise UserError(f"quantization_config: pack_dtype {config['pack_dtype']}; only int32 loads")
    # "-:" names modules that are not quantized, which their tensors say too.
    if any(not str(key).startswith("-:") for key in config.get("dynamic") or ()):
        raise UserError("quantization_config: modules with bits of their own (dynamic) do not load")


def quantization_config(
    bits: int,
    group: int | str,
    symmetric: bool,
    act_order: bool,
    damp: float,
    awq: bool = False,
    clip: bool = False,
) -> dict[str, Any]:
    """For config.json's `quantization_config`, and all of quantize_config.json."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": -1 if group == "row" else group,
        "sym": symmetric,
        # Groups are static, so that the files are in the order of the inputs whatever the order of
        # the pass was; with true, loaders would choose slower kernels to look up g_idx.
        "desc_act": False,
        "static_groups": act_order,
        "true_sequential": True,
        "damp_percent": damp,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": ["mud_puppy"],
            "act_order": act_order,
            "awq_scales": awq,
            "clip": clip,
        },
    }


def _words(bits: int) -> int:
    """The fewest words that whole codes fill."""
    return bits // gcd(bits, 32)


def _to_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n * bits / 32, m]: the codes [n, m] of each column as a stream of bits."""
    period, count = 32 // gcd(bits, 32), _words(bits)
    codes = codes.reshape(-1, period, codes.shape[1])
    words = np.zeros((len(codes), count, codes.shape[2]), np.uint32)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        code = codes[:, i].astype(np.uint32)
        words[:, word] |= code << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= code >> np.uint32(32 - shift)
    return words.reshape(-1, codes.shape[2]).view(np.int32)


def _from_words(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_to_words`, uint8 [n, m]."""
    period, count = 32 // gcd(bits, 32), _words(bits)
    words = np.ascontiguousarray(words).view(np.uint32).reshape(-1, count, words.shape[1])
    codes = np.empty((len(words), period, words.shape[2]), np.uint8)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            code |= words[:, word + 1] << np.uint32(32 - shift)
        codes[:, i] = code & np.uint32((1 << bits) - 1)
    return codes.reshape(-1, words.shape[2])
