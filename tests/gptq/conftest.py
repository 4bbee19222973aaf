"""The keys of a small GPTQ run on the tiny model."""

import pytest

SMALL = {"max_seq_length": 64, "precision": "fp32", "mesh": "data=1,fsdp=1"}


@pytest.fixture
def keys(chat_model, chats, tmp_path):
    """A run of method gptq on the tiny model: 16 rows, groups of 16."""
    named = {"model": str(chat_model), "dataset": str(chats), "output": str(tmp_path / "out")}
    return named | SMALL | {"method": "gptq", "gptq_group_size": 16, "gptq_samples": 14}
