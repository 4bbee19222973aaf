"""Generation: from prompts to replies, with a KV cache."""

from mud_puppy.sampling.chat import chat, stream_text, stream_tokens
from mud_puppy.sampling.choose import Options
from mud_puppy.sampling.generate import Reply, generate, generate_tokens
from mud_puppy.sampling.prompts import context_length, eos_ids, tokenize

__all__ = [
    "Options",
    "Reply",
    "chat",
    "context_length",
    "eos_ids",
    "generate",
    "generate_tokens",
    "stream_text",
    "stream_tokens",
    "tokenize",
]
