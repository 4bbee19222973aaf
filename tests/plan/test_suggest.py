"""Suggestions: in the order of their cost, each one compiled, each one a config that loads."""

import pytest

from mud_puppy.config import Config
from mud_puppy.errors import UserError
from mud_puppy.plan.suggest import EXACT, LONG, OTHERS, suggest, together

BASE = {"model": "m", "dataset": "d", "output": "o"}


def tried(keys, *, fixed=0, limit=100, devices=1, more=8, needs=lambda changes, devices: 101):
    asked = []

    def measure(changes, count):
        Config.load(Config.load(BASE | keys).to_dict() | changes)
        asked.append((changes, count))
        return needs(changes, count)

    found = suggest(Config.load(BASE | keys), measure, limit, fixed, devices, more)
    return found, asked


def test_what_changes_no_result_comes_first():
    keys = {"method": "lora", "gradient_checkpointing": "none", "batch_size": 8}
    found, asked = tried(keys, needs=lambda changes, devices: 90)
    assert [idea.changes for idea in found] == [
        {"batch_size": 1, "gradient_accumulation": 8},
        {"gradient_checkpointing": "full"},
        {"sequence_tile": 2048},
    ]
    assert len(asked) == 3 and all(idea.needed == 90 for idea in found)


def test_only_what_fits_is_suggested_and_all_was_tried():
    found, asked = tried({"method": "lora"})
    assert found == []
    changes = [c for c, _ in asked]
    assert {"gradient_checkpointing": "offload"} in changes and {"method": "qlora"} in changes
    assert {"max_seq_length": 1024} in changes
    assert {"lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"]} in changes
    assert [n for _, n in asked][-3:] == [2, 4, 8]
    assert any(len(c) > 3 for c in changes)  # several together


def test_weights_that_are_too_large_need_other_levers():
    _, asked = tried({"method": "full"}, fixed=101)
    changes = [c for c, _ in asked]
    assert {"optimizer": "adamw_8bit"} in changes and {"method": "lora"} in changes
    assert {"gradient_checkpointing": "offload"} not in changes
    assert {"max_seq_length": 1024} not in changes


@pytest.mark.parametrize(
    ("keys", "absent"),
    [
        ({"method": "lora", "gradient_checkpointing": "offload"}, "gradient_checkpointing"),
        ({"method": "lora", "batch_size": 1}, "batch_size"),
        ({"method": "lora", "sequence_tile": 512}, "sequence_tile"),
        ({"method": "lora", "precision": "fp8"}, "sequence_tile"),
        ({"method": "full", "optimizer": "adamw_8bit"}, "optimizer"),
        ({"method": "qlora", "quant_embeddings": True}, "quant_embeddings"),
        ({"method": "qlora"}, "method"),
        ({"method": "qlora", "lora_targets": ["q_proj"]}, "lora_targets"),
        ({"method": "lora", "precision": "fp8"}, "method"),
    ],
)
def test_no_lever_that_is_pulled_already(keys, absent):
    _, asked = tried(keys, more=1)
    assert asked and not any(absent in changes for changes, _ in asked)


def test_rows_stay_a_multiple_of_the_devices():
    _, asked = tried({"method": "lora", "batch_size": 6}, devices=2)
    assert ({"batch_size": 2, "gradient_accumulation": 3}, 2) in asked
    assert ({"batch_size": 8}, 4) in asked and ({"batch_size": 8}, 8) in asked


def test_tokens_a_batch_fall_to_one_row():
    keys = {"method": "lora", "tokens_per_batch": 8192}
    assert ({"tokens_per_batch": 2048, "gradient_accumulation": 4}, 1) in tried(keys)[1]


def test_levers_together_see_each_other():
    config = Config.load(BASE | {"method": "lora"})
    assert together(config, 1, (*EXACT, *OTHERS[:3])) == {
        "batch_size": 1, "gradient_accumulation": 4, "sequence_tile": 2048,
        "gradient_checkpointing": "offload", "optimizer": "adamw_8bit", "method": "qlora",
        "quant_embeddings": True,
    }  # fmt: skip
    assert set(together(config, 1, LONG)) == {"sequence_tile", "gradient_checkpointing"}


def test_a_change_that_the_model_cannot_have_is_passed_over(caplog):
    def needs(changes, devices):
        if changes.get("method") == "qlora":
            raise UserError("rows of 333 are no multiple of the group of 64")
        return 90 if "max_seq_length" in changes else 101

    with caplog.at_level("INFO", "mud_puppy"):
        found, _ = tried({"method": "lora"}, needs=needs)
    assert [idea.changes for idea in found] == [{"max_seq_length": 1024}]
    assert "no multiple of the group" in caplog.text


def test_the_least_of_all_is_tried_on_one_card_and_on_several():
    """32B in full does not fit 24 GB, nor do its adapters, nor codes alone."""
    found, asked = tried(
        {"method": "full"}, fixed=101, needs=lambda c, n: 90 if c.get("quant_embeddings") else 101
    )
    assert [idea.devices for idea in found] == [1, 2, 4]
    assert all(idea.changes["method"] == "qlora" for idea in found)
    assert found[0].changes["gradient_checkpointing"] == "offload"
    found, _ = tried({"method": "full", "mesh": "data=1,fsdp=2"}, devices=2)
    assert not found  # a mesh that is given is kept
