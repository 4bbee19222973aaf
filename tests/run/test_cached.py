"""The files of `reference: cached`: kept, read again, and what happens to damaged ones."""

from pathlib import Path

import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.run.cached import _read, _write

SHAPE = (3, 64)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "reference" / "a.npy"
    _write(path, np.arange(192, dtype=np.float32).reshape(SHAPE))
    return path


def test_what_is_kept_is_read_again(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = _read(kept, SHAPE)
    assert found is not None and found.sum() == 191 * 96
    assert _read(kept.with_name("b.npy"), SHAPE) is None
    assert not caplog.text


@pytest.mark.parametrize("damage", ["empty", "no array", "cut", "shape", "type", "folder"])
def test_a_damaged_file_is_computed_again(
    kept: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = kept.read_bytes()
    if damage == "shape":
        _write(kept, np.zeros((3, 128), np.float32))
    elif damage == "type":
        _write(kept, np.zeros(SHAPE, np.float64))
    elif damage == "folder":
        kept.unlink()
        kept.mkdir()
    else:
        kept.write_bytes({"empty": b"", "no array": b"junk", "cut": whole[:-9]}[damage])
    assert _read(kept, SHAPE) is None
    assert f"{kept}: is damaged, and is computed again" in caplog.text
    if damage == "folder":
        with pytest.raises(UserError, match=r"a\.npy: cannot be written: Is a directory"):
            _write(kept, np.zeros(SHAPE, np.float32))
