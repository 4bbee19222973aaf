"""Contract of the configuration: round trip, precedence, one clear line for each mistake."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mud_puppy.config import KEYS, Config, check_output
from mud_puppy.config import refused as refused_table
from mud_puppy.config.schema import Limit, allowed, base_type, choices
from mud_puppy.errors import UserError

ROOT = Path(__file__).parents[1]
BASE = {"model": "m", "dataset": "d.jsonl", "output": "out"}


def error(source=None, overrides=None, **keys) -> str:
    """The one line that this config is refused with."""
    with pytest.raises(UserError) as caught:
        Config.load(BASE | keys if source is None else source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


ROUND_TRIPS = [
    {},
    {"method": "full", "weight_decay": 0.1},
    {"tokens_per_batch": 4096, "max_steps": 7},
    {"warmup_ratio": 0.1, "eval_split": 0.2, "early_stopping": 2, "sample_prompts": ["a, b", "c"]},
    {"lora_targets": "q_proj,v_proj", "roles_to_train": ["assistant", "tool"], "sample_prompts": 0},
    {"lora_targets": r".*\.(q|v)_proj", "adapter": "a", "adapter_mode": "stack"},
    {"adapter": "a", "merge_lora": True, "merge_precision": "fp32", "mesh": "data=2,fsdp=4"},
    {"lr_scheduler": "cosine_with_restarts", "lr_restarts": 5, "optimizer": "lion"},
    {"train_on_prompt": True, "resume": True, "gradient_checkpointing": False},
    {"method": "gptq", "gptq_bits": 3, "gptq_group_size": -1, "gptq_awq": True, "batch_size": 2},
    {"method": "gptq", "tokens_per_batch": 4096, "eval_split": 0.1, "gptq_actorder": False},
]


@pytest.mark.parametrize("keys", ROUND_TRIPS)
def test_resolved_config_loads_to_an_equal_one(keys, tmp_path):
    config = Config.load(BASE | keys)
    path = written(tmp_path, yaml.safe_dump(config.to_dict()))
    assert Config.load(path) == config == Config.load(config.to_dict()) == Config.load(config)
    assert Config.load(path, {"seed": 1}) != config


@given(st.integers(0, 2**31), st.floats(1e-9, 1.0), st.integers(1, 64), st.booleans())
def test_any_values_round_trip(seed, rate, rank, packed):
    keys = {"seed": seed, "learning_rate": rate, "lora_r": rank, "pack_sequences": packed}
    config = Config.load(BASE | keys)
    assert (config.seed, config.learning_rate) == (seed, rate)
    assert Config.load(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = written(tmp_path, "model: m\ndataset: d\noutput: o\nseed: 3\nlora_r: 8\n")
    config = Config.load(path, {"seed": "5"})
    assert (config.seed, config.lora_r, config.batch_size) == (5, 8, 4)


def test_texts_convert_as_yaml_and_flags_write_them():
    config = Config.load(
        BASE, {"learning_rate": "2e-4", "batch_size": "8", "resume": "true", "save_steps": "null"}
    )
    assert (config.learning_rate, config.batch_size, config.resume) == (2e-4, 8, True)
    assert config.save_steps is None
    assert Config.load(yaml.safe_load("{model: m, dataset: d, output: o, learning_rate: 2e-4}"))


@pytest.mark.parametrize(("value", "policy"), [(False, "none"), (True, "full"), ("none", "none")])
def test_gradient_checkpointing_takes_true_and_false(value, policy):
    config = Config.load(BASE | {"gradient_checkpointing": value})
    assert config.gradient_checkpointing == policy


def test_defaults_follow_the_method():
    assert Config.load(BASE).learning_rate == 2e-4
    assert Config.load(BASE | {"method": "full"}).learning_rate == 2e-5
    assert Config.load(BASE | {"method": "full", "learning_rate": 1.0}).learning_rate == 1.0
    assert Config.load(BASE).epochs == 1.0
    assert Config.load(BASE | {"max_steps": 10}).epochs is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        (["q_proj"], ("q_proj",)),
        (r"model\.layers\.[0-3]\..*", r"model\.layers\.[0-3]\..*"),
    ],
)
def test_lora_targets(value, expected):
    assert Config.load(BASE | {"lora_targets": value}).lora_targets == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3), (["3"], 3), (["a"], ("a",)), (["a, b", "c"], ("a, b", "c"))]
)
def test_sample_prompts_are_a_count_or_texts(value, expected):
    assert Config.load(BASE | {"sample_prompts": value}).sample_prompts == expected


BAD_VALUES = [
    ("learning_rate", -0.1, "config: learning_rate: -0.1 is not a number above 0."),
    ("learning_rate", "fast", "config: learning_rate: 'fast' is not a number above 0."),
    ("learning_rate", None, "config: learning_rate: null is not a number above 0."),
    ("learning_rate", float("nan"), "config: learning_rate: nan is not a number above 0."),
    ("batch_size", 0, "config: batch_size: 0 is not a whole number at least 1."),
    ("batch_size", 1.5, "config: batch_size: 1.5 is not a whole number at least 1."),
    ("batch_size", True, "config: batch_size: true is not a whole number at least 1."),
    ("lora_dropout", 1, "config: lora_dropout: 1 is not a number at least 0 and below 1."),
    ("eval_split", 1.0, "config: eval_split: 1.0 is not a number between 0 and 1."),
    ("resume", "maybe", "config: resume: 'maybe' is not true or false."),
    ("model", 7, "config: model: 7 is not a text."),
    ("model", " ", "config: model: ' ' is not a text."),
    (
        "precision",
        "bf61",
        "config: precision: 'bf61' is not one of bf16, fp32, fp16, fp8, fp8-emulated. "
        "Did you mean 'bf16'?",
    ),
    (
        "method",
        "lroa",
        "config: method: 'lroa' is not one of full, lora, qlora, qat, gptq, preference, rm, prm, "
        "distill. Did you mean 'lora'?",
    ),
    (
        "gradient_checkpointing",
        "ful",
        "config: gradient_checkpointing: 'ful' is not one of none, full, offload, attention, "
        "projections. Did you mean 'full'?",
    ),
    (
        "mesh",
        "data=2,fspd=4",
        "config: mesh: 'data=2,fspd=4' is not a mesh such as data=2,fsdp=4 "
        "(axes are data and fsdp. Did you mean 'fsdp'?).",
    ),
    (
        "mesh",
        "fsdp=0",
        "config: mesh: 'fsdp=0' is not a mesh such as data=2,fsdp=4 "
        "(fsdp needs a size of at least 1, or -1 for the devices left over).",
    ),
    (
        "lora_targets",
        "a(b",
        "config: lora_targets: 'a(b' is not all-linear, module names or a regular expression "
        "(as a regular expression: missing ), unterminated subpattern at position 1).",
    ),
    (
        "roles_to_train",
        [],
        "config: roles_to_train: [] is not a list of names (or one text, separated by commas).",
    ),
    ("sample_prompts", -1, "config: sample_prompts: -1 is not a count or a list of prompts."),
]


@pytest.mark.parametrize(("key", "value", "line"), BAD_VALUES)
def test_bad_value_is_one_line(key, value, line):
    assert error(**{key: value}) == line


@pytest.mark.parametrize(
    "spec", [spec for spec in KEYS.values() if isinstance(spec.metadata["allow"], Limit)]
)
def test_every_range_refuses_a_negative_number(spec):
    assert error(**{spec.name: -1}) == f"config: {spec.name}: -1 is not {allowed(spec)}."


@pytest.mark.parametrize(
    "spec", [spec for spec in KEYS.values() if base_type(spec) in (int, float, bool)]
)
def test_every_typed_key_refuses_a_list(spec):
    assert error(**{spec.name: [1]}).startswith(f"config: {spec.name}: [1] is not ")


def test_unknown_key_names_file_line_and_nearest_key(tmp_path):
    path = written(tmp_path, "model: m\ndataset: d\noutput: o\nlerning_rate: 1\n")
    expected = f"{path}:4: lerning_rate: unknown key. Did you mean 'learning_rate'?"
    assert error(path).startswith(expected)
    assert error(qqq=1) == "config: qqq: unknown key. docs/config.md lists all keys."


def test_flag_errors_name_the_flag():
    line = error(overrides={"learning_rate": "-1"})
    assert line == "--learning-rate: '-1' is not a number above 0."


WITHOUT_EFFECT = [
    ({"method": "full", "lora_r": 8}, "lora_r"),
    ({"method": "full", "lora_r": 16}, "lora_r"),
    ({"method": "full", "merge_lora": True}, "merge_lora"),
    ({"method": "full", "adapter": "a"}, "adapter"),
    ({"adapter": "a", "lora_alpha": 4}, "lora_alpha"),
    ({"adapter_mode": "stack"}, "adapter_mode"),
    ({"merge_precision": "fp32"}, "merge_precision"),
    ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio"),
    ({"eval_dataset": "e", "eval_split": 0.1}, "eval_split"),
    ({"batch_size": 4, "tokens_per_batch": 4096}, "batch_size"),
    ({"resume": True, "overwrite": True}, "overwrite"),
    ({"train_on_prompt": True, "roles_to_train": ["user"]}, "roles_to_train"),
    ({"early_stopping": 3}, "early_stopping"),
    ({"eval_steps": 3}, "eval_steps"),
    ({"lr_restarts": 2}, "lr_restarts"),
    ({"optimizer": "sgd", "adam_beta1": 0.8}, "adam_beta1"),
    ({"sample_prompts": 0, "sample_max_new_tokens": 8}, "sample_max_new_tokens"),
    ({"mesh": "fsdp=1", "device_map": "auto"}, "device_map"),
    ({"gptq_group_size": 64}, "gptq_group_size"),
    ({"method": "full", "gptq_awq": True}, "gptq_awq"),
    ({"method": "gptq", "eval_split": 0.1, "eval_steps": 3}, "eval_steps"),
    ({"method": "gptq", "sample_max_new_tokens": 8}, "sample_max_new_tokens"),
    # 0, false and null are values like others where they are not the default.
    ({"method": "gptq", "save_steps": None}, "save_steps"),
    ({"method": "gptq", "max_grad_norm": None}, "max_grad_norm"),
    ({"optimizer": "lion", "adam_beta1": 0}, "adam_beta1"),
    ({"optimizer": "sgd", "adam_beta2": 0}, "adam_beta2"),
    ({"method": "qlora", "quant_backend": "int8", "quant_double": False}, "quant_double"),
    ({"method": "qat", "gptq_actorder": False}, "gptq_actorder"),
    ({"gptq_symmetric": False}, "gptq_symmetric"),
]


@pytest.mark.parametrize(("keys", "key"), WITHOUT_EFFECT)
def test_a_key_without_effect_is_refused(keys, key):
    line = error(**keys)
    assert f"config: {key}: " in line
    assert f"has no effect: {key} needs " in line
    without = {name: value for name, value in keys.items() if name != key}
    assert Config.load(BASE | without)


TRAINING = [
    spec
    for spec in KEYS.values()
    if spec.metadata["section"] in ("training", "LoRA")
    and spec.name not in ("batch_size", "tokens_per_batch")
]


def some(spec):
    """A value that is more than null, false or 0."""
    if choices(spec):
        return choices(spec)[-1]
    return spec.default or {bool: True, int: 8, float: 0.5}.get(base_type(spec), "x")


@pytest.mark.parametrize("spec", TRAINING, ids=[spec.name for spec in TRAINING])
def test_gptq_takes_no_key_of_training(spec):
    line = error(method="gptq", **{spec.name: some(spec)})
    assert f"has no effect: {spec.name} needs " in line


def test_switching_off_what_is_off_is_no_error():
    off = {"method": "full", "merge_lora": False, "adapter": None, "lora_dropout": 0}
    assert Config.load(BASE | off).method == "full"
    for method in ("gptq", "rm", "prm"):
        assert Config.load(BASE | {"method": method, "sample_prompts": 0}).sample_prompts == 0


def test_off_is_told_by_the_default():
    """Every key that may be null, false or 0 without an effect has that as its default."""
    for spec in KEYS.values():
        if (
            spec.metadata["needs"] is None
            or spec.default
            or spec.name in ("eval_split", "overwrite")
        ):
            continue
        assert spec.default in (None, False, 0), spec.name
        for method in ("full", "gptq", "rm"):
            assert Config.load(BASE | {"method": method, spec.name: spec.default})


def test_sizes_must_fit_each_other():
    line = error(warmup_steps=10, max_steps=5)
    assert line.startswith("config: warmup_steps: 10 is more than max_steps (5)")
    line = error(tokens_per_batch=100)
    assert line.startswith("config: tokens_per_batch: 100 is less than max_seq_length (2048)")


@pytest.mark.parametrize(("key", "value"), refused_table.VALUES)
def test_refused_values_say_why(key, value):
    reason = refused_table.VALUES[key, value]
    assert error(**{key: value}) == f"config: {key}: {value} {reason}."


@pytest.mark.parametrize("key", refused_table.KEYS)
@pytest.mark.parametrize("value", [True, False, "x"])
def test_refused_keys_say_why(key, value):
    assert error(**{key: value}) == f"config: {key}: {refused_table.KEYS[key]}."


def test_refused_and_real_keys_are_apart():
    assert not set(refused_table.KEYS) & set(KEYS)


@pytest.mark.parametrize("key", ["model", "dataset", "output"])
def test_missing_key(key):
    line = error({name: value for name, value in BASE.items() if name != key})
    assert line == f"{key} is missing: give --{key} or `{key}:` in the config file."


BAD_FILES = [
    ("", "{path}: the config is empty; give at least model, dataset and output."),
    ("- a\n", "{path}: the config is not a list of `key: value` lines."),
    ("seed: 1\nseed: 2\n", "{path}:2: seed: the key stands twice in this file; remove one."),
    ("seed: [1\n", "{path}:2: not valid YAML (expected ',' or ']', but got '<stream end>')."),
    ("a: \x07\n", "{path}: not valid YAML (unacceptable character"),
    ("seed: !!python/name:os.system x\n", "{path}:1: not valid YAML (could not determine"),
]


@pytest.mark.parametrize(("text", "line"), BAD_FILES)
def test_bad_files(text, line, tmp_path):
    path = written(tmp_path, text)
    assert error(path).startswith(line.format(path=path))


def test_unreadable_files(tmp_path):
    assert error(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: no such config file."
    assert error(tmp_path) == f"{tmp_path}: cannot be read (Is a directory)."
    (tmp_path / "c.yaml").write_bytes(b"model: \xff\n")
    assert error(tmp_path / "c.yaml") == f"{tmp_path}/c.yaml: not UTF-8 (byte 7)."


def test_output_that_holds_something(tmp_path):
    (tmp_path / "result").touch()
    keys = BASE | {"output": str(tmp_path)}
    with pytest.raises(UserError, match=r"is not empty; go on with --resume"):
        check_output(Config.load(keys))
    assert check_output(Config.load(keys | {"overwrite": True})) == tmp_path
    with pytest.raises(UserError, match=r"holds no run to resume .*but result\)"):
        check_output(Config.load(keys | {"resume": True}))
    (tmp_path / "checkpoint-3").mkdir()
    assert check_output(Config.load(keys | {"resume": True})) == tmp_path
    assert (tmp_path / "result").exists()


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for name, line in [("file", "is a file; name a folder"), ("file/out", "cannot be written")]:
        with pytest.raises(UserError, match=line):
            check_output(Config.load(BASE | {"output": str(tmp_path / name)}))
    out = tmp_path / "new" / "out"
    assert check_output(Config.load(BASE | {"output": str(out)})) == out
    assert out.is_dir() and not any(out.iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path):
    keys = {} if Config.load(path).method == "gptq" else {"max_steps": 2}
    assert Config.load(path, keys).max_steps == keys.get("max_steps")


def test_docs_list_every_key():
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "tools" / "config_docs.py")
    assert spec is not None and spec.loader is not None
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    stale = "run: python tools/config_docs.py"
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == docs.page(), stale
