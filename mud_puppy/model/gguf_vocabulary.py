"""The vocabulary of a GGUF file: its `tokenizer.ggml.*` entries, each checked before use.

Names and meaning: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "GGML". What a
file leaves out is what llama.cpp takes for it (llama-vocab.cpp, `llama_vocab::impl::load`).
"""

from collections import Counter
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from mud_puppy.errors import UserError
from mud_puppy.model.gguf_config import metadata
from mud_puppy.model.untrusted import shown

# Far above any model's: SentencePiece's own limit is 16, a byte-level BPE's longest run of spaces
# 128. All splits of a piece are tried, so that its length counts squared.
_MAX_CHARACTERS = 512


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """tokens: by id. kinds: a gguf.TokenType of each. ids: of "bos", "eos", "unk" and "pad", those
    that the model has. add: which of "bos" and "eos" go around a text."""

    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]
    add: frozenset[str]


def read_vocabulary(reader: gguf.GGUFReader, path: Path) -> Vocabulary:
    """UserError where an entry is missing, of another kind or length, or names no token."""
    sentencepiece = metadata(reader, "tokenizer.ggml.model") == "llama"
    tokens = read_list(reader, path, "tokens", str)
    count = len(tokens)
    kinds = [int(TokenType.NORMAL)] * count
    # Without it SentencePiece's bytes and control tokens would be words.
    if sentencepiece or "tokenizer.ggml.token_type" in reader.fields:
        kinds = read_list(reader, path, "token_type", int, count)
    if sentencepiece:
        tokens = _as_in_texts(tokens, kinds)
    _check_tokens(tokens, path)
    defaults = {"bos": 1, "eos": 2, "unk": 0} if sentencepiece else {}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {n: _id(reader, path, names[n], count, defaults.get(n)) for n in names}
    ids = {name: index for name, index in found.items() if index is not None}
    flags = {"bos": sentencepiece, "eos": False}
    add = {n for n, default in flags.items() if read_flag(reader, path, f"add_{n}_token", default)}
    for name in sorted(add - ids.keys()):
        raise UserError(
            f"{path}: tokenizer.ggml.add_{name}_token is true, but {name}_token_id is missing"
        )
    return Vocabulary(tokens=tokens, kinds=kinds, ids=ids, add=frozenset(add))


def read_list(
    reader: gguf.GGUFReader, path: Path, name: str, kind: type, count: int | None = None
) -> list[Any]:
    """The list of `tokenizer.ggml.<name>`, of `count` entries if that is given; floats finite."""
    key = f"tokenizer.ggml.{name}"
    try:
        values = metadata(reader, key)
    except UnicodeDecodeError:
        raise UserError(f"{path}: {key} holds a text that is not UTF-8; convert it again") from None
    if values is None:
        raise UserError(
            f"{path}: {key} is missing, without which its tokenizer cannot be built; give the "
            "tokenizer's own folder"
        )
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{path}: {key} is of another type, expected a list of {kind.__name__}")
    if count is not None and len(values) != count:
        raise UserError(
            f"{path}: {key} has {len(values)} entries, expected {count}: one of each token"
        )
    if kind is float and not all(map(isfinite, values)):
        raise UserError(f"{path}: {key} holds a NaN or an infinity: a corrupt file")
    return values


def read_flag(reader: gguf.GGUFReader, path: Path, name: str, default: bool) -> bool:
    value = metadata(reader, f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise UserError(
            f"{path}: tokenizer.ggml.{name} is {shown(str(value))}, expected true or false"
        )
    return value


def _as_in_texts(tokens: list[str], kinds: list[int]) -> list[str]:
    """User-defined tokens with spaces, which older converters left as SentencePiece's mark."""
    return [
        token.replace("\u2581", " ") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _check_tokens(tokens: list[str], path: Path) -> None:
    for index, token in enumerate(tokens):
        if len(token) > _MAX_CHARACTERS:
            raise UserError(
                f"{path}: tokenizer.ggml.tokens: token {index} has {len(token)} characters, more "
                f"than any model's ({_MAX_CHARACTERS})"
            )
    # llama.cpp stops at these as well: a text has one id.
    twice = [token for token, times in Counter(tokens).items() if times > 1]
    if twice:
        raise UserError(f"{path}: tokenizer.ggml.tokens holds {shown(twice[0])} more than once")


def _id(
    reader: gguf.GGUFReader, path: Path, name: str, count: int, default: int | None
) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    index = metadata(reader, key, default)
    if index is not None and (type(index) is not int or not 0 <= index < count):
        raise UserError(f"{path}: {key} is {shown(str(index))}, expected an id below {count}")
    return index
