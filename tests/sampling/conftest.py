"""Tiny random models, and a byte tokenizer with a chat template. Nothing here needs torch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from mud_puppy.model.families import read_config
from mud_puppy.model.module import Model, build, init
from tests.tiny import SIZES

FIELDS = SIZES | {
    "vocab_size": 300,
    "max_position_embeddings": 256,
    # Wide logits, so that no argmax hangs on the last bit.
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**FIELDS),
    "qwen2": transformers.Qwen2Config(**FIELDS, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**FIELDS, head_dim=16),
    "mistral": transformers.MistralConfig(**FIELDS, sliding_window=12),
    "dynamic": transformers.LlamaConfig(
        **{**FIELDS, "max_position_embeddings": 48},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
}


@dataclass(frozen=True)
class Tiny:
    model: Model
    params: Any

    def logps(self, sequences: list[list[int]], params: Any = None) -> np.ndarray:
        """Log-probabilities [N, 224, V] of what follows each place, without a cache."""
        tokens = np.zeros((len(sequences), 224), np.int32)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        logits = jax.jit(self.model)(params or self.params, jnp.asarray(tokens))
        return np.asarray(jax.nn.log_softmax(logits))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Tiny]:
    """tiny_model(name in CONFIGS), each made once."""
    return functools.cache(make)


def make(family: str) -> Tiny:
    """Every number matters: norms are not one, biases not zero."""
    arch = read_config(CONFIGS[family])
    leaves, tree = jax.tree.flatten(init(arch, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return Tiny(build(arch)[0], jax.tree.unflatten(tree, noisy))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Eight prompts of token ids, two of each length."""
    lengths = (1, 16, 40, 17, 17, 1, 40, 16)
    keys = jax.random.split(jax.random.key(1), len(lengths))
    draw = [jax.random.randint(key, (n,), 3, 300) for key, n in zip(keys, lengths, strict=True)]
    return [ids.tolist() for ids in draw]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> Any:
    """One token a byte (ids 0 to 255), then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", chat_template=template
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer() -> Any:
    return byte_tokenizer(template=None)
