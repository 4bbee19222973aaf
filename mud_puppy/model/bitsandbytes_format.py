"""The bitsandbytes layout of 4-bit linears, as transformers saves it, both ways, in numpy.

A linear `M` of weight [out, in], whose row-major elements are cut into blocks, is stored as:

    M.weight                                uint8 [n / 2, 1]   codes, the even in the high nibble
    M.weight.absmax                         float32 [blocks]; uint8 codes where doubly quantized
    M.weight.quant_map                      float32 [16]       the value of each code
    M.weight.nested_absmax                  float32 [blocks / 256, rounded up]
    M.weight.nested_quant_map               float32 [256]      the value of each absmax code
    M.weight.quant_state.bitsandbytes__nf4  uint8, JSON: block size, shape, dtype, mean of absmax

The nested ones only where doubly quantized; fp4 has a name of its own for the last. nf4 whose
blocks are whole in each row stays in codes; fp4, and blocks that run over the ends of rows, have no
leaf and are decoded. LLM.int8 is `bitsandbytes_int8`. Source: `QuantState.as_dict` of
https://github.com/bitsandbytes-foundation/bitsandbytes at 0.50.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized
from mud_puppy.kernels.formats import NESTED, NF4, dynamic_map
from mud_puppy.model.tensors import checked

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what its kernels are compiled for
TYPES = ("nf4", "fp4")


def suffixes(double: bool, type: str = "nf4") -> tuple[str, ...]:
    """The tensors that stand for `{module}.weight`, without "{module}."; the last is the state."""
    nested = ("weight.nested_absmax", "weight.nested_quant_map") if double else ()
    state = f"weight.quant_state.bitsandbytes__{type}"
    return ("weight", "weight.absmax", "weight.quant_map", *nested, state)


def check(q: Quantized) -> None:
    """UserError where the layout does not hold these codes."""
    if q.format != "nf4" or q.group not in BLOCKS:
        raise UserError(
            f"bitsandbytes holds nf4 with groups of {', '.join(map(str, BLOCKS))}, "
            f"not {q.format} with groups of {q.group}"
        )


def pack(q: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one module [out, in], by `suffixes`; UserError as of `check`."""
    check(q)
    double = q.nested is not None
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.group,
        "dtype": np.dtype(q.dtype).name,
        "shape": list(q.shape),
    }
    tensors = {
        "weight": np.asarray(q.codes).reshape(-1, 1),
        "weight.absmax": np.asarray(q.scales).reshape(-1),
        "weight.quant_map": NF4,
    }
    if double:
        tensors["weight.nested_absmax"] = np.asarray(q.nested)
        tensors["weight.nested_quant_map"] = dynamic_map()
        state |= {
            "nested_blocksize": NESTED,
            "nested_dtype": "float32",
            "nested_offset": float(np.asarray(q.offset)),
        }
    *_, name = suffixes(double)
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name: np.ascontiguousarray(tensors[name]) for name in suffixes(double)}


def why_floats(state: np.ndarray) -> str:
    """Why a weight with this state is decoded; "" for one that stays in codes."""
    given = _state(state)
    if given["quant_type"] != "nf4":
        return f"no format here has the values of bitsandbytes' {given['quant_type']}"
    if given["shape"][-1] % given["blocksize"]:
        return f"their blocks of {given['blocksize']} run over the ends of rows"
    return ""


