"""Tokenizers: transformers' own for folders and hub ids, `gguf_tokenizer`'s for a GGUF file."""

from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.files import find_model
from mud_puppy.model.gguf_tokenizer import gguf_tokenizer
from mud_puppy.model.untrusted import read_json


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The (transformers) tokenizer of a model folder, GGUF file or hub id.

    trust_remote_code lets the repository's own Python build it. UserError when there is none.
    """
    path = find_model(source, weights=False, code=trust_remote_code)
    if path.is_file():
        return gguf_tokenizer(path)
    # Here, not above: transformers' Auto classes import torch when it is installed.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever a broken folder leads it to
        if not trust_remote_code and _is_code(path):
            raise UserError(
                f"{path}: the tokenizer is Python of the model's own, which runs only with "
                "trust_remote_code (--trust-remote-code); read it first"
            ) from None
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the tokenizer does not load: {line} (tokenizer.json and "
            "tokenizer_config.json must be here and whole; copy or download them again)"
        ) from None


def _is_code(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.is_file() and "AutoTokenizer" in (read_json(path).get("auto_map") or {})
