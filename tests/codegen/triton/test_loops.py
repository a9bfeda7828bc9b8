from __future__ import annotations

from attnc.codegen.triton.loops import inner_loops, products

# Two loops over keys in a loop over tiles; the second waits out of line, at the end of the code.
SASS = """
        /*0000*/                   S2R R4, SR_CTAID.X ;               /* 0x01 */
        /*0010*/                   MOV R1, R2 ;                       /* 0x01 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24 ;     /* 0x01 */
        /*0030*/                   MUFU.EX2 R5, R5 ;                  /* 0x01 */
        /*0040*/               @P0 BRA 0x20 ;                         /* 0x01 */
        /*0050*/                   FADD R1, R1, R2 ;                  /* 0x01 */
        /*0060*/              @!P1 BRA 0xe0 ;                         /* 0x01 */
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24 ;      /* 0x01 */
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24 ;      /* 0x01 */
        /*0090*/               @P0 BRA 0x50 ;                         /* 0x01 */
        /*00a0*/               @P2 BRA 0x10 ;                         /* 0x01 */
        /*00b0*/                   STG.E R1 ;                         /* 0x01 */
        /*00c0*/                   EXIT ;                             /* 0x01 */
        /*00d0*/                   BRA 0xd0;                          /* 0x01 */
        /*00e0*/                   SYNCS.PHASECHK P1 ;                /* 0x01 */
        /*00f0*/              @!P1 BRA 0xe0 ;                         /* 0x01 */
        /*0100*/                   BRA 0x70 ;                         /* 0x01 */
"""


FIRST = SASS[: SASS.index("/*0050*/")]


def test_inner_loops_hold_the_waits_that_lie_out_of_line() -> None:
    first, second = inner_loops(SASS)
    assert [x.address for x in first] == [0x20, 0x30, 0x40]
    assert [x.address for x in second] == [0x50, 0x60, 0x70, 0x80, 0x90, 0xE0, 0xF0, 0x100]


def test_products_of_a_turn_are_read_from_the_sizes_of_its_instructions() -> None:
    first, second = inner_loops(SASS)
    assert products(first, warps=4) == 64 * 128 * 16
    assert products(second, warps=8) == 2 * 64 * 64 * 16 * 2
    (ampere,) = inner_loops(FIRST.replace("HGMMA.64x128x16", "HMMA.16816"))
    assert products(ampere, warps=4) == 16 * 8 * 16 * 4
    (blackwell,) = inner_loops(FIRST.replace("HGMMA.64x128x16", "UTCHMMA gdesc"))
    assert products(blackwell, warps=4) is None


def test_multiply_adds_make_a_loop_only_where_nothing_uses_tensor_cores() -> None:
    exact = FIRST.replace("HGMMA.64x128x16.F32.BF16", "FFMA")
    assert [[x.address for x in loop] for loop in inner_loops(exact)] == [[0x20, 0x30, 0x40]]
    mixed = SASS.replace("HGMMA.64x128x16.F32.BF16", "FFMA")
    assert [loop[0].address for loop in inner_loops(mixed)] == [0x50]


def test_code_without_a_loop_has_none() -> None:
    assert inner_loops(FIRST.replace("@P0 BRA 0x20 ", "    EXIT     ")) == []
