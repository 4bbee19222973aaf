"""Where a model is: a local folder, a GGUF file, or a hub id; and which tensors it holds.

Pickles are never opened: a pickle runs whatever code its author put in it.
"""

import os
import re
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError, nearest_file
from mud_puppy.model.tensors import Stored, open_safetensors
from mud_puppy.model.untrusted import check_folder, file_size, read_json, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What a download takes: never *.bin, and nothing below the top folder (original/, onnx/).
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_CODE = ("*.py",)
_TEXTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_FILE_SUFFIXES = (
    ".gguf .safetensors .bin .pt .pth .ckpt .json .jsonl .yaml .yml .txt .zip .tar .gz"
).split()
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# org/name or name; then @ and a branch, tag or commit, which git lets have slashes, but no "..".
_HUB_ID = re.compile(
    r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?!.*\.\.)(?P<revision>[\w+.-]+(/[\w+.-]+)*))?"
)


def find_model(source: str | Path, *, weights: bool = True, code: bool = False) -> Path:
    """The folder or GGUF file that `source` names; a hub id is downloaded first.

    A hub id may name a branch, tag or commit: `org/name@revision`. weights: False fetches configs
    and tokenizer only; code: also the repository's Python files. UserError for a path that does not
    exist (a source that looks like a path never reaches the hub), for files that are links to
    somewhere else, and for whatever the hub answers.
    """
    text = str(source)
    path = Path(os.path.expanduser(text))
    try:
        exists = path.exists()
    except OSError as error:
        raise UserError(f"{text}: cannot be read: {error.strerror}") from None
    if exists and not path.is_dir():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: a model is a folder, a .gguf file or a hub id, not this file")
        file_size(path)
        return path
    if exists:
        return _checked(path)
    if looks_local(text):
        raise UserError(
            f"{text}: no such model folder or file; check the path.{nearest_file(path)}"
        )
    patterns = _TEXTS + (_WEIGHTS if weights else ()) + (_CODE if code else ())
    return _checked(_download(*split_revision(text), list(patterns)))


def _checked(folder: Path) -> Path:
    check_folder(folder, _WEIGHTS + _TEXTS + _CODE)
    return folder


def looks_local(source: str) -> bool:
    """True for what cannot be a hub id: `/x`, `./x`, `~/x`, `a/b/c`, `x.gguf`, odd characters."""
    return (
        source.startswith(("/", ".", "~"))
        or Path(split_revision(source)[0]).suffix.lower() in _FILE_SUFFIXES
        or _HUB_ID.fullmatch(source) is None
    )


def split_revision(source: str) -> tuple[str, str | None]:
    """("org/name", "revision") of a hub id, None where it names no revision."""
    repo, _, revision = source.partition("@")
    return repo, revision or None


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except GatedRepoError:
        why = "its licence must be accepted on the hub first, and HF_TOKEN set"
    except RepositoryNotFoundError:
        why = "neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
    except RevisionNotFoundError:
        why = f"the model has no branch, tag or commit '{revision}' on the hub"
    except IncompleteSnapshotError:
        why = f"only some of its files are in the cache, and {_unreachable(constants)}"
    except LocalEntryNotFoundError as error:
        why = f"neither a folder here nor in the cache, and {_unreachable(constants, error)}"
    except HFValidationError:
        why = "neither a folder here nor a valid hub id"
    except Exception as error:  # the client raises its own, the network's and the disk's kinds
        why = f"the download failed: {_line(error)}; start again, what is whole is kept"
    else:
        return Path(folder)
    raise UserError(f"{repo if revision is None else f'{repo}@{revision}'}: {why}")


def _unreachable(constants: Any, error: Exception | None = None) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it to download the model from the hub"
    cause = "" if error is None or error.__cause__ is None else f" ({_line(error.__cause__)})"
    return f"the hub cannot be reached to download it{cause}"


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


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
        _check_name(index, name)
    homes: dict[str, str] = {}
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise UserError(f"{index}: shard {name} is missing; download the model again")
        # The files' own tensors count, so that one the index forgot is reported as unread.
        for tensor, stored in open_safetensors(folder / name).items():
            if tensor in homes:
                raise UserError(
                    f"{index}: tensor '{tensor}' is in two shards, {homes[tensor]} and {name}; "
                    "download the model again"
                )
            homes[tensor], tensors[tensor] = name, stored
    for tensor, name in weight_map.items():
        if homes.get(tensor) != name:
            where = f"it is in {homes[tensor]}" if tensor in homes else "no shard has it"
            raise UserError(
                f"{index}: tensor {shown(tensor)} is not in {name} ({where}); download the model "
                "again"
            )
    return tensors


def _check_name(index: Path, name: Any) -> None:
    plain = isinstance(name, str) and name == Path(name).name and name.isprintable()
    if not plain or not name.endswith(".safetensors"):
        raise UserError(
            f"{index}: {shown(str(name))} is no safetensors file beside the index; refused, "
            "download the model again"
        )
