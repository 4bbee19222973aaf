"""Hugging Face configs through transformers' own classes, which normalise old spellings.

Only configs are parsed here; `families.read_config` turns them into an `Arch`.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mud_puppy.errors import UserError
from mud_puppy.model.families import FAMILIES
from mud_puppy.model.files import read_json


def read_config_file(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model folder. Its own Python runs only with `trust_remote_code`."""
    path = folder / "config.json"
    fields = read_json(path)
    if not trust_remote_code:
        return to_config(fields, str(path))
    return _parsed(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True), str(path))


def to_config(config: PreTrainedConfig | dict[str, Any], where: str = "config") -> PreTrainedConfig:
    """A config from the fields of a config.json; a config object is returned as it is."""
    if isinstance(config, PreTrainedConfig):
        return config
    fields = dict(config)
    model_type = fields.pop("model_type", None)
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type '{model_type}' has no table here; "
            f"families that load: {', '.join(FAMILIES)}"
        )
    return _parsed(lambda: type(AutoConfig.for_model(model_type)).from_dict(fields), where)


def _parsed(parse: Any, where: str) -> PreTrainedConfig:
    try:
        return parse()
    except Exception as error:  # transformers raises whatever its checks find
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: {line}") from None
