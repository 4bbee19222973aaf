"""Contract of the command line: one flag for each key, verbs, one-line errors with exit code 2."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

import mud_puppy as mp
from mud_puppy import cli
from mud_puppy.commands import COMMANDS
from mud_puppy.config import KEYS, Config, flag
from mud_puppy.config.schema import base_type, choices, keys_of
from mud_puppy.errors import UserError

EXAMPLES = {int: "2", float: "0.5", str: "text", tuple: "user,tool"}


@pytest.fixture
def trained(monkeypatch):
    """The configs that `train` was called with, instead of training."""
    calls: list[Config] = []
    fake = types.SimpleNamespace(train=calls.append)
    monkeypatch.setitem(sys.modules, "mud_puppy.train", fake)
    return calls


def refused(capsys, *argv: str) -> str:
    """The error line of a command that must exit with 2 and print nothing else."""
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mud-puppy: error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("mud-puppy: error: ").rstrip("\n")


def option_flags(parser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def test_flags_and_keys_are_one_to_one():
    own = {"-h", "--help", "--version", "--config"}
    negative = {flag(f"no_{k}") for k, spec in KEYS.items() if base_type(spec) is bool}
    negative |= {flag(f"no_{k}") for k, spec in KEYS.items() if spec.metadata["off"] is not None}
    assert option_flags(cli.train_parser()) == {flag(key) for key in KEYS} | negative | own


def example(spec) -> str:
    if choices(spec):
        return next((c for c in choices(spec) if c != spec.default), choices(spec)[0])
    if spec.name == "mesh":
        return "data=2,fsdp=4"
    if spec.name == "preference":
        return "ipo"
    if spec.name in ("label_smoothing", "f_alpha", "distill_beta"):
        return "0.1"
    return EXAMPLES[base_type(spec)]


PREFERENCE = {"method": "preference"}
DISTILL = {"method": "distill", "teacher": "t"}
CONTEXT = {
    "lr_restarts": {"lr_scheduler": "cosine_with_restarts"},
    "lr_power": {"lr_scheduler": "polynomial"},
    "eval_steps": {"eval_split": 0.1},
    "early_stopping": {"eval_split": 0.1},
    "adapter_mode": {"adapter": "a"},
    "added_tokens": {"method": "full"},
    "merge_precision": {"merge_lora": True},
    "tokens_per_batch": {"max_seq_length": 2},
    "quant_backend": {"method": "qlora"},
    "quant_group": {"method": "qlora"},
    "quant_double": {"method": "qlora"},
    "quant_embeddings": {"method": "qlora"},
    **{key: {"method": "gptq"} for key in KEYS if key.startswith("gptq_")},
    **{key: PREFERENCE for key in "preference beta ld_alpha label_smoothing f_divergence".split()},
    "tune": PREFERENCE,
    "shared_prefix": PREFERENCE,
    "reference": PREFERENCE | {"tune": "full"},
    "f_alpha": PREFERENCE | {"f_divergence": "alpha_divergence"},
    "discopop_tau": PREFERENCE | {"preference": "discopop"},
    "simpo_gamma": PREFERENCE | {"preference": "simpo"},
    "simpo_alpha": PREFERENCE | {"preference": "simpo"},
    "cpo_alpha": PREFERENCE | {"preference": "cpo"},
    "desirable_weight": PREFERENCE | {"preference": "kto"},
    "undesirable_weight": PREFERENCE | {"preference": "kto"},
    "reward": {"method": "rm"},
    "reward_centering": {"method": "rm"},
    **{key: DISTILL for key in KEYS if key.startswith("distill_")},
    "teacher": {"method": "distill"},
    "teacher_logits": {"method": "distill"},
    "teacher_quant": DISTILL,
    "distill_top_k": DISTILL | {"teacher_logits": "t"},
    "rollout_max_new_tokens": DISTILL | {"distill_on_policy": 0.5},
    "rollout_temperature": DISTILL | {"distill_on_policy": 0.5},
    **{f"qat_{key}": {"method": "qat"} for key in "format group activations ranges lora".split()},
}


@pytest.mark.parametrize("spec", KEYS.values(), ids=list(KEYS))
def test_every_flag_reaches_its_key(spec, trained, tmp_path):
    base = {"model": "m", "dataset": "d", "output": str(tmp_path / "o")} | CONTEXT.get(
        spec.name, {}
    )
    base.pop(spec.name, None)
    if base_type(spec) is bool:
        name = flag(spec.name) if not spec.default else flag(f"no_{spec.name}")
        words, value = [name], not spec.default
    else:
        words = [flag(spec.name), str(tmp_path / "o") if spec.name == "output" else example(spec)]
        value = words[1]
    for key, text in base.items():
        words += [flag(key)] if text is True else [flag(key), str(text)]
    assert cli.main(words) == 0
    assert trained == [Config.load(base | {spec.name: value})]
    assert getattr(trained[0], spec.name) != spec.default or spec.name == "device_map"


def test_positional_form(trained, tmp_path):
    out = str(tmp_path / "o")
    assert cli.main(["m", "d.jsonl", "--method", "full", "--output", out]) == 0
    assert trained == [
        Config.load({"model": "m", "dataset": "d.jsonl", "method": "full", "output": out})
    ]


def test_a_model_may_name_a_revision(trained, tmp_path, capsys):
    assert cli.main(["org/name@refs/pr/3", "d.jsonl", "--output", str(tmp_path / "o")]) == 0
    assert trained[0].model == "org/name@refs/pr/3"
    assert Config.load(trained[0].to_dict()).model == "org/name@refs/pr/3"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "org/name@revision" in capsys.readouterr().out


def test_flags_win_over_the_config_file(trained, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\ndataset: d\noutput: {tmp_path / 'o'}\nseed: 3\nlora_r: 4\n")
    argv = ["--config", str(path), "--seed", "9", "--no-pack-sequences"]
    argv += ["--no-gradient-checkpointing", "--sample-prompts", "a, b", "--sample-prompts", "c"]
    assert cli.train_main(argv) == 0
    [config] = trained
    assert (config.seed, config.lora_r, config.pack_sequences) == (9, 4, False)
    assert (config.gradient_checkpointing, config.sample_prompts) == ("none", ("a, b", "c"))


def test_both_commands_are_the_same_engine(trained, tmp_path):
    argv = ["m", "d", "--output", str(tmp_path / "o")]
    assert cli.main(argv) == cli.train_main(argv) == 0
    assert trained[0] == trained[1]


BAD_COMMANDS = {
    "unknown flag": (
        ["m", "d", "--lerning-rate", "1"],
        "unknown flag --lerning-rate. Did you mean",
    ),
    "unknown flag of a verb": (
        ["merge", "m", "a", "--ouput", "o"],
        "unknown flag --ouput. Did you",
    ),
    "negative rate": (
        ["m", "d", "--output", "o", "--learning-rate", "-1"],
        "--learning-rate: '-1' is",
    ),
    "zero batch": (
        ["m", "d", "--output", "o", "--batch-size", "0"],
        "--batch-size: '0' is not a whole",
    ),
    "not a number": (
        ["m", "d", "--output", "o", "--epochs", "few"],
        "--epochs: 'few' is not a number",
    ),
    "unknown choice": (
        ["m", "d", "--output", "o", "--optimizer", "adam"],
        "--optimizer: 'adam' is not",
    ),
    "later method": (["m", "d", "--output", "o", "--method", "rl"], "--method: rl arrives"),
    "fp8 of codes": (
        ["m", "d", "--output", "o", "--precision", "fp8", "--method", "qlora"],
        "--precision: nf4 codes have no float8 products; use bf16, or",
    ),
    "compile": (["m", "d", "--output", "o", "--compile"], "--compile: has no meaning here: every"),
    "quant backend": (
        ["m", "d", "--output", "o", "--method", "qlora", "--quant-backend", "nf5"],
        "--quant-backend: 'nf5' is not one of nf4",
    ),
    "gptq flag": (
        ["m", "d", "--output", "o", "--gptq-actorder"],
        "--gptq-actorder: true has no effect: gptq_actorder needs method gptq.",
    ),
    "pipeline": (["m", "d", "--output", "o", "--device-map", "pipeline"], "--device-map: pipeline"),
    "no value": (["m", "d", "--output"], "--output: expected one argument; see mud-puppy --help."),
    "no output": (["m", "d"], "output is missing: give --output or"),
    "no dataset": (["m", "--output", "o"], "dataset is missing: give --dataset or"),
    "no prompt": (["generate", "m"], "prompt is missing: give --prompt."),
    "bad top-p": (
        ["generate", "m", "--prompt", "p", "--top-p", "2"],
        "--top-p: '2' is not a number",
    ),
    "bad n": (
        ["preview", "d", "--model", "m", "-n", "0"],
        "-n: '0' is not a whole number at least 1.",
    ),
    "bad precision": (
        ["merge", "m", "a", "--output", "o", "--merge-precision", "int5"],
        "--merge-pre",
    ),
    "misspelt verb": (
        ["mrege", "m", "a", "--output", "o"],
        "unexpected argument 'a'. Did you mean 'm",
    ),
    "model twice": (
        ["m", "d", "--model", "n", "--output", "o"],
        "MODEL and --model are both given",
    ),
    "config missing": (["--config", "no.yaml"], "no.yaml: no such config file."),
    "no effect": (
        ["m", "d", "--output", "o", "--method", "full", "--lora-r", "8"],
        "--lora-r: '8' has",
    ),
    "excluding": (
        ["m", "d", "--output", "o", "--resume", "--overwrite"],
        "--overwrite: true has no",
    ),
    "warmup": (
        ["m", "d", "--output", "o", "--warmup-steps", "9", "--max-steps", "3"],
        "--warmup-steps: 9 is more than max_steps (3)",
    ),
}


@pytest.mark.parametrize(("argv", "line"), BAD_COMMANDS.values(), ids=list(BAD_COMMANDS))
def test_bad_commands_are_one_line(argv, line, capsys, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *argv).startswith(line)
    assert trained == []
    assert list(tmp_path.iterdir()) == []


BAD_YAML = {
    "unknown key": (
        "model: m\nlearning_rat: 1\n",
        "c.yaml:2: learning_rat: unknown key. Did you mean",
    ),
    "bad value": ("model: m\nseed: -4\n", "c.yaml:2: seed: -4 is not a whole number at least 0."),
    "bad YAML": ("model: [m\n", "c.yaml:2: not valid YAML"),
    "empty": ("", "c.yaml: the config is empty"),
    "later method": (
        "method: rl\n",
        "c.yaml:1: method: rl arrives with the reinforcement-learning issue",
    ),
    "compile": ("compile: false\n", "c.yaml:1: compile: has no meaning here"),
}


@pytest.mark.parametrize(("text", "line"), BAD_YAML.values(), ids=list(BAD_YAML))
def test_bad_config_files_are_one_line(text, line, capsys, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    assert refused(capsys, "--config", "c.yaml").startswith(line)
    assert trained == []


def test_outputs_that_cannot_be_used(capsys, trained, tmp_path):
    (tmp_path / "file").touch()
    run = ["m", "d", "--output"]
    assert "is not empty; go on with --resume" in refused(capsys, *run, str(tmp_path))
    assert "is a file; name a folder" in refused(capsys, *run, str(tmp_path / "file"))
    assert "cannot be written" in refused(capsys, *run, str(tmp_path / "file" / "out"))
    merge = ["merge", "m", "a", "--output", str(tmp_path)]
    assert refused(capsys, *merge) == f"output {tmp_path}: is not empty; name another folder."
    assert trained == []
    (tmp_path / "config.yaml").touch()
    assert cli.main([*run, str(tmp_path), "--resume"]) == 0


def test_an_error_of_a_room_is_one_line(capsys, monkeypatch, tmp_path):
    def fail(config):
        raise UserError("d.jsonl:3: not JSON\nsecond line")

    monkeypatch.setitem(sys.modules, "mud_puppy.train", types.SimpleNamespace(train=fail))
    argv = ["m", "d", "--output", str(tmp_path / "o")]
    assert refused(capsys, *argv) == "d.jsonl:3: not JSON second line"


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def fail(config):
        raise KeyError("bug")

    monkeypatch.setitem(sys.modules, "mud_puppy.train", types.SimpleNamespace(train=fail))
    with pytest.raises(KeyError):
        cli.main(["m", "d", "--output", str(tmp_path / "o")])


def test_interrupt(capsys, monkeypatch, tmp_path):
    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "mud_puppy.train", types.SimpleNamespace(train=stop))
    assert cli.main(["m", "d", "--output", str(tmp_path / "o")]) == 130
    assert capsys.readouterr().err == "mud-puppy: interrupted\n"


def test_merge_and_export_call_their_room(monkeypatch, capsys, tmp_path):
    calls = []
    fake = types.SimpleNamespace(
        merge_adapter=lambda *args: calls.append(args),
        export_run=lambda *args, **settings: calls.append((*args, settings)),
    )
    monkeypatch.setitem(sys.modules, "mud_puppy.results", fake)
    monkeypatch.setenv("HOME", str(tmp_path))
    merged, exported = "~/merged", str(tmp_path / "exported")
    assert cli.main(["merge", "m", "a", "--output", merged, "--merge-precision", "fp32"]) == 0
    assert cli.main(["export", "run", "--output", exported, "--step", "7", "--merge-lora"]) == 0
    named = ["export", "run/checkpoint-9/", "--output", exported]
    assert cli.main(named) == 0
    assert calls == [
        ("m", "a", tmp_path / "merged", "float32", None, False),
        ("run", Path(exported), {"step": 7, "merge": True}),
        ("run", Path(exported), {"step": 9, "merge": False}),
    ]
    assert (tmp_path / "merged").is_dir()
    assert merged in capsys.readouterr().out
    assert "names the step already" in refused(capsys, *named, "--step", "9")


@pytest.fixture
def opened(monkeypatch):
    """Stands in for loading: what was opened, in order."""
    seen: list = []
    monkeypatch.setattr(
        mp, "load", lambda *a, **k: seen.append((a, k)) or ("M", "P"), raising=False
    )
    monkeypatch.setattr(mp, "load_adapter", lambda *a: seen.append(a) or "P+A", raising=False)
    monkeypatch.setattr(mp, "load_tokenizer", lambda *a, **k: "T", raising=False)
    monkeypatch.setattr("mud_puppy.commands.talk.check_words", lambda *a: None)
    return seen


def test_generate(opened, monkeypatch, capsys):
    calls = []

    def generate(*args, **settings):
        calls.append((*args, settings))
        return ["one", "two"]

    monkeypatch.setattr(mp, "generate", generate, raising=False)
    argv = ["generate", "m", "--adapter", "a", "--prompt", "x, y", "--prompt", "z", "--precision"]
    assert cli.main([*argv, "fp32", "--temperature", "0.5", "--no-chat-template"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert opened == [(("m", "float32"), {"trust_remote_code": False}), ("P", "a")]
    settings = {"max_new_tokens": 256, "temperature": 0.5, "top_k": 0, "top_p": 1.0, "seed": 0}
    assert calls == [("M", "P+A", "T", ("x, y", "z"), settings | {"chat": False})]


def test_every_verb_has_help(capsys):
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert all(flag(key) in printed for key in keys_of(command.keys))
        assert command.help


def test_help_lists_keys_and_verbs(capsys):
    for argv in ([], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {verb}" in printed for verb in COMMANDS)
        assert all(flag(key) in printed for key in KEYS)


def test_module_form_without_importing_jax():
    code = (
        "import sys; from mud_puppy.cli import main; code = main(['m', 'd', '--lora-rr', '1']);"
        "assert not {'jax', 'numpy', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    argv = [sys.executable, "-m", "mud_puppy", "--version"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith("mud-puppy ")
