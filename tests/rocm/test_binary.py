"""Kernel binaries: the note, MessagePack, occupancy. The two files were made by `units.product`."""

import struct
from pathlib import Path

import pytest

from mud_puppy.rocm import binary, instructions
from mud_puppy.rocm.targets import ARCHITECTURES

BINARIES = Path(__file__).with_name("binaries")


@pytest.mark.parametrize(
    ("arch", "wave", "threads", "vgprs", "matrix"),
    [("gfx1100", 32, 128, 55, 2), ("gfx942", 64, 256, 44, 4)],
)
def test_a_real_binary_says_what_llvm_readelf_says(arch, wave, threads, vgprs, matrix):
    (kernel,) = binary.read(BINARIES / f"product_{arch}.hsaco")
    assert (kernel.name, kernel.arch, kernel.wave_size) == ("product", arch, wave)
    assert (kernel.max_threads, kernel.vgprs, kernel.agprs) == (threads, vgprs, 0)
    assert (kernel.vgpr_spills, kernel.sgpr_spills, kernel.scratch_bytes) == (0, 0, 0)
    assert kernel.lds_bytes == 0  # Triton asks for it at launch
    counts = instructions.count(kernel.code, arch)
    assert counts["matrix"] == matrix
    (loop,) = instructions.loops(kernel.code, arch)
    assert loop.inner and loop.counts["matrix"] == matrix
    assert loop.counts["narrow_lds_load"] == counts["narrow_lds_load"] > 0


def test_what_is_no_kernel_binary_is_an_error(tmp_path):
    path = tmp_path / "x.hsaco"
    path.write_bytes(b"not an ELF file")
    with pytest.raises(ValueError, match=r"x\.hsaco is no 64-bit"):
        binary.read(path)


def test_a_damaged_kernel_binary_is_an_error(tmp_path):
    whole = (BINARIES / "product_gfx1100.hsaco").read_bytes()
    path, refused = tmp_path / "x.hsaco", 0
    for at in range(16, len(whole), 53):
        for damaged in (whole[:at], whole[:at] + b"\xff" * 4 + whole[at + 4 :]):
            path.write_bytes(damaged)
            try:
                binary.read(path)
            except ValueError:  # and nothing else
                refused += 1
    assert refused > 20


def test_messagepack_types():
    packed = (
        b"\x87"  # a map of 7
        b"\xa1a\x05"  # small integer
        b"\xa1b\xff"  # -1
        b"\xa1c\xcd\x01\x00"  # 256
        b"\xa1d\xd3" + struct.pack(">q", -(2**40))  # a long one
        + b"\xa1e\x93\xc0\xc2\xc3"  # [None, False, True]
        b"\xa1f\xd9\x03abc\xc4\x02hi\xcb" + struct.pack(">d", 0.5)  # the key is bytes
    )  # fmt: skip
    packed = packed.replace(b"\x87", b"\x87", 1)
    value = binary.unpack(packed)
    assert value == {
        "a": 5, "b": -1, "c": 256, "d": -(2**40), "e": [None, False, True], "f": "abc", b"hi": 0.5
    }  # fmt: skip


def test_a_messagepack_extension_is_an_error():
    with pytest.raises(ValueError, match="0xd4"):
        binary.unpack(b"\xd4\x01\x00")


@pytest.mark.parametrize(
    ("arch", "vgprs", "threads", "lds", "waves"),
    [
        ("gfx1100", 96, 256, 0, 16),  # all that a SIMD holds
        ("gfx1100", 97, 256, 0, 12),  # 120 taken: 1536 / 120
        ("gfx1100", 256, 32, 0, 5),  # 264 taken
        ("gfx1100", 256, 256, 0, 4),  # blocks of 8 waves on 4 SIMDs
        ("gfx1100", 96, 128, 65536, 2),  # two blocks of 4 waves fill the LDS of a pair
        ("gfx90a", 128, 256, 0, 4),
        ("gfx90a", 129, 256, 0, 3),  # 136 taken
        ("gfx942", 512, 256, 0, 1),
        ("gfx942", 64, 256, 32768, 2),
        ("gfx950", 64, 256, 32768, 4),  # 33,280 taken of 163,840: four
        ("gfx942", 512, 1024, 0, 0),  # 16 waves with all registers each do not fit
    ],
)
def test_occupancy(arch, vgprs, threads, lds, waves):
    assert binary.occupancy(ARCHITECTURES[arch], vgprs, threads, lds) == waves
