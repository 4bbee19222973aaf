"""The walker on instructions assembled one by one (bytes by llvm-mc 22), and on small loops."""

import pytest

from mud_puppy.rocm import instructions
from mud_puppy.rocm.instructions import walk

RDNA = """
v_add_f32 v1, v2, v3                   vector 02070206
v_add_f32 v1, literal, v3              vector ff060206db0f4940
v_add_f32_dpp row_ror                  vector fa060206022401ff
v_add_f32_dpp8                         vector e906020602773905
v_fmaak_f32                            vector 0207025adb0f4940
v_fmamk_f32                            vector 02070258db0f4940
v_fmaak_f16                            vector 0207027034120000
v_mov_b32 v1, literal                  vector ff02027e45230100
v_mov_b32 v1, 1.0                      vector f202027e
v_cmp_gt_u32 vcc_lo, literal, v0       vector ff00987ce1000000
v_cmp_gt_u32_e64 s0, literal, v0       vector 00004cd4ff000200e1000000
v_fma_f32                              vector 010013d602071204
v_fma_f32 with a literal               vector 010013d602ff1104db0f4940
v_add_f32_e64_dpp                      vector 018003d5fa060200022401ff
v_fma_f32_e64_dpp8                     vector 010013d6e906120402773905
v_mad_u64_u32                          vector 007cfed602071204
v_pk_fma_f16                           vector 01400ecc0207121c
v_dual_mov_b32 :: v_dual_mov_b32       vector 020110ca03010001
v_dual_mul_f32 literal, both           vector ff04c6c8ff0a0001abaa2a3e
v_dual_fmaak_f32 :: v_dual_mov_b32     vector 020950c805010001abaa2a3e
v_dual_mul_f32 :: v_dual_fmamk_f32     vector 0405c4c8030f0001abaa2a3e
s_add_i32                              scalar 01020081
s_add_i32 with a literal               scalar 01ff008145230100
s_mov_b32 with a literal               scalar ff0080be45230100
s_cmp_lt_i32 with a literal            scalar 00ff04bf45230100
s_cmp_lt_i32 s0, 5                     scalar 008504bf
s_movk_i32                             scalar 341200b0
s_setreg_imm32_b32                     scalar 01f880b903000000
s_load_b128                            scalar 000108f4100000f8
ds_load_b128                           lds 1000fcdb04000000
ds_bpermute_b32                        lds 0000ccda02030001
ds_store_b64                           lds 000034d901020000
ds_load_u16                            narrow_lds_load 0000f0d802000001
ds_load_u16_d16                        narrow_lds_load 000098da02000001
ds_load_u16_d16_hi                     narrow_lds_load 02009cda02000001
ds_load_u8_d16_hi                      narrow_lds_load 00008cda02000001
ds_load_i8                             narrow_lds_load 0000e4d802000001
ds_store_b16                           narrow_lds_store 00007cd801020000
ds_store_b16_d16_hi                    narrow_lds_store 000084da01020000
ds_store_b8                            narrow_lds_store 000078d801020000
s_nop                                  scalar 000080bf
v_wmma_f32_16x16x16_bf16               matrix 004041cc0819021c
"""
RDNA3 = """
global_load_b128                       memory 00005edc04007c00
scratch_load_b32                       scratch 000051dc00000001
scratch_store_b128                     scratch 000075dc00000000
buffer_load_b128                       memory 00005ce004004280
v_wmma_i32_16x16x16_iu8                matrix 004044cc0819021c
"""
RDNA4 = """
global_load_b128                       memory 7cc005ee0000000004000000
scratch_load_b32                       scratch 000005ed0100000000000000
scratch_store_b128                     scratch 004007ed0000000000000000
buffer_load_b128                       memory 7cc005c40010804004000000
s_fmaak_f32                            scalar 010280a245230100
s_barrier_signal -1                    scalar c14e80be
s_barrier_wait -1                      scalar ffff94bf
v_wmma_f32_16x16x16_fp8_fp8            matrix 004046cc0819021c
v_swmmac_f32_16x16x32_bf16             matrix 004051cc0819521c
"""
CDNA = """
v_add_f32 v1, v2, v3                   vector 02070202
v_add_f32 v1, literal, v3              vector ff060202db0f4940
v_add_f32_dpp                          vector fa060202022401ff
v_mov_b32_sdwa                         vector f902027e02000500
v_madak_f32                            vector 02070230db0f4940
v_cmp_gt_u32 vcc, literal, v0          vector ff00987de1000000
v_cmp_gt_u32_e64                       vector 0000ccd001010200
v_fma_f32                              vector 0100cbd102071204
v_pk_fma_f32                           vector 0040b0d302091a1c
v_accvgpr_read_b32                     vector 0140d8d302010018
v_accvgpr_write_b32                    vector 0140d9d302010018
s_add_i32 with a literal               scalar 01ff008145230100
s_cmp_lt_i32 s0, 5                     scalar 008504bf
s_movk_i32                             scalar 341200b0
s_setreg_imm32_b32                     scalar 01f800ba03000000
s_load_dwordx4                         scalar 00010ac010000000
ds_read_b128                           lds 1000fed904000000
ds_write_b64                           lds 00009ad801020000
ds_read_u16                            narrow_lds_load 000078d802000001
ds_read_u16_d16                        narrow_lds_load 0000b4d802000001
ds_read_u16_d16_hi                     narrow_lds_load 0200b6d802000001
ds_read_u8_d16_hi                      narrow_lds_load 0000aed802000001
ds_write_b16                           narrow_lds_store 00003ed801020000
ds_write_b16_d16_hi                    narrow_lds_store 0000aad801020000
ds_write_b8_d16_hi                     narrow_lds_store 0000a8d801020000
global_load_dwordx4                    memory 00805cdc04007f00
scratch_load_dword                     scratch 004050dc00000001
buffer_load_dwordx4                    memory 00105ce004000280
s_waitcnt                              scalar 7fc08cbf
v_mfma_f32_16x16x16_bf16               matrix 0000e1d310250204
v_mfma_f32_16x16x16_f16 in AGPRs       matrix 0080cdd310250204
"""
CDNA4 = """
v_mfma_f32_16x16x32_bf16               matrix 0000b5d304110204
v_mfma_f32_32x32x16_bf16               matrix 0000b7d310290204
v_mfma_i32_16x16x64_i8                 matrix 0000b6d304110204
v_mfma_f32_16x16x128_f8f6f4            matrix 0000add304190204
v_mfma_scale_f32_16x16x128_f8f6f4      matrix 0000acd3142b02000008add304190204
v_cvt_pk_bf16_f32                      vector 010068d202070200
ds_read_b64_tr_b16                     lds 0000c6d902000000
"""
BY_ARCH = {
    "gfx1100": RDNA + RDNA3,
    "gfx1201": RDNA + RDNA4,
    "gfx90a": CDNA,
    "gfx942": CDNA,
    "gfx950": CDNA + CDNA4,
}


