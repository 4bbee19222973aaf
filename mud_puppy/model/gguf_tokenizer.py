"""Tokenizers from a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece's ("llama").

A GGUF file names its pre-tokenizer instead of holding it; the byte-level BPE ones of the families
that load are in `_SPLITS`, another is refused rather than guessed, because a wrong one splits
numbers or words in ways that the model never saw. SentencePiece's have none.
"""

from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mud_puppy.errors import UserError
from mud_puppy.model.gguf import metadata, open_reader
from mud_puppy.model.gguf_sentencepiece import sentencepiece_bpe
from mud_puppy.model.gguf_vocabulary import Vocabulary, read_flag, read_list, read_vocabulary


def gguf_tokenizer(path: Path) -> Any:
    """The (transformers) tokenizer that `tokenizer.ggml.*` describes.

    UserError for a kind that is not read, and where an entry is missing or cannot be true.
    """
    from transformers import PreTrainedTokenizerFast

    reader = open_reader(path)
    model = metadata(reader, "tokenizer.ggml.model")
    pre = metadata(reader, "tokenizer.ggml.pre", "gpt-2")
    if model != "llama" and (model != "gpt2" or pre not in _SPLITS):
        raise UserError(
            f"{path}: its tokenizer ({model}, pre-tokenizer {pre}) is not read from GGUF; read are "
            f"SentencePiece's BPE (llama) and byte-level BPE (gpt2) with {', '.join(_SPLITS)}: "
            "give the tokenizer's own folder"
        )
    words = read_vocabulary(reader, path)
    family = metadata(reader, "general.architecture")
    if model == "llama":
        scores = read_list(reader, path, "scores", float, len(words.tokens))
        prefix = read_flag(reader, path, "add_space_prefix", True)
        unknown = words.tokens[words.ids["unk"]]
        tokenizer = sentencepiece_bpe(words.tokens, scores, words.kinds, unknown, prefix)
    else:
        lines = read_list(reader, path, "merges", str)
        tokenizer = _byte_level_bpe(words.tokens, [tuple(line.split(" ")) for line in lines], pre)
    tokenizer.add_tokens(_added(words, strips=(model, family) == ("llama", "phi3")))
    if words.add:
        tokenizer.post_processor = _ends(words)
    special = {f"{name}_token": words.tokens[index] for name, index in words.ids.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
    fast.chat_template = metadata(reader, "tokenizer.chat_template")
    fast.model_max_length = metadata(reader, f"{family}.context_length", fast.model_max_length)
    return fast


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


# Those of Phi-3 that leave the white space behind them; a GGUF file does not say it, llama.cpp goes
# by the model's name (llama-vocab.cpp, LLAMA_TOKEN_ATTR_RSTRIP).
_LEAVE = {"<unk>", "<s>", "<|endoftext|>"}


def _added(words: Vocabulary, strips: bool) -> list[AddedToken]:
    """The tokens that are whole wherever a text spells them; strips: with the white space behind
    them, as Phi-3's."""
    special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    return [
        AddedToken(
            token,
            normalized=False,
            special=special[TokenType(kind)],
            rstrip=strips and token not in _LEAVE,
        )
        for token, kind in zip(words.tokens, words.kinds, strict=True)
        if kind in special
    ]


def _ends(words: Vocabulary) -> processors.TemplateProcessing:
    before, after = ([words.tokens[words.ids[n]]] * (n in words.add) for n in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(words.tokens[words.ids[name]], words.ids[name]) for name in words.add],
    )
