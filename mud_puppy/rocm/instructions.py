"""Walk the machine code of RDNA3, RDNA4 and CDNA2-4 kernels: lengths, kinds, loops.

No disassembler: an instruction's first word tells its encoding, which fixes its length but for a
literal or a DPP word that follows, and a few opcodes are told apart, those by which a kernel is
judged. Encodings: AMD's ISA references "RDNA3", "RDNA4", "MI200", "MI300", "MI350"
(https://gpuopen.com/amd-gpu-architecture-programming-documentation/). Code of compute kernels only.
"""

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MATRIX, NARROW_LOAD, NARROW_STORE = "matrix", "narrow_lds_load", "narrow_lds_store"
LDS, VECTOR, SCALAR = "lds", "vector", "scalar"
MEMORY, SCRATCH, BRANCH, OTHER = "memory", "scratch", "branch", "other"


@dataclass(frozen=True)
class Instruction:
    """`at` and `target` (of a branch) are byte offsets in the kernel's code."""

    at: int
    size: int
    kind: str
    target: int | None = None


@dataclass(frozen=True)
class Loop:
    """The instructions from a backward branch's target to the branch. `depth` loops are around it;
    an `inner` one holds no other."""

    start: int
    end: int
    counts: Counter[str]
    depth: int
    inner: bool

    def holds(self, other: "Loop") -> bool:
        return self != other and self.start <= other.start and other.end <= self.end


def walk(code: bytes, arch: str) -> Iterator[Instruction]:
    """The instructions of a kernel, in order of address, up to the padding after its end.

    Raises ValueError on a word that begins no known encoding.
    """
    decode = _decoder(arch)
    words = (*struct.unpack(f"<{len(code) // 4}I", code[: len(code) & ~3]), 0, 0)
    at, end = 0, len(code) // 4
    while at < end:
        size, kind = decode(words, at)
        target = None
        if kind == BRANCH:
            distance = (words[at] & 0xFFFF ^ 0x8000) - 0x8000
            target = 4 * (at + 1 + distance)
        yield Instruction(4 * at, 4 * size, kind, target)
        at += size


def count(code: bytes, arch: str) -> Counter[str]:
    """Instructions of each kind."""
    return Counter(i.kind for i in walk(code, arch))


def loops(code: bytes, arch: str) -> list[Loop]:
    """The loops of a kernel by start.

    Branches back to one place make one loop. So do those whose spans cross: compilers place parts
    of a loop's body before its head.
    """
    whole = list(walk(code, arch))
    ends: dict[int, int] = {}
    for i in whole:
        if i.target is not None and i.target <= i.at:
            ends[i.target] = max(ends.get(i.target, 0), i.at + i.size)
    spans: list[tuple[int, int]] = []
    for start, end in sorted(ends.items()):
        crossed = [span for span in spans if span[0] < start < span[1] < end]
        spans = [span for span in spans if span not in crossed]
        spans.append((min([start, *(s for s, _ in crossed)]), end))
    found = []
    for start, end in sorted(spans):
        others = [span for span in spans if span != (start, end)]
        counts = Counter(i.kind for i in whole if start <= i.at < end)
        depth = sum(s <= start and end <= e for s, e in others)
        inner = not any(start <= s and e <= end for s, e in others)
        found.append(Loop(start, end, counts, depth, inner))
    return found


# (size in words, kind) of the instruction at words[at].
Decoder = Callable[[tuple[int, ...], int], tuple[int, str]]


def _decoder(arch: str) -> Decoder:
    if arch.startswith("gfx9"):
        return _decode_cdna
    if arch.startswith("gfx12"):
        return _decode_rdna4
    if arch.startswith("gfx11"):
        return _decode_rdna3
    raise ValueError(f"the instructions of {arch} are not known here")


LITERAL = 255
_LDS_RDNA = {31: NARROW_STORE, 161: NARROW_STORE, 30: NARROW_STORE, 160: NARROW_STORE} | {
    op: NARROW_LOAD for op in (57, 58, 59, 60, *range(162, 168))
}
_LDS_CDNA = {31: NARROW_STORE, 85: NARROW_STORE, 30: NARROW_STORE, 84: NARROW_STORE} | {
    op: NARROW_LOAD for op in (57, 58, 59, 60, *range(86, 92))
}


def _scalar(word: int, long_literal: int, branches: range) -> tuple[int, str] | None:
    """SOP1, SOP2, SOPC, SOPK, SOPP; `long_literal`: the SOPK opcode that carries a word."""
    if word >> 30 != 0b10:
        return None
    top = word >> 23
    if top == 0b101111111:
        return 1, BRANCH if (word >> 16 & 127) in branches else SCALAR
    if top == 0b101111101:
        return 1 + (word & 255 == LITERAL), SCALAR
    if word >> 28 == 0b1011 and top != 0b101111110:
        return 1 + (word >> 23 & 31 == long_literal), SCALAR
    return 1 + (LITERAL in (word & 255, word >> 8 & 255)), SCALAR


