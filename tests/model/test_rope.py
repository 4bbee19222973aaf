"""Every kind of rotary embedding beyond the context that a model was first trained with, against
transformers: logits of tiny models, and the angles of real configs at their last positions."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.model import abstract, load
from mud_puppy.model.arch import Rope
from mud_puppy.model.rope import read_rope, rope_tables
from tests.model.family_cases import FIELDS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ORIGINAL, LENGTH = 16, 64
POSITIONS = (0, LENGTH // 2, LENGTH - 1)
TOKENS = np.random.default_rng(0).integers(3, 64, (1, LENGTH), dtype=np.int32)


def _spec(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 100.0} | more


_LLAMA3 = _spec(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL,
)
_YARN = _spec("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=4.0)
_LONGROPE = _spec(
    "longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 1.5, 2.5, 4.0],
    original_max_position_embeddings=ORIGINAL,
)
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# kind -> (class, fields); the context is ORIGINAL before scaling, the row is LENGTH long
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("Llama", {"rope_parameters": _spec("default")}),
    "linear": ("Llama", {"rope_parameters": _spec("linear", factor=4.0)}),
    "dynamic": (
        "Llama",
        {"rope_parameters": _spec("dynamic", factor=4.0), "max_position_embeddings": ORIGINAL},
    ),
    "yarn": ("Llama", {"rope_parameters": _YARN}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "longrope": ("Phi3", {"rope_parameters": _LONGROPE}),
    "partial": (
        "StableLm",
        {"rope_parameters": _spec("default", partial_rotary_factor=0.5)},
    ),
    "partial linear": (
        "StableLm",
        {"rope_parameters": _spec("linear", partial_rotary_factor=0.5, factor=4.0)},
    ),
    "local and global": (
        "Gemma3Text",
        {
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": _LAYERS,
            "rope_parameters": {
                "sliding_attention": _spec("default"),
                "full_attention": _spec("linear", factor=8.0),
            },
        },
    ),
    "yarn on global layers": (
        "Olmo3",
        {
            "sliding_window": 7,
            "layer_types": _LAYERS,
            "rope_parameters": {
                "sliding_attention": _spec("default"),
                "full_attention": _YARN,
            },
        },
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Any:
    """made(kind): (folder, transformers' logits of TOKENS)."""
    found: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind not in found:
            name, fields = KINDS[kind]
            config = getattr(transformers, f"{name}Config")(**(FIELDS | fields))
            torch.manual_seed(0)
            ending = {"Gemma3Text": "Gemma3ForCausalLM"}.get(name, f"{name}ForCausalLM")
            model = getattr(transformers, ending)(config).eval()
            with torch.no_grad():
                for path, x in model.named_parameters():
                    x.copy_(x if "norm" in path else torch.randn_like(x) * 0.25)
                logits = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
            folder = tmp_path_factory.mktemp("rope")
            model.save_pretrained(folder)
            found[kind] = folder, logits
        return found[kind]

    return make


def errors(made: Any, kind: str, change: Any = lambda rope: rope) -> list[float]:
    """At POSITIONS, relative to the largest logit there."""
    folder, expected = made(kind)
    model, params = load(folder, dtype="float32")
    arch = model.arch.replace(ropes=tuple(map(change, model.arch.ropes)))
    ours = np.asarray(replace(model, arch=arch)(params, jnp.asarray(TOKENS)))
    return [
        float(np.abs(ours[0, p] - expected[0, p]).max() / np.abs(expected[0, p]).max())
        for p in POSITIONS
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_the_first_middle_and_last_position(kind: str, made: Any) -> None:
    assert max(errors(made, kind)) <= 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "default"])
def test_without_the_scaling_only_the_first_position_agrees(kind: str, made: Any) -> None:
    def plain(rope: Rope) -> Rope:
        half = len(rope.inv_freq)
        if "partial" in kind:
            half *= 2  # all of a head
        return Rope(tuple(100.0 ** -(np.arange(half) / half)))

    # Position 0 is not turned, and sees itself alone.
    first, *later = errors(made, kind, plain)
    assert first <= 1e-5 and min(later) > 1e-4


# Configs as published: their last position is beyond what they were first trained with.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.1": (
        "Llama",
        {
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_parameters": _LLAMA3
            | {"rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192},
        },
    ),
    "Qwen2.5 with YaRN": (
        "Qwen2",
        {
            "hidden_size": 512,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "Phi-3.5": (
        "Phi3",
        {
            "hidden_size": 384,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": (1 + np.arange(48) / 48).tolist(),
                "long_factor": (1 + np.arange(48) * 1.3).tolist(),
            },
        },
    ),
    "Llama 2 with NTK": (
        "Llama",
        {
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rope_parameters": _spec("dynamic", rope_theta=10000.0, factor=8.0),
        },
    ),
}
_LAST = 131071


@pytest.mark.parametrize("name", PUBLISHED)
def test_angles_of_published_configs(name: str) -> None:
    """A last bit of inv_freq is 0.008 at position 131,071: two float32 powers differ by so much."""
    kind, fields = PUBLISHED[name]
    config = getattr(transformers, f"{kind}Config")(**(FIELDS | fields))
    module = __import__(
        f"transformers.models.{config.model_type}.modeling_{config.model_type}", fromlist=["x"]
    )
    rotary = getattr(module, f"{kind}RotaryEmbedding")(config)
    positions = np.array([[0, _LAST // 2, _LAST]], np.int32)
    cos, sin = rotary(torch.zeros(1, 3, 8), torch.tensor(positions, dtype=torch.long))
    model, _ = abstract(config)
    ours = rope_tables(model.arch.ropes[0], jnp.asarray(positions), None)
    for theirs, own in zip((cos, sin), ours, strict=True):
        half = own.shape[-1]
        np.testing.assert_allclose(own[0], theirs[0, :, :half], atol=0.02)
    short = replace(model.arch.ropes[0], inv_freq=model.arch.ropes[0].inv_freq[::-1])
    if short.long is None and short.dynamic is None:
        wrong = rope_tables(short, jnp.asarray(positions), None)[0]
        assert np.abs(wrong[0] - cos[0, :, : wrong.shape[-1]].numpy()).max() > 0.5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (_spec("su"), "rope_type 'su' is not supported; supported: default, linear"),
        (_spec("default", partial_rotary_factor=0.3), "1 of a head's 6 numbers"),
        (_spec("longrope", short_factor=[1.0], long_factor=[1.0]), "list of 3 numbers"),
        (_spec("linear", factor="4"), "factor must be a number"),
    ],
)
def test_bad_specs_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rope(spec, 6, 64)
