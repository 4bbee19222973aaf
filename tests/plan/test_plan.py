"""`plan` and `mud-puppy plan` on the CPU at hand: the answer, its forms, and every refusal."""

import json
from dataclasses import replace

import pytest

from mud_puppy.cli import main
from mud_puppy.errors import UserError
from mud_puppy.plan import plan, text, values
from mud_puppy.plan.places import find_place
from mud_puppy.plan.shapes import SHAPES, find_shape, shape_of
from mud_puppy.rocm import targets


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


def run(config, *flags) -> list[str]:
    words = [w for k, v in config.items() for w in ("--" + k.replace("_", "-"), str(v))]
    return ["plan", *words, *flags]


def test_the_parts_add_up_and_a_second_plan_is_equal(config):
    once, again = (plan(config, "cpu", search=False) for _ in range(2))
    assert replace(once, built=again.built) == again
    assert once.built.needed == again.built.needed and once.built.held == again.built.held
    assert sum(once.parts.values()) == once.built.needed > 0
    assert once.fits and once.tokens == 256
    assert once.roofline_tokens_per_s is None  # nobody knows this CPU's peak


def test_the_json_has_what_programs_read(config, capsys):
    assert main(run(config, "--target", "cpu", "--json", "--memory-gib", "0.01")) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fits", "peak_gib", "parts_gib", "max_batch_size", "max_seq_length"} <= set(found)
    assert {"roofline_tokens_per_s", "target", "limit_gib", "suggestions"} <= set(found)
    assert found["fits"] and found["target"] == "CPU" and found["limit_gib"] == 0.01
    assert found["peak_gib"] == pytest.approx(sum(found["parts_gib"].values()), abs=0.003)
    assert found["max_batch_size"] >= 2 and 128 <= found["max_seq_length"] <= 4096
    # Each is within a few percent of the limit; a CPU has no other memory to offload to.
    assert found["max_seq_length_offloaded"] >= 0.95 * found["max_seq_length"]


@pytest.mark.slow
def test_what_the_search_finds_fits_and_one_more_does_not(config):
    found = plan(config, "cpu", memory_gib=0.004)
    assert found.fits and found.max_batch_size < 1024

    def needed(**changes) -> int:
        return plan(config | changes, "cpu", search=False).built.needed

    limit = found.place.limit
    assert needed(batch_size=found.max_batch_size) <= limit
    assert needed(batch_size=int(1.1 * found.max_batch_size) + 1) > limit
    assert needed(batch_size=1, max_seq_length=found.max_seq_length) <= limit
    assert needed(batch_size=1, max_seq_length=int(1.1 * found.max_seq_length) + 64) > limit


def test_what_does_not_fit_is_said_with_what_does(config):
    config |= {"gradient_checkpointing": "none", "batch_size": 8}
    needs = plan(config, "cpu", search=False).built.needed / 2**30
    found = plan(config, "cpu", memory_gib=needs * 0.7)
    said = text(found)
    assert "DOES NOT FIT" in said and "what makes it fit, each compiled:" in said
    assert "batch_size 1, gradient_accumulation 8" in said
    idea = found.suggestions[0]
    again = plan(config | idea.changes, "cpu", memory_gib=needs * 0.7, search=False)
    assert again.fits and again.built.needed == idea.needed


def test_a_card_that_is_not_here_has_a_bound(config):
    """The roofline is of the place's peaks: made by hand, no compiler is asked."""
    found = plan(config, "cpu", search=False)
    card = targets.card("7900xtx")
    place = replace(found.place, flops=card.bf16_flops, bandwidth=card.bandwidth, devices=2)
    bound = replace(found, place=place)
    compute, memory = found.built.flops / (2 * 122.8e12), found.built.moved / 960e9
    assert bound.floor_s == max(compute, memory)
    assert bound.roofline_tokens_per_s == 256 / bound.floor_s
    assert "bound: no step is shorter than" in text(bound)
    assert values(bound)["roofline_tokens_per_s"] == bound.roofline_tokens_per_s


