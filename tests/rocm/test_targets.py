"""Cards by name: names, figures that agree with each other, the description for XLA."""

import pytest

from mud_puppy.errors import UserError
from mud_puppy.rocm import targets


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("7900 XTX", "Radeon RX 7900 XTX"),
        ("AMD Radeon RX 7900 XTX", "Radeon RX 7900 XTX"),
        ("7900xt", "Radeon RX 7900 XT"),
        ("w7900", "Radeon PRO W7900"),
        ("AI PRO R9700", "Radeon AI PRO R9700"),
        ("mi300x", "Instinct MI300X"),
        ("Strix Halo", "Radeon 8060S"),
        ("gfx1151", "Radeon 8060S"),
        ("gfx1100", "Radeon RX 7900 XTX"),
        ("gfx942:sramecc+:xnack-", "Instinct MI300X"),
    ],
)
def test_a_card_is_found_by_its_names(asked, name):
    assert targets.card(asked).name == name


def test_an_unknown_card_lists_the_known_ones_and_the_nearest():
    with pytest.raises(UserError, match=r"Did you mean '7900xt'\?.*Instinct MI355X.*gfx90a"):
        targets.card("7900 xtz")


def test_every_name_and_architecture_finds_a_card():
    for known in targets.CARDS:
        assert targets.card(known.name) is known
    assert {targets.card(a).arch for a in targets.ARCHITECTURES} == set(targets.ARCHITECTURES)


# FLOP of a compute unit in one clock, in matrix instructions of bf16: twice 128 lanes x 2 dual
# on RDNA3 (512), and the matrix units of the others.
PER_CLOCK = {
    "gfx1100": 512, "gfx1101": 512, "gfx1151": 512, "gfx1201": 1024, "gfx90a": 1024,
    "gfx942": 2048, "gfx950": 4096,
}  # fmt: skip


@pytest.mark.parametrize("known", targets.CARDS, ids=lambda c: c.name)
def test_the_peak_is_units_times_clock(known):
    peak = known.compute_units * known.clock_hz * PER_CLOCK[known.arch]
    assert known.bf16_flops == pytest.approx(peak, rel=0.02)


def test_the_cards_of_the_plan_are_known():
    asked = (
        "7900xtx 7900xt 7900gre w7900 7800xt 9070xt r9700 8060s mi210 mi250x mi300x mi325x mi355x"
    )
    assert len({targets.card(name).name for name in asked.split()}) == len(targets.CARDS) == 13


def test_memory_that_is_shared_or_of_one_die_is_said():
    notes = {known.name: known.note for known in targets.CARDS if known.note}
    assert set(notes) == {"Radeon 8060S", "Instinct MI250X"}
    assert "machine's own" in notes["Radeon 8060S"] and "96 GB" in notes["Radeon 8060S"]


def test_the_description_names_the_architecture_twice():
    text = targets.target_config(targets.card("gfx950"))
    assert 'gcn_arch_name: "gfx950"' in text
    assert 'device_description_str: "gfx950"' in text  # where Pallas looks for it
    assert "shared_memory_per_block: 163840" in text
    # 512 KiB of vector registers, as openxla's own mi350.txtpb has it
    assert "registers_per_core_limit: 131072" in text
