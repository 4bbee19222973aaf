"""Whatever a user gets wrong is one line on stderr and exit code 2; nothing is written or lost.

Every case goes through the real entry points, with a model folder and data that are sound but for
the one thing that its table names.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import mud_puppy as mp
from mud_puppy.cli import main

ERROR = "mud-puppy: error: "
SMALL = {
    "max_seq_length": 64,
    "batch_size": 2,
    "max_steps": 2,
    "precision": "fp32",
    "sample_prompts": 0,
    "mesh": "data=1,fsdp=1",
}
TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
UP = "model.layers.1.mlp.up_proj.weight"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Bench:
    """A sound model, data set and finished LoRA run, each a copy that a case may damage."""

    root: Path
    model: Path
    data: Path
    run: Path
    out: Path

    def train(self, *flags: str, **named: Any) -> list[str]:
        """The command line of a small run; `named` replaces model, dataset, output or SMALL's."""
        keys = {"model": self.model, "dataset": self.data, "output": self.out} | SMALL | named
        given = {key: value for key, value in keys.items() if value is not None}
        pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in given.items()]
        return [word for pair in pairs for word in pair] + list(flags)


@pytest.fixture(scope="module")
def finished(chat_model, chats, tmp_path_factory):
    """The output folder of a run of two steps."""
    keys = {"model": str(chat_model), "dataset": str(chats), "lora_r": 4} | SMALL
    return mp.train(keys | {"output": str(tmp_path_factory.mktemp("run"))}).output


