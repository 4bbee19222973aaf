"""The tiny random model that most tests take, and its sizes for those who build one themselves."""

from typing import Any

import jax

from mud_puppy.model import Model, abstract, init

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def tiny_model(**fields: Any) -> tuple[Model, Any]:
    """(model, float32 params) of a llama of SIZES, with these fields of config.json instead."""
    model, _ = abstract({"model_type": "llama"} | SIZES | fields)
    return model, init(model.arch, jax.random.key(0))
