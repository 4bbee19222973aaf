"""`mud-puppy plan` for AMD cards, by XLA's ROCm compiler and without one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mud_puppy.plan import plan, text

pytestmark = pytest.mark.rocm

QLORA = {"method": "qlora", "batch_size": 1, "max_seq_length": 2048}


def planned(keys, card="7900xtx", shape="llama-3.1-8b", **options):
    base = {"model": shape, "dataset": "-", "output": "-"}
    return plan(base | keys, card, shape=shape, **options)


def test_an_answer_reproduces_and_names_the_longest_context():
    """By the command line, twice, in processes of their own."""
    words = [sys.executable, "-m", "mud_puppy", "plan", "--shape", "llama-3.1-8b", "--json"]
    words += ["--method", "qlora", "--batch-size", "1", "--target", "7900xtx"]
    answers = [subprocess.run(words, capture_output=True, text=True, check=True) for _ in "12"]
    once, again = (json.loads(answer.stdout) for answer in answers)
    assert once == again
    assert once["fits"] and 6 < once["peak_gib"] < 8 and once["limit_gib"] == 22.8
    assert sum(once["parts_gib"].values()) == pytest.approx(once["peak_gib"], abs=0.01)
    assert once["max_seq_length_offloaded"] == once["model_max_seq_length"] == 131072
    assert once["max_seq_length"] > 30000 and once["max_batch_size"] > 10
    assert 2000 < once["roofline_tokens_per_s"] < 4000
    assert not any("Traceback" in answer.stderr for answer in answers)


def test_what_is_too_large_is_said_with_what_fits():
    found = planned({"method": "full", "batch_size": 1})
    assert not found.fits and found.max_batch_size == found.max_seq_length == 0
    assert {"method": "qlora"} in [idea.changes for idea in found.suggestions]
    idea = found.suggestions[0]
    again = planned(
        {"method": "full", "batch_size": 1} | idea.changes, search=False, devices=idea.devices
    )
    assert again.fits and again.built.needed == idea.needed
    assert re.search(r"DOES NOT FIT(.|\n)*what makes it fit, each compiled:", text(found))


def test_cards_share_a_model():
    keys = {"method": "full", "batch_size": 4}
    one = planned(keys, "mi300x", "llama-3.2-1b", search=False)
    four = planned(keys, "mi300x", "llama-3.2-1b", search=False, devices=4)
    assert four.parts["weights"] == pytest.approx(one.parts["weights"] / 4, rel=0.01)
    assert four.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 4, rel=0.01)
    assert four.built.flops == pytest.approx(one.built.flops, rel=0.01)
    assert four.roofline_tokens_per_s == pytest.approx(4 * one.roofline_tokens_per_s, rel=0.01)


@pytest.mark.parametrize("card", ["7800xt", "9070xt", "mi210", "mi300x", "mi355x", "strix halo"])
def test_every_architecture_compiles_a_step(card):
    found = planned(QLORA, card, "smollm2-135m", search=False)
    assert found.fits and found.built.needed < 2 * 2**30


def test_a_longer_row_needs_the_host():
    keys = QLORA | {"max_seq_length": 32768, "quant_embeddings": True, "lora_r": 32}
    plain = planned(keys, search=False)
    long = keys | {"gradient_checkpointing": "offload", "sequence_tile": 2048}
    levers = planned(long, search=False)
    assert levers.built.host == levers.built.held.offloaded == 32 * 32768 * 4096 * 2
    assert levers.built.needed < plain.built.needed - levers.built.host


def test_the_recipe_of_long_context_is_shipped():
    path = Path(__file__).parents[2] / "configs" / "7900xtx-8b-qlora-long.yaml"
    found = plan(path, search=False)
    assert found.fits and found.length >= 120_000 and found.place.card is not None
    assert found.config.lora_r == 32 and found.rows == 1
