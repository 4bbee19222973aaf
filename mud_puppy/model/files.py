"""Where a model is: a local folder, a GGUF file, or a hub id; and which tensors it holds.

Pickles are never opened: a pickle runs whatever code its author put in it.
"""

import json
import re
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError, nearest_file
from mud_puppy.model.tensors import Stored, open_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What a download takes: never *.bin, and nothing below the top folder (original/, onnx/).
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TEXTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_FILE_SUFFIXES = (
    ".gguf .safetensors .bin .pt .pth .ckpt .json .jsonl .yaml .yml .txt .zip .tar .gz"
).split()
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_model(source: str | Path, *, weights: bool = True, code: bool = False) -> Path:
    """The folder or GGUF file that `source` names; a hub id is downloaded first.

    weights: False fetches configs and tokenizer only; code: also the repository's Python files.
    UserError for a path that does not exist (a source that looks like a path never reaches the
    hub) and for whatever the hub answers.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".gguf":
            raise UserError(f"{path}: a model is a folder, a .gguf file or a hub id, not this file")
        return path
    if looks_local(text):
        raise UserError(
            f"{text}: no such model folder or file; check the path.{nearest_file(path)}"
        )
    patterns = _TEXTS + (_WEIGHTS if weights else ()) + (("*.py",) if code else ())
    return _download(text, list(patterns))


def looks_local(source: str) -> bool:
    """True for what cannot be a hub id: `/x`, `./x`, `~/x`, `a/b/c`, `x.gguf`, odd characters."""
    return (
        source.startswith(("/", ".", "~"))
        or Path(source).suffix.lower() in _FILE_SUFFIXES
        or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is None
    )


def _download(repo: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(repo, allow_patterns=patterns, ignore_patterns=["*/*"])
    except GatedRepoError:
        why = "its licence must be accepted on the hub first, and HF_TOKEN set"
    except RepositoryNotFoundError:
        why = "neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
    except LocalEntryNotFoundError:
        why = "not a folder here, and the hub cannot be reached to download it"
    except HFValidationError:
        why = "neither a folder here nor a valid hub id"
    except (HfHubHTTPError, OSError) as error:
        why = f"the download failed: {str(error).splitlines()[0]}"
    else:
        return Path(folder)
    raise UserError(f"{repo}: {why}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError when the file is missing, no JSON, or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def open_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors model by its HF name; single file or shards with an index."""
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if (folder / SINGLE).is_file():
        return open_safetensors(folder / SINGLE)
    if pickles := sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern)):
        raise UserError(
            f"{folder}: holds only pickled weights ({pickles[0]}), and pickles are never opened "
            "because they run code; if you trust the file, convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise UserError(
        f"{folder}: no {SINGLE} and no {INDEX} here; download the model again (pickled weights are "
        "neither downloaded nor opened)"
    )


def _open_shards(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no 'weight_map'; download the model again")
    for name in weight_map.values():
        _check_shard(index, name)
    shards = {
        name: open_safetensors(index.parent / name) for name in sorted(set(weight_map.values()))
    }
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise UserError(f"{index}: tensor '{tensor}' is not in {name}")
    # The files' own tensors count, so that one the index forgot is reported as unread.
    return {tensor: stored for shard in shards.values() for tensor, stored in shard.items()}


def _check_shard(index: Path, name: Any) -> None:
    # Hub caches link shards to blobs elsewhere, so the name is judged, not where it resolves to.
    if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
        raise UserError(
            f"{index}: '{name}' is no safetensors file beside the index; refused, download the "
            "model again"
        )
    if not (index.parent / name).is_file():
        raise UserError(f"{index}: shard {name} is missing; download the model again")
