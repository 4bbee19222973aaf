"""Hugging Face configs through transformers' own classes, which normalise old spellings.

Only configs are parsed here; `families.read_config` turns them into an `Arch`. transformers is
imported where it is used: its configs import torch when torch is installed, which takes seconds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.families import FAMILIES
from mud_puppy.model.limits import check_sizes
from mud_puppy.model.untrusted import read_json


def read_config_file(folder: Path, trust_remote_code: bool = False) -> Any:
    """The config of a model folder. Its own Python runs only with `trust_remote_code`."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.exists() and (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: a PEFT adapter, not a model: load its base model, then this")
    if not path.exists():
        raise UserError(f"{path}: no such file, so {folder} is no model folder")
    fields = read_json(path)
    if not trust_remote_code:
        return to_config(fields, str(path))
    check_sizes(fields, str(path))
    return _parsed(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True), str(path))


def to_config(config: Any, where: str = "config") -> Any:
    """A transformers config from the fields of a config.json; a config is returned as it is."""
    if not isinstance(config, dict):
        return config
    from transformers import AutoConfig

    fields = dict(config)
    check_sizes(fields, where)
    model_type = fields.pop("model_type", None)
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type '{model_type}' has no table here; "
            f"families that load: {', '.join(FAMILIES)}"
        )
    return _parsed(lambda: type(AutoConfig.for_model(model_type)).from_dict(fields), where)


def _parsed(parse: Callable[[], Any], where: str) -> Any:
    try:
        return parse()
    except Exception as error:  # transformers raises whatever its checks find
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: {line}") from None
