"""A model folder that holds a config.json and nothing else: no weight to load, none to download."""

import json

import pytest

from tests.tiny import SIZES


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    fields = {"model_type": "llama", "max_position_embeddings": 4096, **SIZES}
    (model / "config.json").write_text(json.dumps(fields))
    return model


@pytest.fixture
def config(folder):
    return {
        "model": str(folder), "dataset": "-", "output": "-", "lora_r": 4, "lora_alpha": 8,
        "max_seq_length": 128, "batch_size": 2, "mesh": "data=1,fsdp=1",
    }  # fmt: skip
