"""Writes a model folder that transformers loads: weights in shards, configs, tokenizer.

Files get their names when they are whole and config.json comes last, so that a crash leaves
nothing that looks like a model.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mud_puppy.model.families import FAMILIES
from mud_puppy.model.files import INDEX, SINGLE
from mud_puppy.model.tensors import write_safetensors
from mud_puppy.model.tokenizer import load_tokenizer

Spec = tuple[tuple[int, ...], np.dtype]

# What a tokenizer may consist of; transformers' own list is spread over its classes.
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt tekken.json chat_template.jinja chat_template.json"
).split()


def write_weights(
    out: Path, specs: dict[str, Spec], tensor: Callable[[str], np.ndarray], max_shard_bytes: int
) -> None:
    """Writes `tensor(name)` for each name of `specs`, one at a time, and the index of shards."""
    shards = list(_shards(specs, max_shard_bytes))
    count = len(shards)
    files = {
        SINGLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }
    for file, shard in files.items():
        some = {name: specs[name] for name in shard}
        write_safetensors(out / f"{file}.tmp", some, (tensor(name) for name in shard))
    # An older model's files would be read instead of, or beside, the new ones.
    older = out.glob("model-?????-of-?????.safetensors")
    for old in (out / "config.json", out / INDEX, out / SINGLE, *older):
        old.unlink(missing_ok=True)
    for file in files:
        os.replace(out / f"{file}.tmp", out / file)
    if count > 1:
        total = sum(_bytes(spec) for spec in specs.values())
        weight_map = {name: file for file, shard in files.items() for name in shard}
        _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(specs: dict[str, Spec], max_shard_bytes: int) -> Iterator[list[str]]:
    """Names for each file, in order; a file is larger than the limit only if one tensor is."""
    shard: list[str] = []
    size = 0
    for name, spec in specs.items():
        if shard and size + _bytes(spec) > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += _bytes(spec)
    yield shard


def _bytes(spec: Spec) -> int:
    return prod(spec[0]) * spec[1].itemsize


def write_tokenizer(out: Path, source: Path | None, tokenizer: Any) -> None:
    """The given tokenizer, or else that of the source: a folder's files, or a GGUF's metadata."""
    if tokenizer is None and source is not None and source.is_file():
        tokenizer = load_tokenizer(source)
    if tokenizer is None:
        if source is not None:
            for name in _TOKENIZER_FILES:
                _copy(source, out, name)
        return
    tokenizer.save_pretrained(out)
    # transformers 5 calls the class TokenizersBackend, which 4 and programs on it do not know;
    # both know this name.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        _write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_configs(out: Path, source: Path | None, fields: dict[str, Any], dtype: str) -> None:
    """generation_config.json and, last of all files, config.json with `dtype`."""
    if source is None or not _copy(source, out, "generation_config.json"):
        ids = {key: fields.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {key: value for key, value in ids.items() if value is not None}
        _write_json(out / "generation_config.json", known)
    _write_json(out / "config.json", _config(fields, dtype))


def _config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The fields of a config.json."""
    given = {key: value for key, value in fields.items() if key != "_name_or_path"}
    hf_class = FAMILIES[fields["model_type"]].hf_class
    return (
        given
        | _older_rope(fields.get("rope_parameters"), fields["model_type"])
        | {"architectures": fields.get("architectures") or [hf_class], "dtype": dtype}
    )


def _older_rope(spec: dict[str, Any] | None, family: str) -> dict[str, Any]:
    """The fields that transformers 4 has instead of `rope_parameters`, of which it knows nothing:
    it would take its default theta without a word."""
    if spec is None:
        return {}
    local = spec.get("sliding_attention")
    rope = dict(spec.get("full_attention", local) if local else spec)
    theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    older = {"rope_theta": theta, "rope_scaling": scaling}
    if local and family.startswith("gemma3"):
        older["rope_local_base_freq"] = local["rope_theta"]
    if family == "gpt_neox":
        older = {"rotary_emb_base": theta, "rope_scaling": scaling}
        return older | {"rotary_pct": 1.0 if part is None else part}
    return older if part is None else older | {"partial_rotary_factor": part}


def _copy(source: Path, out: Path, name: str) -> bool:
    given = source / name
    if not given.is_file():
        return False
    if given.resolve() != (out / name).resolve():
        shutil.copyfile(given, out / f"{name}.tmp")
        os.replace(out / f"{name}.tmp", out / name)
    return True


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
