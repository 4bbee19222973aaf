"""A tokenizer that knows the control tokens of many chat formats, and the chat templates of these
formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
CONTROL = (
    "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
    "<start_of_turn> <end_of_turn> <|system|> <|user|> <|assistant|> <|end|> "
    "<\uff5cUser\uff5c> <\uff5cAssistant\uff5c> <\uff5cend▁of▁sentence\uff5c>"
).split()
SENTENCES = (
    "Hello there! How are you today?",
    "system user assistant model You are a helpful AI assistant.",
    "What is two plus two? It is four. The answer is four.",
    "<think>\nlet me see\n</think>\n\nThe capital of France is Paris.",
    "[INST] [/INST] ### Question: ### Answer:\n",
)


def _trained(tokenizer: Tokenizer, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(CONTROL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_bpe() -> Tokenizer:
    """Byte-level BPE that adds a BOS, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    return tokenizer


@pytest.fixture(scope="session")
def spm_bpe() -> Tokenizer:
    """Sentencepiece-like BPE, as Mistral and Llama 2 have: the space belongs to the word behind
    it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<s>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # A word never holds the one before it, nor a line break.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = sorted({letter for text in SENTENCES for letter in text} | {"▁"})
    return _trained(tokenizer, letters)


@pytest.fixture
def make(byte_bpe: Tokenizer, spm_bpe: Tokenizer) -> Callable[..., PreTrainedTokenizerFast]:
    """make(template name or None, kind="byte" or "spm") -> a transformers tokenizer."""

    def build(template: str | None = None, kind: str = "byte") -> Any:
        backend = {"byte": byte_bpe, "spm": spm_bpe}[kind]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
        )
        if template is not None:
            tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        return tokenizer

    return build


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, rows or bytes) -> the path of a file with one JSON value a line, or with these
    bytes."""

    def put(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return put
