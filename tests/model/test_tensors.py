"""Safetensors: the dtypes of weights and of codes, against the library; what no weight is."""

import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from mud_puppy.errors import UserError
from mud_puppy.model import load
from mud_puppy.model.read import whole
from mud_puppy.model.tensors import CODES, DTYPES, open_safetensors, write_safetensors

UP = "model.layers.1.mlp.up_proj.weight"
ALL = DTYPES | CODES


def bits(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    size = dtype.itemsize * int(np.prod(shape))
    return np.random.default_rng(0).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(6, 5), (7,)])
def test_the_library_reads_each_dtype_as_it_was_written(shape: tuple, tmp_path: Path) -> None:
    path, arrays = tmp_path / "x.safetensors", {name: bits(d, shape) for name, d in ALL.items()}
    write_safetensors(path, {n: (shape, x.dtype) for n, x in arrays.items()}, arrays.values())
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    ours = open_safetensors(path)
    assert set(theirs) == set(ours) == set(ALL)
    for name, array in arrays.items():
        assert theirs[name]["dtype"] == name and theirs[name]["shape"] == list(shape)
        assert bytes(theirs[name]["data"]) == array.tobytes() == whole(ours[name]).tobytes()
        assert ours[name].dtype == array.dtype


def test_files_that_change_after_they_were_opened(tmp_path: Path) -> None:
    path, array = tmp_path / "x.safetensors", np.ones((8, 4), np.float32)
    write_safetensors(path, {"a": (array.shape, array.dtype)}, [array])
    stored = open_safetensors(path)["a"]
    assert np.array_equal(whole(stored), array)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError, match=f"{path}: ended while it was read"):
        whole(stored)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: cannot be read: No such file"):
        whole(stored)


def replaced(llama: Path, tmp_path: Path, dtype: str) -> Path:
    """The model with UP stored in another dtype."""
    folder = shutil.copytree(llama, tmp_path / dtype)
    path = folder / "model.safetensors"
    array = np.zeros((48, 32), getattr(ml_dtypes, dtype, dtype))
    save_file(load_file(path) | {UP: array}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("int8", "I8"),
        ("uint8", "U8"),
        ("int32", "I32"),
        ("int64", "I64"),
        ("float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", "F8_E5M2"),
        ("float64", "F64"),
        ("bool", "BOOL"),
    ],
)
def test_codes_are_no_weight(
    stored: str, name: str, dtype: str | None, llama: Path, tmp_path: Path
) -> None:
    folder = replaced(llama, tmp_path, stored)
    message = rf"{folder}.*'{UP}' is stored as {name}; dtypes that load: BF16, F16, F32$"
    with pytest.raises(UserError, match=message) as caught:
        load(folder, dtype=dtype)
    assert "\n" not in str(caught.value)


def test_floats_are_weights(llama: Path, tmp_path: Path) -> None:
    """The partner of the test above: the same file with a float in that place loads."""
    load(replaced(llama, tmp_path, "bfloat16"), dtype=None)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_no_model_is_asked_for_in_codes(dtype: str, llama: Path) -> None:
    with pytest.raises(UserError, match=f"dtype '{dtype}' is not one of bfloat16, float16, float3"):
        load(llama, dtype=dtype)
