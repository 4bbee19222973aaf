"""What the search answers was measured, fits, and is near the limit; and it measures seldom."""

from hypothesis import given
from hypothesis import strategies as st

from mud_puppy.plan.search import CLOSE, CLOSE_SIZE, STEPS, largest, length_grain

GIB = 2**30


@given(
    fixed=st.integers(0, 30 * GIB),
    slope=st.floats(1e3, 1e8),
    bend=st.floats(-0.2, 0.2),
    first=st.integers(1, 2000).map(lambda n: 64 * n),
)
def test_the_longest_row_fits_and_is_near_the_limit(fixed, slope, bend, first):
    limit, most, asked = 24 * GIB, 131072, []

    def needed(length: int) -> int:
        asked.append(length)
        return int(fixed + slope * length * (1 + bend * length / most))

    known = {0: fixed, first: needed(first)}
    found = largest(needed, limit, known, length_grain, most)
    assert len(asked) <= STEPS + 1
    if not found:
        assert fixed > limit or needed(1024) > limit * (1 - CLOSE)
        return
    assert found in asked and needed(found) <= limit
    near = limit - needed(found) < 2 * CLOSE * limit
    above = int(found * (1 + CLOSE_SIZE)) + 2 * length_grain(found)
    assert near or found == most or needed(above) > limit or bend


def test_rows_are_whole_and_found_in_few_steps():
    asked = []

    def needed(rows: int) -> int:
        asked.append(rows)
        return 6 + 2 * rows

    assert largest(needed, 24, {0: 6, 1: 8}, lambda rows: 1, 512) == 9
    assert len(asked) <= 2
    asked.clear()
    assert largest(needed, 24, {0: 6, 1: 8}, lambda rows: 1, 512, first=9) == 9
    assert asked == [9]


def test_nothing_is_compiled_where_nothing_can_fit():
    def needed(size: int) -> int:
        raise AssertionError(size)

    assert largest(needed, 10, {0: 11, 64: 12}, length_grain, 4096) == 0


def test_near_is_a_part_of_what_can_grow():
    """A model that nearly fills the card leaves little; a tenth more than what is found is over."""

    def needed(size: int) -> int:
        return 22 * GIB + size * 2**20

    known = {0: 22 * GIB, 1600: needed(1600)}
    found = largest(needed, 24 * GIB, known, length_grain, 131072)
    assert needed(found) <= 24 * GIB < needed(int(1.1 * found))
