"""Tokenizers: transformers' own for folders and hub ids, built from the metadata for a GGUF file.

A GGUF file names its pre-tokenizer instead of holding it; the byte-level BPE ones of the families
that load are in `_SPLITS`, another is refused rather than guessed, because a wrong one splits
numbers or words in ways that the model never saw.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mud_puppy.errors import UserError
from mud_puppy.model.files import find_model
from mud_puppy.model.gguf import metadata, open_reader
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


def gguf_tokenizer(path: Path) -> Any:
    """A byte-level BPE tokenizer from a GGUF file's `tokenizer.ggml.*` entries."""
    from transformers import PreTrainedTokenizerFast

    reader = open_reader(path)
    model = metadata(reader, "tokenizer.ggml.model")
    pre = metadata(reader, "tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _SPLITS:
        raise UserError(
            f"{path}: its tokenizer ({model}, pre-tokenizer {pre}) is not read from GGUF; read "
            f"are byte-level BPE with {', '.join(_SPLITS)}: give the tokenizer's own folder"
        )
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = _byte_level_bpe(tokens, merges, pre)
    kinds = metadata(reader, "tokenizer.ggml.token_type", [])
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, k in zip(tokens, kinds, strict=False) if k == kind]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=special) for t in added])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {n: metadata(reader, f"tokenizer.ggml.{key}_token_id") for n, key in names.items()}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    if metadata(reader, "tokenizer.ggml.add_bos_token", False):
        tokenizer.post_processor = _starts_with(special["bos_token"], ids["bos"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
    fast.chat_template = metadata(reader, "tokenizer.chat_template")
    fast.model_max_length = metadata(reader, _context_length(reader), fast.model_max_length)
    return fast


_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Expression that cuts the text before the byte-level step; None: GPT-2's own.
_SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
}


def _byte_level_bpe(tokens: list[str], merges: list[Any], pre: str) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3's vocabulary has words that its merges do not reach.
    whole_words = _SPLITS[pre] == _LLAMA3
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    split = _SPLITS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    before: list[Any] = []
    if pre == "smollm":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    elif split is not None:
        before = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _starts_with(token: str, index: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, index)]
    )


def _context_length(reader: Any) -> str:
    return f"{metadata(reader, 'general.architecture')}.context_length"
