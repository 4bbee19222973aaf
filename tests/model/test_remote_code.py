"""Python of a model's own folder: that of config and tokenizer when asked for, its model never."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from mud_puppy.cli import main
from mud_puppy.errors import UserError
from mud_puppy.model import abstract, load, load_tokenizer
from mud_puppy.weights import add_lora, save_adapter

NOTE = "with open({ran!r}, 'a') as file:\n    file.write('{name} ')\n"
CONFIG = """
from transformers import LlamaConfig
class MineConfig(LlamaConfig):
    model_type = {family!r}
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""
MODEL = """
import torch
raise SystemExit("the model's own code ran")
"""
Make = Callable[[str], Path]


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Where each file of code notes that it was run."""
    return tmp_path / "ran"


@pytest.fixture
def make(chat_model: Path, tmp_path: Path, ran: Path, monkeypatch: Any) -> Make:
    """make(family): a folder whose config, tokenizer and model are code of its own."""
    # Where transformers copies such code to, and imports it from.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def folder(family: str) -> Path:
        path = shutil.copytree(chat_model, tmp_path / family)
        for name, code in (("config", CONFIG), ("tokenizer", TOKENIZER), ("model", MODEL)):
            note = NOTE.format(ran=str(ran), name=name)
            (path / f"{family}_{name}.py").write_text(note + code.format(family=family))
        edit(
            path / "config.json",
            model_type=family,
            auto_map={
                "AutoConfig": f"{family}_config.MineConfig",
                "AutoModelForCausalLM": f"{family}_model.MineForCausalLM",
            },
        )
        code = {"AutoTokenizer": [None, f"{family}_tokenizer.MineTokenizer"]}
        edit(path / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=code)
        return path

    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# transformers, of the fields that transformers 4 reads.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
def test_nothing_runs_unless_it_is_trusted(make: Make, ran: Path) -> None:
    folder = make("mine")
    for open_it in (load, abstract):
        with pytest.raises(UserError, match=r"model_type 'mine' has no table here; families that"):
            open_it(folder)
    with pytest.raises(UserError, match=r"is Python of the model's own, .*--trust-remote-code"):
        load_tokenizer(folder)
    assert not ran.exists()


def test_trusted_code_of_an_unknown_family_is_no_model(make: Make, ran: Path) -> None:
    folder = make("mine")
    with pytest.raises(UserError, match=r"'mine' has no table here; families that load: .*llama"):
        load(folder, trust_remote_code=True)
    assert ran.read_text().split() == ["config"]


def test_trusted_code_of_config_and_tokenizer_runs_and_no_other(make: Make, ran: Path) -> None:
    folder = make("llama")
    model, params = load(folder, trust_remote_code=True)
    assert model.arch.family == "llama" and params["embed"].shape == (258, 32)
    assert ran.read_text().split() == ["config"]
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == "MineTokenizer" and len(tokenizer) == 258
    assert set(ran.read_text().split()) == {"config", "tokenizer"}


# transformers, of the fields that transformers 4 reads.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
@pytest.mark.parametrize("verb", ["generate", "eval", "merge", "quantize"])
def test_verbs_run_it_where_they_are_told_to(
    verb: str, make: Make, ran: Path, chats: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, out = make("llama"), tmp_path / "out"
    model, params = load(folder)
    save_adapter(model, add_lora(params, 2, key=jax.random.key(0)), tmp_path / "adapter")
    args = {
        "generate": ["--prompt", "hi", "--max-new-tokens", "2"],
        "eval": ["--dataset", str(chats), "--max-seq-length", "64"],
        "merge": [str(tmp_path / "adapter"), "--output", str(out)],
        "quantize": ["--to", "int8", "--output", str(out)],
    }[verb]
    if verb in ("generate", "eval"):
        assert main([verb, str(folder), *args]) == 2
        assert "runs only with trust_remote_code" in capsys.readouterr().err
    assert not ran.exists()
    assert main([verb, str(folder), *args, "--trust-remote-code"]) == 0
    assert {"config", "tokenizer"} <= set(ran.read_text().split())
    if out.exists():
        assert type(load_tokenizer(out, trust_remote_code=True)).__name__ == "MineTokenizer"
