"""Which blocks the kernels visit, and how a head is cut in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels.attention import tile, xla
from mud_puppy.kernels.attention.plan import Options, Plan, pieces, segment_ranges
from tests.kernels.attention.calls import segments, shuffled


@pytest.mark.parametrize(("T", "S"), [(64, 64), (37, 64), (64, 40), (1, 50)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 16, 17, 40])
def test_ranges_hold_what_is_seen(T, S, causal, window):
    plan = Plan(Options(causal, window if causal else None, 1.0), T, S, 16, 8, 4, 1)
    end = plan.q_blocks * 16
    seen = plan.seen(np.arange(end)[:, None], np.arange(plan.k_blocks * 8)[None])
    seen = np.broadcast_to(seen, (end, plan.k_blocks * 8))
    tiles = seen.reshape(plan.q_blocks, 16, plan.k_blocks, 8).transpose(0, 2, 1, 3)
    for i in range(plan.q_blocks):
        within(tiles[i], [int(x) for x in plan.key_range(i)])
    for j in range(plan.k_blocks):
        # Keys after S are not masked for d_k and d_v: their rows are dropped.
        within(tiles[..., : S - 8 * j][:, j], [int(x) for x in plan.query_range(j)], 8 * j + 8 > S)


def within(tiles, bounds, padded=False):
    """tiles [n, rows, columns]: all that is seen in [low, high), none hidden in the full part."""
    low, full_low, full_high, high = bounds
    assert 0 <= low <= full_low <= full_high <= high <= len(tiles)
    used = np.flatnonzero(tiles.any((1, 2)))
    assert (used >= low).all() and (used < high).all()
    assert high - low == len(used) or padded or not len(used)
    assert tiles[full_low:full_high].all()
    assert padded or full_high - full_low == tiles[low:high].all((1, 2)).sum()


@pytest.mark.parametrize("make", [segments, shuffled])
@pytest.mark.parametrize("by_key", [False, True])
def test_ranges_of_segments(make, by_key):
    B, T = 3, 96
    plan = Plan(Options(True, 70, 1.0), T, T, 16, 8, 4, 1)
    ids = np.asarray(make(B, T))
    table = segment_ranges(plan, ids, ids, by_key=by_key)
    refs = {name: np.asarray(x)[None] for name, x in table.items()}
    seen = np.asarray(plan.seen(np.arange(T)[:, None], np.arange(T)[None]))
    seen = seen & (ids[:, :, None] == ids[:, None, :])
    tiles = seen.reshape(B, 6, 16, 12, 8).transpose(0, 1, 3, 2, 4)
    tiles = tiles.transpose(0, 2, 1, 3, 4) if by_key else tiles
    visited = full = 0
    for b, n in np.ndindex(refs["first"][0].shape):
        low, full_low, full_high, high, same = map(
            np.asarray, tile.ranges(plan, refs, 0, b, n, by_key=by_key)
        )
        full_low, full_high = max(full_low, same[0]), min(full_high, same[1])
        used = np.flatnonzero(tiles[b, n].any((1, 2)))
        assert (used >= low).all() and (used < high).all()
        assert tiles[b, n, full_low:full_high].all()
        full += max(0, full_high - full_low)
        visited += high - low
    blocks = tiles.any((3, 4)).sum()
    assert visited <= (1.1 if make is segments else 3) * blocks
    assert blocks < visited or make is segments
    assert make is shuffled or full > 0.5 * tiles.all((3, 4)).sum() > 0


@pytest.mark.parametrize("by_key", [False, True])
def test_table_of_segments_in_parts(by_key, monkeypatch):
    plan, ids = Plan(Options(True, None, 1.0), 96, 96, 16, 8, 4, 1), segments(2, 96)
    whole = segment_ranges(plan, ids, ids, by_key=by_key)
    monkeypatch.setattr("mud_puppy.kernels.attention.plan.MOST_PAIRS", 24)
    parts = segment_ranges(plan, ids, ids, by_key=by_key)
    for name, x in whole.items():
        np.testing.assert_array_equal(x, parts[name])


def test_table_of_segments_is_linear():
    def temp_bytes(T):
        plan = Plan(Options(True, None, 1.0), T, T, 16, 16, 4, 1)
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
        f = jax.jit(lambda ids: segment_ranges(plan, ids, ids)).lower(ids).compile()
        return f.memory_analysis().temp_size_in_bytes

    assert temp_bytes(2**18) < 5 * temp_bytes(2**16)


def test_pieces_of_heads():
    for size in range(16, 257, 16):
        parts = pieces(size)
        assert sum(width for _, width in parts) == size
        assert all(width & (width - 1) == 0 and width >= 16 for _, width in parts)
    assert pieces(96) == [(0, 64), (64, 32)] and pieces(192) == [(0, 128), (128, 64)]


def test_pairs_skip_what_no_query_sees():
    def pairs(**options):
        lengths = {"T": options.pop("T", 64), "S": 64, "q_block": 16, "k_block": 16}
        options = Options(**{"causal": True, "window": None, "scale": 1.0, **options})
        return xla._Plan(**lengths, options=options).pairs().tolist()

    assert len(pairs()) == 10 and len(pairs(causal=False)) == 16
    assert pairs(window=1) == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert pairs(window=2) == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    assert pairs(T=16) == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert pairs(T=1, window=2) == [[0, 3]]
