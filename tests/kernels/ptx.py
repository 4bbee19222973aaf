"""A small interpreter of PTX, for the texts of `decode_cuda` and `fragment_cuda`.

Threads run in step: a register is a uint32 array with one number for each of them. It knows the
instructions that those texts use, and one shared memory, which lives on from text to text.
"""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from mud_puppy.kernels.quantized_matmul import decode_cuda, fragment_cuda

MEMORY = np.zeros(1 << 15, np.uint32)
# Where the texts' arrays in shared memory begin, in bytes.
SYMBOLS = {decode_cuda.TABLE: 0, fragment_cuda.SUMS: 1 << 16}


def inline_asm(text, args, constraints, pack, dtypes, pure=True) -> list[Any]:
    """In the place of `pallas.inline_asm`: elements go to threads in order, `pack` to each.

    A pack of 2 is run by a warp at a time; of 1, by a warp for each row of the tiles.
    """
    half = next((np.dtype(a.dtype) for a in args[1:] if a.dtype.itemsize == 2), None)
    half = half or np.dtype(dtypes[0])
    half = np.dtype(jnp.float16) if ".f16." in text else half
    half = np.dtype(jnp.bfloat16) if ".bf16" in text else half
    shape = args[0].shape
    threads = 32 if pack == 2 else args[0].size
    flat = [np.asarray(a).reshape(-1, threads, pack) for a in args]
    outs = [np.zeros(flat[0].shape, d) for d in dtypes]
    width = pack * np.dtype(dtypes[0]).itemsize // 4  # registers of a result
    for i in range(len(flat[0])):
        registers = {
            f"${width * len(dtypes) + j}": a[i].view(np.uint32)[:, 0] for j, a in enumerate(flat)
        }
        _run(text, registers, half, threads)
        for e, out in enumerate(outs):
            words = np.stack([registers[f"${width * e + k}"] for k in range(width)], -1)
            out[i] = words.view(out.dtype)
    return [jnp.asarray(out.reshape(shape)) for out in outs]


def _run(text: str, registers: dict, half: np.dtype, threads: int) -> None:
    thread = np.arange(threads, dtype=np.uint32)
    known = {"%laneid": thread % 32, "%tid.x": thread} | {
        name: np.full(threads, at, np.uint32) for name, at in SYMBOLS.items()
    }

    def value(name: str) -> Any:
        if name in registers or name in known:
            return registers[name] if name in registers else known[name]
        number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(threads, number & 0xFFFFFFFF, np.uint32)

    for line in text.split(";"):
        operation, *names = re.findall(r"[^\s,{}\[\]+]+", line) or [""]
        if operation in ("", ".reg", ".shared", "bar.sync"):
            continue
        kind = operation.split(".")
        if kind[0] in ("ld", "st"):
            load = kind[0] == "ld"
            to, *at = names if load else names[::-1] if "v4" not in kind else (names[1], names[0])
            place = sum(value(n) for n in (at if load else at[::-1])) // 4
            if load:
                registers[to] = MEMORY[place]
            else:
                for i in range(4 if "v4" in kind else 1):
                    MEMORY[place + i] = value(to)
        elif kind[0] == "mma":
            c = _product([value(n) for n in names[4:]], half)
            registers |= dict(zip(names[:4], c, strict=True))
        else:
            registers[names[0]] = _compute(kind, [value(n) for n in names[1:]], half, thread)


def _product(v: list, half: np.dtype) -> list:
    """m16n8k16: c of a[0:4], b[4:6], c[6:10]; lane 4 g + t has rows g and g + 8, column g."""

    def numbers(*words: Any) -> Any:
        pairs = np.stack(words, -1).view(half).astype(np.float32)
        return pairs.reshape(-1, 8, 4, 2 * len(words))

    b = numbers(v[4], v[5])
    out = []
    for i, a in enumerate((numbers(v[0], v[2]), numbers(v[1], v[3]))):
        c = np.stack(v[6 + 2 * i : 8 + 2 * i], -1).view(np.float32)
        c = c + np.einsum("wgtk,wntk->wgn", a, b).reshape(c.shape)
        out += [c[:, 0].view(np.uint32), c[:, 1].view(np.uint32)]
    return [np.ascontiguousarray(c) for c in out]


def _compute(kind: list[str], v: list, half: np.dtype, thread: Any) -> Any:
    def arithmetic(f: Any) -> Any:
        if "f32" in kind:
            return f(*(np.ascontiguousarray(x).view(np.float32) for x in v)).view(np.uint32)
        if "u32" in kind:
            return f(*v)
        wide = (np.ascontiguousarray(x)[:, None].view(half).astype(np.float64) for x in v)
        return f(*wide).astype(half).view(np.uint32)[:, 0]

    match kind[0]:
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
        case "add":
            return arithmetic(lambda a, b: a + b)
        case "sub":
            return arithmetic(lambda a, b: a - b)
        case "mad" | "fma":
            return arithmetic(lambda a, b, c: a * b + c)
        case "shfl" if "bfly" in kind:
            return v[0][thread ^ v[1]]
        case "shfl":  # segments of 16 lanes
            return v[0][(thread & ~np.uint32(15)) | (v[1] & 15)]
        case "lop3":
            out = np.zeros_like(v[0])
            for i in range(8):
                terms = [x if i >> (2 - k) & 1 else ~x for k, x in enumerate(v[:3])]
                out |= np.where(v[3] >> i & 1, terms[0] & terms[1] & terms[2], 0).astype(np.uint32)
            return out
        case "prmt":
            bytes_ = np.concatenate([x[:, None].view(np.uint8) for x in v[:2]], 1)
            chosen = np.stack([v[2] >> 4 * i & 15 for i in range(4)], 1)
            picked = np.take_along_axis(bytes_, chosen & 7, 1)
            signs = np.where(picked & 128, 255, 0)
            return np.where(chosen & 8, signs, picked).astype(np.uint8).view(np.uint32)[:, 0]
    raise ValueError(f"this interpreter does not know {kind[0]}")
