"""The model: architecture, one decoder, family tables, and reading and writing HF checkpoints."""

from mud_puppy.model.arch import Arch, Rope
from mud_puppy.model.context import check_prefix
from mud_puppy.model.decoder import Cache, Inputs, head, make_cache, scan_layers, score_head
from mud_puppy.model.load import abstract, load
from mud_puppy.model.module import Decoder, Model, axes, build, init
from mud_puppy.model.resize import resize_embeddings
from mud_puppy.model.scores import with_score_head
from mud_puppy.model.tokenizer import load_tokenizer

__all__ = [
    "Arch",
    "Cache",
    "Decoder",
    "Inputs",
    "Model",
    "Rope",
    "abstract",
    "axes",
    "build",
    "check_prefix",
    "head",
    "init",
    "load",
    "load_tokenizer",
    "make_cache",
    "resize_embeddings",
    "scan_layers",
    "score_head",
    "with_score_head",
]