def _vector_short(word: int, extended: tuple[int, ...], with_word: tuple[int, ...]):
    """VOP1, VOP2, VOPC. `extended`: values of src0 that mean that another word follows (literal,
    DPP, SDWA); `with_word`: opcodes of VOP2 that always carry a constant."""
    short = word >> 25 in (0b0111111, 0b0111110)
    constant = not short and (word >> 25 & 63) in with_word
    return 1 + (constant or word & 511 in extended), VECTOR


_EXTENDED_RDNA = (LITERAL, 233, 234, 250)
_EXTENDED_CDNA = (LITERAL, 249, 250)


def _vector_long_rdna(words: tuple[int, ...], at: int) -> int:
    """VOP3 and VOP3P: two words, and a literal or DPP word."""
    word = words[at + 1]
    sources = word & 511, word >> 9 & 511, word >> 18 & 511
    return 2 + (LITERAL in sources or sources[0] in _EXTENDED_RDNA[1:])


def _dual(words: tuple[int, ...], at: int) -> int:
    """VOPD: two operations, then a literal if either uses one (fmaak and fmamk, 1 and 2, do)."""
    x, y = words[at], words[at + 1]
    operations = x >> 22 & 15, x >> 17 & 31
    sources = x & 511, y & 511
    return 2 + (LITERAL in sources or bool({1, 2} & set(operations)))


def _matrix_rdna(word: int) -> str:
    # v_wmma_* from 0x40, sparse v_swmmac_* from 0x50
    return MATRIX if 0x40 <= word >> 16 & 127 <= 0x5A else VECTOR


def _decode_rdna(words: tuple[int, ...], at: int) -> tuple[int, str] | None:
    """What RDNA3 and RDNA4 have in common."""
    word = words[at]
    if not word >> 31:
        return _vector_short(word, _EXTENDED_RDNA, (44, 45, 55, 56))
    if word >> 30 == 0b10:
        constant = word >> 23 in (0b101000101, 0b101000110)  # s_fmaak_f32, s_fmamk_f32
        found = _scalar(word, long_literal=19, branches=range(32, 39))
        return (2, SCALAR) if constant else found
    match word >> 26:
        case 0b110101:
            return _vector_long_rdna(words, at), VECTOR
        case 0b110010:
            return _dual(words, at), VECTOR
        case 0b110011:
            if word >> 24 == 0b11001100:
                return _vector_long_rdna(words, at), _matrix_rdna(word)
        case 0b111101:
            return 2, SCALAR
        case 0b110110:
            return 2, _LDS_RDNA.get(word >> 18 & 255, LDS)
    return None


def _decode_rdna3(words: tuple[int, ...], at: int) -> tuple[int, str]:
    word = words[at]
    match word >> 26:
        case 0b110111:
            return 2, SCRATCH if word >> 16 & 3 == 1 else MEMORY
        case 0b111000 | 0b111010:
            return 2, MEMORY
    return _decode_rdna(words, at) or _unknown(word, at)


def _decode_rdna4(words: tuple[int, ...], at: int) -> tuple[int, str]:
    word = words[at]
    match word >> 26:
        case 0b111011:
            return 3, SCRATCH if word >> 24 & 3 == 1 else MEMORY
        case 0b110001:
            return 3, MEMORY
    return _decode_rdna(words, at) or _unknown(word, at)


def _decode_cdna(words: tuple[int, ...], at: int) -> tuple[int, str]:
    word = words[at]
    if not word >> 31:
        return _vector_short(word, _EXTENDED_CDNA, (23, 24, 36, 37))
    if word >> 30 == 0b10:
        return _scalar(word, long_literal=20, branches=range(2, 10)) or _unknown(word, at)
    match word >> 26:
        case 0b110100:
            if word >> 23 != 0b110100111:
                return 2, VECTOR
            scaled = word >> 16 & 127 == 0x2C  # its scales stand before the f8f6f4 product
            return (4, MATRIX) if scaled else (2, _matrix_cdna(word))
        case 0b110000:
            return 2, SCALAR
        case 0b110110:
            return 2, _LDS_CDNA.get(word >> 17 & 255, LDS)
        case 0b110111:
            return 2, SCRATCH if word >> 14 & 3 == 1 else MEMORY
        case 0b111000 | 0b111010:
            return 2, MEMORY
    return _unknown(word, at)


def _matrix_cdna(word: int) -> str:
    """v_mfma_* and v_smfmac_*; not the moves to and from accumulators (0x58, 0x59).

    CDNA4 added some below 0x40: f8f6f4 (0x2d, 0x2e) and 0x35-0x3f.
    """
    op = word >> 16 & 127
    added = op in (0x2D, 0x2E) or 0x35 <= op < 0x40
    return MATRIX if added or (op >= 0x40 and op not in (0x58, 0x59)) else VECTOR


def _unknown(word: int, at: int) -> tuple[int, str]:
    raise ValueError(f"no known instruction begins with {word:#010x} (byte {4 * at} of the code)")
