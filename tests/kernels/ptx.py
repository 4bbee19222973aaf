"""A small interpreter of PTX, for the texts of `decode_cuda`: what a warp of 32 lanes computes.

Registers are uint32 arrays, one number a lane. It knows the instructions that those texts use.
"""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

LANES = np.arange(32, dtype=np.uint32)


def inline_asm(text, args, constraints, pack, dtypes, pure=True) -> list[Any]:
    """In the place of `pallas.inline_asm` with pack=2: elements go to lanes in pairs, in order."""
    assert pack == 2
    half = next((np.dtype(a.dtype) for a in args[1:]), np.dtype(dtypes[0]))
    shape, flat = args[0].shape, [np.asarray(a).reshape(-1, 32, 2) for a in args]
    outs = [np.zeros(flat[0].shape, d) for d in dtypes]
    width = np.dtype(dtypes[0]).itemsize // 2  # registers of a result
    for i in range(len(flat[0])):
        registers = {
            f"${width * len(dtypes) + j}": a[i].view(np.uint32)[:, 0] for j, a in enumerate(flat)
        }
        _run(text, registers, half)
        for e, out in enumerate(outs):
            words = np.stack([registers[f"${width * e + k}"] for k in range(width)], -1)
            out[i] = words.view(out.dtype)
    return [jnp.asarray(out.reshape(shape)) for out in outs]


def _run(text: str, registers: dict, half: np.dtype) -> None:
    def value(name: str) -> Any:
        if name in registers:
            return registers[name]
        return LANES if name == "%laneid" else np.full(32, int(name, 0) & 0xFFFFFFFF, np.uint32)

    for line in text.strip("{} ").split(";"):
        parts = re.split(r"[\s,]+", line.strip())
        if parts[0] in ("", "}", ".reg"):
            continue
        operation, to, *names = parts
        registers[to] = _compute(operation.split(".")[0], [value(n) for n in names], half)


def _compute(operation: str, v: list, half: np.dtype) -> Any:
    match operation:
        case "mov":
            return v[0]
        case "and":
            return v[0] & v[1]
        case "or":
            return v[0] | v[1]
        case "xor":
            return v[0] ^ v[1]
        case "shr":
            return v[0] >> v[1]
        case "shl":
            return v[0] << v[1]
        case "setp":
            return v[0] == v[1]
        case "selp":
            return np.where(v[2], v[0], v[1])
        case "shfl":  # segments of 16 lanes
            return v[0][(LANES & 16) | (v[1] & 15)]
        case "lop3":
            out = np.zeros(32, np.uint32)
            for i in range(8):
                terms = [x if i >> (2 - k) & 1 else ~x for k, x in enumerate(v[:3])]
                out |= np.where(v[3] >> i & 1, terms[0] & terms[1] & terms[2], 0).astype(np.uint32)
            return out
        case "prmt":
            bytes_ = np.concatenate([x[None].view(np.uint8).reshape(32, 4) for x in v[:2]], 1)
            chosen = np.stack([v[2] >> 4 * i & 15 for i in range(4)], 1)
            picked = np.take_along_axis(bytes_, chosen & 7, 1)
            signs = np.where(picked & 128, 255, 0)
            return np.where(chosen & 8, signs, picked).astype(np.uint8).view(np.uint32)[:, 0]
        case "fma":
            a, b, c = (np.ascontiguousarray(x)[:, None].view(half).astype(np.float64) for x in v)
            return (a * b + c).astype(half).view(np.uint32)[:, 0]
    raise ValueError(f"this interpreter does not know {operation}")