@pytest.fixture
def bench(chat_model, chats, finished, tmp_path):
    shutil.copytree(chat_model, tmp_path / "m")
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(chats, tmp_path / "d.jsonl")
    return Bench(*(tmp_path / name for name in ("", "m", "d.jsonl", "run", "out")))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No case here names anything of the hub, so none may ask it."""

    def asked(*args, **settings):
        raise AssertionError(f"asked the hub: {args}")

    monkeypatch.setattr("mud_puppy.data.rows.read_hub", asked)
    monkeypatch.setattr("mud_puppy.model.files._download", asked)


@pytest.fixture
def refused(bench, capsys, monkeypatch):
    """Runs a command line that must be refused, and gives back its line."""
    # The command line adds a handler for the stderr of its process, which capsys replaces.
    monkeypatch.setattr(logging.getLogger("mud_puppy"), "handlers", [])

    def run(argv: list[Any], *parts: str) -> None:
        before = files(bench.root)
        assert main([str(word) for word in argv]) == 2
        printed = capsys.readouterr()
        assert_one_line(printed.err, parts)
        assert printed.out == ""
        assert files(bench.root) == before, "something was written or lost"

    return run


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def assert_one_line(printed: str, parts: tuple[str, ...]) -> None:
    *log, line = printed.splitlines()
    assert line.startswith(ERROR), printed
    assert not [other for other in log if other.startswith(ERROR)]
    assert "Traceback" not in printed
    assert all(part in line for part in parts), (line, parts)


def chat(*turns: tuple[str, str]) -> bytes:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages}).encode() + b"\n"


GOOD = chat(("user", "hi"), ("assistant", "ho"))
SKIP = "on_bad_rows skip"

# name: (file, content, flags, what the line says)
DATA: dict[str, tuple[str, bytes, list[str], tuple[str, ...]]] = {
    "empty": ("d.jsonl", b"", [], ("d.jsonl holds no rows", "nothing to train on")),
    "blank": ("d.jsonl", b"\n \n", [], ("d.jsonl holds no rows",)),
    "broken JSON": (
        "d.jsonl",
        GOOD * 2 + b'{"messages": [\n' + GOOD,
        [],
        ("d.jsonl:3: not JSON", "column 15", SKIP),
    ),
    "no object": ("d.jsonl", GOOD + b"[1]\n", [], ("d.jsonl:2: a row must be an object", SKIP)),
    "bad UTF-8": (
        "d.jsonl",
        GOOD + b'{"text": "\xff"}\n',
        [],
        ("d.jsonl:2: not UTF-8: byte 0xff", "save the file as UTF-8"),
    ),
    "UTF-16": ("d.jsonl", GOOD.decode().encode("utf-16"), [], ("d.jsonl:1: not UTF-8",)),
    "no assistant": (
        "d.jsonl",
        GOOD + chat(("user", "hi")),
        [],
        ("d.jsonl:2: no assistant turn to train on in: [user] hi", SKIP),
    ),
    "unknown role": (
        "d.jsonl",
        chat(("user", "hi"), ("asistant", "ho")),
        [],
        ("d.jsonl:1: messages[1]: unknown role 'asistant'", "Did you mean 'assistant'?"),
    ),
    "content is a number": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": 5}]}',
        [],
        ("d.jsonl:1: messages[0]: content must be text, not a number (5)",),
    ),
    "columns": (
        "d.jsonl",
        b'{"question": "a", "answer": "b"}\n',
        [],
        ("d.jsonl:1: no known format has the columns 'question', 'answer'", "prompt + completion"),
    ),
    "all rows bad": (
        "d.jsonl",
        b"1\n[]\n",
        ["--on-bad-rows", "skip"],
        ("d.jsonl: all 2 rows are bad; the first: ", "d.jsonl:1: a row must be an object"),
    ),
    "all rows without answer": (
        "d.jsonl",
        chat(("user", "hi")),
        ["--on-bad-rows", "skip"],
        ("none of 1 rows can be trained on", "d.jsonl:1: no assistant turn"),
    ),
    "unknown kind": ("d.xlsx", b"x", [], ("d.xlsx: unknown kind of file; known are .jsonl",)),
    "truncated JSON": ("d.json", b'[{"text": "a"},', [], ("d.json:1: not JSON",)),
    "CSV row": ("d.csv", b"text,id\nx\n", [], ("d.csv:2: 1 fields where the header has 2",)),
    "parquet": ("d.parquet", b"PAR1", [], ("d.parquet: not a readable parquet file",)),
    "tool calls, no template": (
        "d.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
        b'"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}]}',
        ["--no-chat-template"],
        ("d.jsonl:1: tool_calls can only be written by a chat template",),
    ),
    "nothing to hold out": (
        "d.jsonl",
        GOOD,
        ["--eval-split", "0.5"],
        ("cannot hold out 1 of 1 examples", "both sides need at least one"),
    ),
    "longer than the model": (
        "d.jsonl",
        GOOD + chat(("user", "x" * 600), ("assistant", "y")),
        ["--max-seq-length", "4096"],
        ("max_seq_length 4096: ", "d.jsonl:2 has 6", "the model has 512 positions; set"),
    ),
}


@pytest.mark.parametrize(("name", "content", "flags", "says"), DATA.values(), ids=list(DATA))
def test_data(name, content, flags, says, bench, refused):
    path = bench.root / name
    path.write_bytes(content)
    refused(bench.train(*flags, dataset=path), *says)


# flags on top of a sound run: what the line says
FLAGS: dict[str, tuple[str, ...]] = {
    "--learning-rate -1": ("--learning-rate: '-1' is not a number above 0",),
    "--batch-size 0": ("--batch-size: '0' is not a whole number at least 1",),
    "--optimizer adam": ("--optimizer: 'adam' is not one of adamw", "Did you mean 'adamw'?"),
    "--method lorra": ("--method: 'lorra' is not one of full, lora", "Did you mean 'lora'?"),
    "--method gptq": ("--max-steps: '2' has no effect: max_steps needs a method other than gptq",),
    "--gptq-bits 3": ("--gptq-bits: '3' has no effect: gptq_bits needs method gptq",),
    "--quant-backend int8": ("--quant-backend: 'int8' has no effect", "needs method qlora"),
    "--method qlora --quant-group 48": ("_proj/weight cannot be quantized", "groups that fit"),
    "--precision fp8": ("cpu has no float8 products", "use --precision bf16"),
    "--method qat --precision fp8": ("--precision: method qat rounds the weights to integers",),
    "--stream": ("--stream: arrives with the scaling issue; remove it",),
    "--compile": ("--compile: has no meaning here", "remove it"),
    "--lerning-rate 1": ("unknown flag --lerning-rate.", "Did you mean '--learning-rate'?"),
    "-lora-r 4": ("unknown flag -lora-r.", "Did you mean '--lora-r'?"),
    "--eval-steps 3": ("--eval-steps: '3' has no effect", "needs eval_dataset or eval_split"),
    "--resume --overwrite": ("--overwrite: true has no effect", "give one of the two"),
    "--mesh dta=2": ("--mesh: 'dta=2' is not a mesh", "Did you mean 'data'?"),
    "--mesh data=16": ("mesh 'data=16' needs 16 devices, 8 are here; make it smaller",),
    "--mesh data=3": ("batch_size 2 rows cannot be split over 3 devices", "a multiple of 3"),
    "--lora-targets q_prj": ("LoRA target 'q_prj' matches no module", "Did you mean 'q_proj'?"),
    "--lora-targets lm_head": ("LoRA target 'lm_head'", "tied to its embedding; leave it out"),
    "--lora-targets (q_proj": ("--lora-targets: '(q_proj'", "as a regular expression: missing )"),
    "--roles-to-train assitant": ("unknown role 'assitant'", "Did you mean 'assistant'?"),
    "--roles-to-train tool": ("d.jsonl:1: no tool turn to train on",),
    "--max-seq-length 8": ("none of 64 rows can be trained on", "max_seq_length cuts off all"),
    "--on-long stop --max-seq-length 9": ("d.jsonl:1: 35 tokens are more", "max_seq_length 9"),
    "--sample-max-new-tokens 512 --sample-prompts 1": (
        "sample_max_new_tokens 512: the model has 512 positions",
        "lower it",
    ),
    f"--sample-prompts {'x' * 600}": (
        "sample_prompts: prompt 1 has 6",
        "the 512 positions of the model: shorten it",
    ),
    "--sample-prompts \udcff": ("--sample-prompts: ['0', '\\udcff'] is not a count or a list",),
    "--adapter nowhere": ("nowhere: no such adapter folder", "downloaded first"),
    "--adapter run --method full": ("--adapter: 'run' has no effect: adapter needs method lora",),
    "--eval-dataset d.json": ("d.json does not exist; check the path. Did you mean 'd.jsonl'?",),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags, bench, refused, monkeypatch):
    monkeypatch.chdir(bench.root)
    refused(bench.train(*flags.split(" ")), *FLAGS[flags])


# name: (content of c.yaml, what the line says)
YAML: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "unknown key": (
        b"model: m\nlearning_rat: 1\n",
        ("c.yaml:2: learning_rat: unknown key. Did you mean 'learning_rate'?",),
    ),
    "syntax": (b"model: m\n  x: [\n", ("c.yaml:2: not valid YAML (mapping values are not",)),
    "a list": (b"- a\n", ("c.yaml: the config is not a list of `key: value` lines",)),
    "twice": (b"seed: 1\nseed: 2\n", ("c.yaml:2: seed: the key stands twice", "remove one")),
    "not UTF-8": (b"model: \xff\n", ("c.yaml: not UTF-8 (byte 7)",)),
    "code": (b"model: !!python/object:os.system x\n", ("c.yaml:1: not valid YAML",)),
    "no number": (b"learning_rate: .nan\n", ("c.yaml:1: learning_rate: nan is not a number",)),
    "empty": (b"", ("c.yaml: the config is empty; give at least model, dataset and output",)),
}


@pytest.mark.parametrize(("content", "says"), YAML.values(), ids=list(YAML))
def test_config_files(content, says, bench, refused):
    path = bench.root / "c.yaml"
    path.write_bytes(content)
    refused(["--config", path, "--output", bench.out], *says)


def test_config_file_missing(bench, refused):
    (bench.root / "lora.yaml").touch()
    refused(["--config", bench.root / "lor.yaml"], "no such config file.", "mean 'lora.yaml'?")


# name: (fields of config.json that change; None removes, what the line says)
CONFIG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "architecture": (
        {"model_type": "gpt2"},
        ("m/config.json: model_type 'gpt2' has no table", "families that load: llama"),
    ),
    "no architecture": ({"model_type": None}, ("m/config.json: model_type 'None' has no table",)),
    "unread field": (
        {"attn_logit_softcapping": 30.0},
        ("llama fields that are not understood: attn_logit_softcapping=30.0", "remove them from"),
    ),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ("config.json has a quantization_config, but no tensor is quantized",),
    ),
    "kv heads": (
        {"num_key_value_heads": 3},
        ("num_attention_heads 4 is not a multiple of num_key_value_heads 3",),
    ),
    "head_dim": (
        {"head_dim": 16},
        ("tensor 'model.layers.0.self_attn.q_proj.weight' has shape (32, 32)", "(64, 32)"),
    ),
    "odd head_dim": ({"head_dim": 5}, ("m/config.json: ", "head_dim`=5")),
    "text for a number": ({"hidden_size": "32"}, ("m/config.json: ", "'hidden_size' expected int")),
    "negative": ({"hidden_size": -32}, ("hidden_size must be at least 1, not -32",)),
    "window": (
        {"model_type": "mistral", "sliding_window": -3},
        ("sliding_window must be at least 1 or null, not -3",),
    ),
    "rope kind": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}, "rope_scaling": None},
        ("m/config.json: ", "longrope"),
    ),
    "rope theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}, "rope_theta": None},
        ("rope_parameters: rope_theta must be a number, not 'x'",),
    ),
    "activation": ({"hidden_act": "swish2"}, ("hidden_act 'swish2' is not supported", "silu")),
    "layers": (
        {"num_hidden_layers": 3},
        ("tensor 'model.layers.2.input_layernorm.weight' (32,) is missing",),
    ),
    "untied": ({"tie_word_embeddings": False}, ("tensor 'lm_head.weight' (258, 32) is missing",)),
    "vocabulary": (
        {"vocab_size": 257},
        ("d.jsonl:1: token 257 ('<|im_end|>') is outside the model's vocabulary of 257",),
    ),
    "positions": (
        {"max_position_embeddings": 16},
        ("max_seq_length 64: ", "d.jsonl:1 has 35 tokens", "16 positions; set max_seq_length to"),
    ),
}


@pytest.mark.parametrize(("fields", "says"), CONFIG.values(), ids=list(CONFIG))
def test_model_configs(fields, says, bench, refused):
    edit(bench.model / "config.json", fields)
    refused(bench.train(), *says)


def edit(path: Path, fields: dict[str, Any]) -> None:
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]], name: str = TENSORS) -> Any:
    """A damage that rewrites a safetensors file."""

    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})

    return damage


def content(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, count: int) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def gone(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def renamed(old: str, new: str) -> Any:
    return lambda folder: (folder / old).rename(folder / new)


def index(shard: Any) -> Any:
    return content(INDEX, json.dumps({"weight_map": {"a": shard, UP: "b.safetensors"}}).encode())


def template(text: str) -> Any:
    return content("chat_template.jinja", text.encode())


# name: (damage to the model's folder, what the line says)
MODEL: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (gone("config.json"), ("m/config.json: no such file", "no model folder")),
    "config is no JSON": (content("config.json", b'{"a":'), ("config.json: not readable as JSON",)),
    "config is a list": (content("config.json", b"[]"), ("config.json: expected a JSON object",)),
    "missing tensor": (
        tensors(lambda t: {k: v for k, v in t.items() if k != UP}),
        (f"tensor '{UP}' (48, 32) is missing", "the checkpoint is incomplete"),
    ),
    "wrong shape": (
        tensors(lambda t: t | {UP: np.zeros((48, 31), np.float32)}),
        (f"tensor '{UP}' has shape (48, 31), but the config says (48, 32)",),
    ),
    "tensor left over": (
        tensors(lambda t: t | {"model.x": np.zeros(2, np.float32)}),
        ("tensor 'model.x' (2,) has no place in this llama model",),
    ),
    "dtype": (
        tensors(lambda t: t | {UP: np.zeros((48, 32), np.int8)}),
        (f"tensor '{UP}' is stored as I8", "BF16, F16, F32"),
    ),
    "truncated": (cut(TENSORS, 100), (TENSORS, "not a whole safetensors file", "download it")),
    "no safetensors": (content(TENSORS, b"<html>"), ("not a whole safetensors file",)),
    "pickle": (
        renamed(TENSORS, "pytorch_model.bin"),
        ("only pickled weights (pytorch_model.bin)", "never opened", "convert it"),
    ),
    "no weights": (gone(TENSORS), (f"no {TENSORS}", "download the model again")),
    "missing shard": (
        index("b.safetensors"),
        (f"{INDEX}: shard b.safetensors is missing; download the model again",),
    ),
    "escaping shard": (index("../b.safetensors"), (f"{INDEX}: '../b", "beside the index")),
    "shard is a number": (index(3), (f"{INDEX}: '3' is no safetensors file",)),
    "shard is a list": (index([]), (f"{INDEX}: '[]' is no safetensors file",)),
    "no weight map": (content(INDEX, b"{}"), (f"{INDEX}: has no 'weight_map'", "download")),
    "no tokenizer": (
        gone("tokenizer.json", "tokenizer_config.json"),
        ("m: the tokenizer does not load", "copy or download them again"),
    ),
    "tokenizer is no JSON": (content("tokenizer.json", b"{"), ("m: the tokenizer does not load",)),
    "template syntax": (template("{% for m in %}"), ("d.jsonl:1: the chat template refuses",)),
    "template fails": (template("{{ 1 / 0 }}"), ("d.jsonl:1: ", "division by zero")),
    "template hides the turns": (
        template("hello"),
        ("d.jsonl:1: cannot tell which part", "messages[1]", "or train without it"),
    ),
    "adapter only": (
        renamed("config.json", ADAPTER_CONFIG),
        ("m: a PEFT adapter, not a model: load its base model",),
    ),
}


@pytest.mark.parametrize(("damage", "says"), MODEL.values(), ids=list(MODEL))
def test_model_files(damage, says, bench, refused):
    damage(bench.model)
    refused(bench.train(), *says)


def test_generation_config_is_read_before_the_run_begins(bench, refused):
    path = bench.model / "generation_config.json"
    path.write_text("{")
    refused(bench.train(sample_prompts=1), "generation_config.json: not readable as JSON")
    path.write_text('{"eos_token_id": ["x"]}')
    refused(bench.train(sample_prompts=1), "m: eos_token_id ['x'] is no token id")


# name: (damage to the adapter's folder, what the line says)
ADAPTERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "config is no JSON": (content(ADAPTER_CONFIG, b"{"), (f"{ADAPTER_CONFIG}: not readable",)),
    "no config": (gone(ADAPTER_CONFIG), (f"run: no {ADAPTER_CONFIG} here",)),
    "another kind": (
        lambda folder: edit(folder / ADAPTER_CONFIG, {"peft_type": "IA3"}),
        ("peft_type is not LORA; only LoRA adapters load",),
    ),
    "rank": (
        lambda folder: edit(folder / ADAPTER_CONFIG, {"r": 8}),
        ("lora_A.weight' is (4, 48)", "say (8, 48)"),
    ),
    "pattern": (
        lambda folder: edit(folder / ADAPTER_CONFIG, {"rank_pattern": {"*": 2}}),
        (f"{ADAPTER_CONFIG}: rank_pattern: '*' is no regular expression",),
    ),
    "dropout": (
        lambda folder: edit(folder / ADAPTER_CONFIG, {"lora_dropout": "x"}),
        ("lora_dropout must be a number, not 'x'",),
    ),
    "another model's shape": (
        tensors(lambda t: t | {f"{Q}.lora_A.weight": np.zeros((4, 64), np.float32)}, ADAPTER),
        (f"tensor '{Q}.lora_A.weight' is (4, 64)", "say (4, 32)"),
    ),
    "another model's layers": (
        tensors(lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, ADAPTER),
        ("adapts module 'model.layers.7.", "which this model has not", "was made for"),
    ),
    "half a pair": (
        tensors(lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, ADAPTER),
        (f"tensor '{Q}.lora_B.weight' is missing",),
    ),
    "empty": (tensors(lambda t: {}, ADAPTER), (f"{ADAPTER}: holds no tensors",)),
    "truncated": (cut(ADAPTER, 9), (f"{ADAPTER}: not a whole safetensors file", "download")),
    "pickle": (renamed(ADAPTER, "adapter_model.bin"), ("pickles are never opened",)),
}


@pytest.mark.parametrize(("damage", "says"), ADAPTERS.values(), ids=list(ADAPTERS))
def test_adapters(damage, says, bench, refused):
    damage(bench.run)
    refused(bench.train("--adapter", str(bench.run)), *says)


def test_merge_with_an_adapter_of_another_model(bench, refused):
    ADAPTERS["another model's shape"][0](bench.run)
    argv = ["merge", bench.model, bench.run, "--output", bench.out]
    refused(argv, f"tensor '{Q}.lora_A.weight' is (4, 64)")


def below_a_file(bench: Bench) -> list[str]:
    return bench.train(output=bench.data / "out")


def a_long_name(bench: Bench) -> list[str]:
    return bench.train(output=bench.root / ("x" * 300))


def somebody_elses_folder(bench: Bench) -> list[str]:
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("mine")
    return bench.train("--resume")


def overwritten_model(bench: Bench) -> list[str]:
    return bench.train("--overwrite", output=bench.model)


def overwritten_base(bench: Bench) -> list[str]:
    shutil.move(bench.model, bench.run / "merged")
    return bench.train("--overwrite", model=bench.run / "merged", output=bench.run)


def overwritten_adapter(bench: Bench) -> list[str]:
    return bench.train("--overwrite", "--adapter", str(bench.run), output=bench.run)


def overwritten_by_a_bad_run(bench: Bench) -> list[str]:
    (bench.model / TENSORS).write_bytes(b"")
    return bench.train("--overwrite", output=bench.run)


# name: (command line, what the line says)
OUTPUT: dict[str, tuple[Callable[[Bench], list[Any]], tuple[str, ...]]] = {
    "a file": (lambda b: b.train(output=b.data), ("d.jsonl: is a file; name a folder",)),
    "below a file": (below_a_file, ("d.jsonl/out: cannot be written", "name another folder")),
    "/proc": (lambda b: b.train(output="/proc/out"), ("output /proc/out: cannot be written",)),
    "name too long": (a_long_name, ("cannot be written (File name too long)",)),
    "not empty": (
        lambda b: b.train(output=b.run),
        ("run: is not empty", "--resume", "--overwrite", "name another folder"),
    ),
    "resume somebody else's": (
        somebody_elses_folder,
        ("holds no run to resume", "thesis.tex", "name the run's folder"),
    ),
    "overwrite the model": (overwritten_model, ("m: lies in the output folder", "name another")),
    "overwrite the base": (overwritten_base, ("merged: lies in the output folder",)),
    "overwrite the adapter": (overwritten_adapter, ("adapter", "run: lies in the output folder")),
    "overwrite for nothing": (overwritten_by_a_bad_run, ("not a whole safetensors file",)),
    "resume with another rank": (
        lambda b: b.train("--resume", "--lora-r", "8", output=b.run),
        ("checkpoint-2 does not fit this run", "float32[2,4,48]", "Resume with the model"),
    ),
    "resume with another method": (
        lambda b: b.train("--resume", "--method", "full", output=b.run),
        ("checkpoint-2 does not fit this run: train/embed is absent in the checkpoint",),
    ),
    "merge into the model": (
        lambda b: ["merge", b.model, b.run, "--output", b.model],
        ("m: is not empty; name another folder",),
    ),
    "export into the run": (
        lambda b: ["export", b.run, "--output", b.run],
        ("run: is not empty; name another folder",),
    ),
}


@pytest.mark.parametrize(("argv", "says"), OUTPUT.values(), ids=list(OUTPUT))
def test_outputs(argv, says, bench, refused):
    refused(argv(bench), *says)


def test_resume_of_damaged_checkpoints_and_samples(bench, refused):
    argv = bench.train("--resume", "--lora-r", "4", output=bench.run)
    (bench.run / "samples.json").write_text("[")
    refused(argv, "samples.json: not readable as JSON", "remove the file")
    (bench.run / "checkpoint-2" / "meta.json").write_text("{")
    refused(argv, "checkpoint-2 is damaged: meta.json is not what was written")


# name: (command line, what the line says)
COMMANDS: dict[str, tuple[Callable[[Bench], list[Any]], tuple[str, ...]]] = {
    "missing model": (
        lambda b: b.train(model=b.root / "n"),
        ("/n: no such model folder or file; check the path",),
    ),
    "model and data swapped": (
        lambda b: b.train(model=b.data, dataset=b.model),
        ("d.jsonl: a model is a folder, a .gguf file or a hub id, not this file",),
    ),
    "GGUF": (
        lambda b: b.train(model=Path(shutil.copy(b.data, b.root / "m.gguf"))),
        ("m.gguf: not a whole GGUF file", "copy or download it again"),
    ),
    "missing data": (
        lambda b: b.train(dataset=b.root / "data" / "d.jsonl"),
        ("data/d.jsonl does not exist; check the path",),
    ),
    "missing data, near": (
        lambda b: b.train(dataset=b.root / "d.json"),
        ("d.json does not exist", "Did you mean 'd.jsonl'?"),
    ),
    "data is a folder": (
        lambda b: b.train(dataset=b.model),
        ("m is a folder; name the data file in it",),
    ),
    "empty prompt": (
        lambda b: ["generate", b.model, "--prompt", ""],
        ("--prompt: [''] is not a non-empty text",),
    ),
    "prompt of bytes": (
        lambda b: ["generate", b.model, "--prompt", "\udcff"],
        ("--prompt: ['\\udcff'] is not a non-empty text",),
    ),
    "long prompt": (
        lambda b: ["generate", b.model, "--prompt", "x" * 600],
        ("prompt 0 has 6", "the 512 positions of the model: shorten it"),
    ),
    "no prompt": (lambda b: ["generate", b.model], ("prompt is missing: give --prompt",)),
    "generate with a run": (
        lambda b: ["generate", b.run, "--prompt", "x"],
        ("run: a PEFT adapter, not a model",),
    ),
    "merge without adapter": (
        lambda b: ["merge", b.model, b.root / "rum", "--output", b.out],
        ("rum: no such adapter folder", "Did you mean 'run'?"),
    ),
    "merge, swapped": (
        lambda b: ["merge", b.run, b.model, "--output", b.out],
        ("run: a PEFT adapter, not a model",),
    ),
    "export of no run": (
        lambda b: ["export", b.model, "--output", b.out],
        ("m: no run is here (there is no config.yaml)",),
    ),
    "export of no step": (
        lambda b: ["export", b.run, "--output", b.out, "--step", "77"],
        ("checkpoint-77 does not exist; there are checkpoints of steps 2",),
    ),
    "preview of nothing": (
        lambda b: ["preview", b.root / "d.json", "--model", b.model],
        ("d.json does not exist", "Did you mean 'd.jsonl'?"),
    ),
    "misspelt verb": (
        lambda b: ["generat", b.model, "--prompt", "x"],
        ("unknown flag --prompt. Did you mean 'generate'?",),
    ),
    "train is no verb": (
        lambda b: ["train", b.model, b.data, "--output", b.out],
        ("train is no verb: leave the word out",),
    ),
}


@pytest.mark.parametrize(("argv", "says"), COMMANDS.values(), ids=list(COMMANDS))
def test_commands(argv, says, bench, refused):
    refused(argv(bench), *says)


def test_chat_needs_a_template(bench, refused):
    (bench.model / "chat_template.jinja").unlink()
    refused(["chat", bench.model], "the tokenizer has no chat template; use generate")


def test_out_of_memory(bench, refused, monkeypatch):
    def fill(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(sys.modules["mud_puppy.train"], "prepare", fill)
    refused(bench.train(), "out of memory: lower batch_size")

    def bug(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(sys.modules["mud_puppy.train"], "prepare", bug)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        main(bench.train())


def test_full_disk(bench, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mud_puppy"), "handlers", [])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert main(bench.train()) == 2
    says = "out/checkpoint-2: No space left on device; there is no earlier one"
    assert_one_line(capsys.readouterr().err, (says,))
    assert not list(bench.out.glob("checkpoint-*"))


def test_what_is_sound_is_not_refused(bench, capsys, monkeypatch):
    """The partner of every case above: the same command line, with nothing damaged."""
    monkeypatch.setattr(logging.getLogger("mud_puppy"), "handlers", [])
    (bench.run / "mine.txt").write_text("not the run's")
    seed = str(10**30)
    assert main(bench.train("--overwrite", "--seed", seed, output=bench.run, lora_r=2)) == 0
    assert load_file(bench.run / ADAPTER)[f"{Q}.lora_A.weight"].shape == (2, 32)
    assert (bench.run / "mine.txt").exists()
    capsys.readouterr()
    assert main(bench.train("--resume")) == 0
    assert "has no checkpoint yet: the run starts at step 0" in capsys.readouterr().err


PROCESSES = {
    "mud_puppy": (lambda b: ["--lora-rr", "1"], "unknown flag --lora-rr. Did you mean '--lora-r'?"),
    "mud_puppy.train": (
        lambda b: ["--config", str(b.root / "c.yaml")],
        "c.yaml:4: lora_rank: unknown key. Did you mean",
    ),
    "mud_puppy.__main__": (lambda b: b.train(model=b.root / "no"), "no such model folder or file"),
}


@pytest.mark.parametrize("module", PROCESSES)
def test_processes(module, bench):
    keys = {"model": "m", "dataset": "d", "output": str(bench.out), "lora_rank": 3}
    (bench.root / "c.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    argv, says = PROCESSES[module]
    before = files(bench.root)
    command = [sys.executable, "-m", module, *argv(bench)]
    env = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, (says,))
    assert files(bench.root) == before