def test_the_tables_shapes_have_the_published_parameters():
    import math

    import jax

    from mud_puppy.model import abstract

    published = {
        "smollm2-135m": 134.5e6, "llama-3.2-1b": 1.236e9, "llama-3.2-3b": 3.213e9,
        "llama-3.1-8b": 8.030e9, "llama-3.1-70b": 70.554e9, "mistral-7b": 7.248e9,
        "qwen2.5-0.5b": 0.494e9, "qwen2.5-7b": 7.616e9, "qwen2.5-72b": 72.706e9,
        "qwen3-0.6b": 0.596e9, "qwen3-4b": 4.022e9, "qwen3-8b": 8.191e9, "qwen3-14b": 14.768e9,
        "qwen3-32b": 32.762e9, "gemma-2-2b": 2.614e9, "gemma-2-9b": 9.242e9,
        "gemma-2-27b": 27.227e9,
        "phi-3.5-mini": 3.821e9, "phi-4": 14.660e9, "olmo-2-7b": 7.299e9, "smollm3-3b": 3.075e9,
        "starcoder2-3b": 3.030e9, "mixtral-8x7b": 46.703e9, "qwen3-30b-a3b": 30.532e9,
        "gpt-oss-20b": 20.915e9, "deepseek-v2-lite": 15.706e9,
    }  # fmt: skip
    for name, count in published.items():
        shapes = jax.tree.leaves(abstract(SHAPES[name].fields)[1])
        assert sum(math.prod(x.shape) for x in shapes) == pytest.approx(count, rel=1e-3), name
    assert shape_of("Qwen/Qwen3-8B") == "qwen3-8b" and shape_of("Qwen/Qwen9") is None


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        ({}, ["--target", "7900 xtz"], "no known AMD card"),
        ({}, ["--target", "gpu"], "JAX finds cpu here, no gpu"),
        ({}, ["--target", "cpu", "--devices", "9"], "--devices 9: 8 are here"),
        ({}, ["--target", "cpu", "--memory-gib", "1e6"], "--memory-gib 1e+06: the device has"),
        ({}, ["--target", "cpu", "--memory-gib", "0"], "--memory-gib: '0' is not"),
        ({}, ["--shape", "llama-3.1-8b"], "are both given; remove one"),
        ({"max_seq_length": 8192}, ["--target", "cpu"], "the model has 4096 positions"),
        ({"batch_size": 3, "mesh": "fsdp=2"}, ["--target", "cpu"], "cannot be split over 2"),
        ({"mesh": "fsdp=16"}, ["--target", "cpu"], "needs 16 devices, 8 are here"),
        ({"model": "/no/such"}, ["--target", "cpu"], "/no/such"),
        ({"lora_targets": "q_prj"}, ["--target", "cpu"], "q_prj"),
        ({"lora_r": 0}, [], "--lora-r"),
        ({}, ["--no-such-flag"], "unknown flag"),
    ],
)
def test_a_mistake_is_one_line(config, capsys, change, flags, words):
    assert main(run(config | change, *flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("mud-puppy: error:") and words in error[-1]


def test_what_has_no_step_is_refused(folder):
    base = {"model": str(folder), "dataset": "-", "output": "-"}
    with pytest.raises(UserError, match="gptq trains nothing"):
        plan(base | {"method": "gptq"}, "cpu")
    with pytest.raises(UserError, match="a plan reads no weights"):
        plan(base | {"method": "qlora", "quant_backend": "stored"}, "cpu")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}
    }))  # fmt: skip
    with pytest.raises(UserError, match=r"in codes \(gptq\)"):
        plan(base, "cpu")


def test_a_plan_needs_neither_data_nor_output(folder, capsys):
    words = ["plan", str(folder), "--mesh", "data=1,fsdp=1", "--target", "cpu", "--no-search"]
    assert main([*words, "--lora-r", "4", "--max-seq-length", "128"]) == 0
    assert "fits" in capsys.readouterr().out
    assert main(["plan", "--target", "cpu"]) == 2
    assert "model is missing" in capsys.readouterr().err
    assert main(["plan", "--shape", "llama-3.1-9b", "--target", "cpu"]) == 2
    assert "Did you mean 'llama-3.1-8b'" in capsys.readouterr().err


def test_a_config_names_its_card(config, tmp_path, capsys):
    """`target` of the YAML is the plan's; the flag wins."""
    import yaml

    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config | {"target": "7900 xtz"}))
    assert main(["plan", "--config", str(file)]) == 2
    assert "no known AMD card" in capsys.readouterr().err
    assert main(["plan", "--config", str(file), "--target", "cpu", "--no-search"]) == 0


def test_places():
    card = find_place("mi300x", 4, None)
    assert card.devices == 4 and card.limit == int(0.95 * 192 * 2**30)
    assert find_place("7900xtx", None, 20.0).limit == 20 * 2**30
    assert find_place(None, 2, None).name == "CPU"
    assert find_shape("Llama-3.1-8B")["hidden_size"] == 4096