def read(
    tensors: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: Any
) -> Quantized | np.ndarray:
    """The inverse of `pack`, in numpy; dtype: what `dequantize` returns. float32 [out, in] where
    `why_floats` says so. UserError for tensors that are missing, left over, or of another shape
    than a weight of `shape` has."""
    double = "weight.nested_absmax" in tensors
    type = next((t for t in TYPES if set(tensors) == set(suffixes(double, t))), None)
    if type is None:
        expected, given = ", ".join(suffixes(double)), ", ".join(sorted(tensors))
        raise UserError(f"expected the tensors of bitsandbytes' nf4 ({expected}); got {given}")
    name = suffixes(double, type)[-1]
    state = _state(tensors[name])
    if state["shape"] != tuple(shape):
        raise UserError(f"quant_state says shape {state['shape']}, expected {tuple(shape)}")
    if state["quant_type"] != type:
        raise UserError(f"{name} says {state['quant_type']}")
    # Its storage dtype (bnb_4bit_quant_storage) is only how the bytes are labelled.
    codes = np.ascontiguousarray(tensors["weight"]).reshape(-1).view(np.uint8)
    count = prod(shape)
    if codes.size != -(-count // 2):
        raise UserError(f"weight holds {codes.size} bytes, expected {-(-count // 2)}")
    blocks, nested = -(-count // state["blocksize"]), {}
    if double:
        nested = _nested(tensors, state, blocks)
    kind = np.uint8 if double else np.float32
    scales = checked(tensors, "weight.absmax", (blocks,), kind)
    if why_floats(tensors[name]):
        absmax = _absmax(scales, **nested) if double else scales
        values = checked(tensors, "weight.quant_map", (16,), np.float32)
        return _decoded(codes, values, np.repeat(absmax, state["blocksize"])[:count], shape)
    _check_map(tensors, "weight.quant_map", NF4)
    codes, scales = codes.reshape(shape[0], -1), scales.reshape(shape[0], -1)
    return Quantized(codes, scales, **nested, format="nf4", dtype=np.dtype(dtype))


def quantization_config(
    double: bool, dtype: str, skip: list[str], head: bool = False
) -> dict[str, Any]:
    """config.json's `quantization_config`.

    dtype: what products are computed in. skip: HF names of the linears that are stored as they are;
    a head is one of them, for a tied head is a module too, unless `head` says that it is nf4.
    """
    plain = [*skip, *(["lm_head"] if not head and "lm_head" not in skip else [])]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": plain,
    }


def check_config(config: Mapping[str, Any]) -> None:
    """UserError for a `quantization_config` of bitsandbytes that is of no 4-bit codes."""
    if not config.get("load_in_4bit"):
        raise UserError("quantization_config: neither load_in_4bit nor load_in_8bit is true")
    kind = config.get("bnb_4bit_quant_type", "fp4")  # transformers' default
    if kind not in TYPES:
        raise UserError(f"quantization_config: bitsandbytes' {kind}; {' and '.join(TYPES)} load")


def _nested(
    tensors: Mapping[str, np.ndarray], state: dict[str, Any], blocks: int
) -> dict[str, np.ndarray]:
    """`nested` and `offset` of a Quantized with doubly quantized scales."""
    if state.get("nested_blocksize") != NESTED:
        raise UserError(f"nested_blocksize is {state.get('nested_blocksize')}, not {NESTED}")
    _check_map(tensors, "weight.nested_quant_map", dynamic_map())
    absmax = checked(tensors, "weight.nested_absmax", (-(-blocks // NESTED),), np.float32)
    return {"nested": absmax, "offset": np.array(state["nested_offset"], np.float32)}


def _absmax(codes: np.ndarray, nested: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """float32 [blocks] of doubly quantized scales."""
    return dynamic_map()[codes] * np.repeat(nested, NESTED)[: codes.size] + offset


def _decoded(
    codes: np.ndarray, values: np.ndarray, scales: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """float32 [out, in] of bytes of two codes, and the scale of each element."""
    each = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)[: scales.size]
    return (values[each] * scales).reshape(shape)


def _state(tensor: np.ndarray) -> dict[str, Any]:
    try:
        state = json.loads(np.asarray(tensor).tobytes())
        kind, block = state["quant_type"], state["blocksize"]
        state["shape"] = tuple(map(int, state["shape"]))
        if "nested_blocksize" in state:
            state["nested_offset"] = float(state["nested_offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"quant_state is not the JSON of bitsandbytes ({error!r})") from None
    if kind not in TYPES or block not in BLOCKS or not state["shape"]:
        raise UserError(
            f"quant_state says {kind} in blocks of {block}; {' and '.join(TYPES)} in {BLOCKS} "
            "are read"
        )
    if not np.isfinite(state.get("nested_offset", 0.0)):
        raise UserError(f"quant_state says nested_offset {state['nested_offset']}: a corrupt file")
    return state


def _check_map(tensors: Mapping[str, np.ndarray], name: str, values: np.ndarray) -> None:
    if not np.allclose(
        checked(tensors, name, (len(values),), np.float32), values, rtol=0, atol=1e-6
    ):
        raise UserError(f"{name} is not bitsandbytes' own: codes of other values are not read")