def known(arch):
    """(text, kind, bytes) of each line."""
    rows = filter(None, BY_ARCH[arch].splitlines())
    lines = (line.rsplit(maxsplit=2) for line in rows)
    return [(text.strip(), kind, bytes.fromhex(code)) for text, kind, code in lines]


@pytest.mark.parametrize("arch", BY_ARCH)
def test_each_instruction_has_its_length_and_kind(arch):
    for text, kind, code in known(arch):
        assert [(i.size, i.kind) for i in walk(code, arch)] == [(len(code), kind)], text


@pytest.mark.parametrize("arch", BY_ARCH)
def test_a_row_of_them_stays_in_step(arch):
    rows = known(arch)
    found = list(walk(b"".join(code for _, _, code in rows), arch))
    assert [i.kind for i in found] == [kind for _, kind, _ in rows]


def test_a_wrong_length_would_show():
    """The mutation: without its literal, the instruction swallows the next one."""
    literal, following = bytes.fromhex("ff060206"), bytes.fromhex("02070206")
    assert len(list(walk(literal + following, "gfx1100"))) == 1


@pytest.mark.parametrize(
    ("arch", "word"), [("gfx1100", "000000c4"), ("gfx1201", "000000e0"), ("gfx90a", "000000c8")]
)
def test_what_begins_no_instruction_is_an_error(arch, word):
    with pytest.raises(ValueError, match="byte 0 of the code"):
        list(walk(bytes.fromhex(word), arch))


def test_an_unknown_architecture_is_an_error():
    with pytest.raises(ValueError, match="gfx803"):
        list(walk(b"", "gfx803"))


NOP, WMMA = bytes.fromhex("000080bf"), bytes.fromhex("004041cc0819021c")


def branch(words):
    """s_cbranch_scc1 by that many words from the next instruction."""
    return (words & 0xFFFF).to_bytes(2, "little") + bytes.fromhex("a2bf")


def test_loops_nest_and_count():
    # nop, [nop, [wmma, branch], branch], nop
    code = NOP + NOP + WMMA + branch(-3) + branch(-5) + NOP
    outer, inner = instructions.loops(code, "gfx1100")
    assert (outer.start, outer.end, outer.inner) == (4, 24, False)
    assert (inner.start, inner.end, inner.inner) == (8, 20, True)
    assert inner.counts == {"matrix": 1, "branch": 1}
    assert outer.counts == {"scalar": 1, "matrix": 1, "branch": 2}
    assert (outer.depth, inner.depth) == (0, 1)
    assert outer.holds(inner) and not inner.holds(outer) and not outer.holds(outer)


def test_a_jump_forward_is_no_loop():
    assert instructions.loops(branch(1) + NOP + NOP, "gfx1100") == []


def test_two_ways_back_to_one_place_are_one_loop():
    code = NOP + branch(-2) + WMMA + branch(-5)
    (loop,) = instructions.loops(code, "gfx1100")
    assert (loop.start, loop.end, loop.inner) == (0, 20, True)


def test_spans_that_cross_are_one_loop():
    # nop, a: nop, b: wmma, branch to a, nop, branch to b
    code = NOP + NOP + WMMA + branch(-4) + NOP + branch(-5)
    (loop,) = instructions.loops(code, "gfx1100")
    assert (loop.start, loop.end, loop.counts["matrix"]) == (4, 28, 1)
