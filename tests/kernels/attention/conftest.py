"""Small blocks for every test here, and the Python side of an H100."""

import pytest

from mud_puppy.kernels.attention import cudnn, decode_xla, flash, prepare, xla

TILE = {"q_block": 16, "k_block": 16, "num_warps": 4, "num_stages": 2}
RDNA = TILE | {"transposed": True, "chunk": 16, "num_stages": 1}
RDNA |= {"one_loop": True, "row_columns": 16}
PLAIN = prepare.Tiles(*[tuple(sorted(TILE.items()))] * 3)
SPLIT = prepare.Tiles(*[tuple(sorted(RDNA.items()))] * 4)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "CPU_BLOCK", 16)
        patch.setattr(xla, "BLOCK", 16)
        patch.setattr(decode_xla, "CHUNK", 16)
        # Wide heads go the way of RDNA's tiles: streamed, transposed, one kernel a gradient.
        patch.setattr(
            flash, "tuned_tiles", lambda q, v, packed: SPLIT if q.shape[-1] > 16 else PLAIN
        )
        yield


@pytest.fixture
def hopper(monkeypatch):
    """The Python side of an H100 with cuDNN 9.20."""
    monkeypatch.setattr(cudnn, "on_cuda", lambda: True)
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 92000)
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn.fused, "is_cuda_compute_capability_equal", lambda capability: False)
