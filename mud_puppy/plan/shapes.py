"""Published sizes of models by name, so that a plan needs no file and no network.

Each is what the config.json of the hub repositories says, as far as memory depends on it. A
repository named here is planned from this table; any other model from its own config.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mud_puppy.errors import UserError, nearest
from mud_puppy.model.load import stored_codes


@dataclass(frozen=True)
class Shape:
    """hub: the repositories of this shape. fields: of config.json."""

    hub: tuple[str, ...]
    fields: dict[str, Any]


def _shape(
    family: str,
    layers: int,
    width: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    tied: bool,
    *hub: str,
    head_dim: int | None = None,
    theta: float = 1e4,
    **own: Any,
) -> Shape:
    """own: the fields of the family."""
    fields = {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or width // heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    if family in ("qwen2", "phi3", "olmo2", "smollm3", "starcoder2", "deepseek_v2"):
        del fields["head_dim"]
    return Shape(hub, fields | own)


def _both(name: str) -> tuple[str, str]:
    return name, f"{name}-Instruct"


_LLAMA, _QWEN = "meta-llama/", "Qwen/"
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_GPT_OSS = {"num_local_experts": 32, "num_experts_per_tok": 4}
_QWEN3_MOE = {
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
_DEEPSEEK_LITE = {
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
SHAPES = {
    "smollm2-135m": _shape("llama", 30, 576, 1536, 9, 3, 49152, 8192, True,
                           *_both("HuggingFaceTB/SmolLM2-135M"), theta=1e5),
    "smollm2-1.7b": _shape("llama", 24, 2048, 8192, 32, 32, 49152, 8192, True,
                           *_both("HuggingFaceTB/SmolLM2-1.7B"), theta=1.3e5),
    "llama-3.2-1b": _shape("llama", 16, 2048, 8192, 32, 8, 128256, 131072, True,
                           *_both(_LLAMA + "Llama-3.2-1B"), theta=5e5),
    "llama-3.2-3b": _shape("llama", 28, 3072, 8192, 24, 8, 128256, 131072, True,
                           *_both(_LLAMA + "Llama-3.2-3B"), theta=5e5),
    "llama-3.1-8b": _shape("llama", 32, 4096, 14336, 32, 8, 128256, 131072, False,
                           *_both(_LLAMA + "Llama-3.1-8B"), theta=5e5),
    "llama-3.1-70b": _shape("llama", 80, 8192, 28672, 64, 8, 128256, 131072, False,
                            *_both(_LLAMA + "Llama-3.1-70B"), _LLAMA + "Llama-3.3-70B-Instruct",
                            theta=5e5),
    "mistral-7b": _shape("mistral", 32, 4096, 14336, 32, 8, 32768, 32768, False,
                         "mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3",
                         theta=1e6),
    "qwen2.5-0.5b": _shape("qwen2", 24, 896, 4864, 14, 2, 151936, 32768, True,
                           *_both(_QWEN + "Qwen2.5-0.5B"), theta=1e6),
    "qwen2.5-1.5b": _shape("qwen2", 28, 1536, 8960, 12, 2, 151936, 32768, True,
                           _QWEN + "Qwen2.5-1.5B-Instruct", theta=1e6),
    "qwen2.5-3b": _shape("qwen2", 36, 2048, 11008, 16, 2, 151936, 32768, True,
                         *_both(_QWEN + "Qwen2.5-3B"), theta=1e6),
    "qwen2.5-7b": _shape("qwen2", 28, 3584, 18944, 28, 4, 152064, 32768, False,
                         _QWEN + "Qwen2.5-7B-Instruct", theta=1e6),
    "qwen2.5-14b": _shape("qwen2", 48, 5120, 13824, 40, 8, 152064, 32768, False,
                          _QWEN + "Qwen2.5-14B-Instruct", theta=1e6),
    "qwen2.5-32b": _shape("qwen2", 64, 5120, 27648, 40, 8, 152064, 32768, False,
                          _QWEN + "Qwen2.5-32B-Instruct", theta=1e6),
    "qwen2.5-72b": _shape("qwen2", 80, 8192, 29568, 64, 8, 152064, 32768, False,
                          _QWEN + "Qwen2.5-72B-Instruct", theta=1e6),
    "qwen3-0.6b": _shape("qwen3", 28, 1024, 3072, 16, 8, 151936, 40960, True,
                         _QWEN + "Qwen3-0.6B", head_dim=128, theta=1e6),
    "qwen3-1.7b": _shape("qwen3", 28, 2048, 6144, 16, 8, 151936, 40960, True,
                         _QWEN + "Qwen3-1.7B", head_dim=128, theta=1e6),
    "qwen3-4b": _shape("qwen3", 36, 2560, 9728, 32, 8, 151936, 40960, True,
                       _QWEN + "Qwen3-4B", head_dim=128, theta=1e6),
    "qwen3-8b": _shape("qwen3", 36, 4096, 12288, 32, 8, 151936, 40960, False,
                       _QWEN + "Qwen3-8B", head_dim=128, theta=1e6),
    "qwen3-14b": _shape("qwen3", 40, 5120, 17408, 40, 8, 151936, 40960, False,
                        _QWEN + "Qwen3-14B", head_dim=128, theta=1e6),
    "qwen3-32b": _shape("qwen3", 64, 5120, 25600, 64, 8, 151936, 40960, False,
                        _QWEN + "Qwen3-32B", head_dim=128, theta=1e6),
    "gemma-2-2b": _shape("gemma2", 26, 2304, 9216, 8, 4, 256000, 8192, True,
                         "google/gemma-2-2b", "google/gemma-2-2b-it", head_dim=256),
    "gemma-2-9b": _shape("gemma2", 42, 3584, 14336, 16, 8, 256000, 8192, True,
                         "google/gemma-2-9b", "google/gemma-2-9b-it", head_dim=256),
    "gemma-2-27b": _shape("gemma2", 46, 4608, 36864, 32, 16, 256000, 8192, True,
                          "google/gemma-2-27b", "google/gemma-2-27b-it", head_dim=128,
                          query_pre_attn_scalar=144),
    "phi-3.5-mini": _shape("phi3", 32, 3072, 8192, 32, 32, 32064, 131072, False,
                           "microsoft/Phi-3.5-mini-instruct"),
    "phi-4": _shape("phi3", 40, 5120, 17920, 40, 10, 100352, 16384, False,
                    "microsoft/phi-4", theta=2.5e5),
    "olmo-2-7b": _shape("olmo2", 32, 4096, 11008, 32, 32, 100352, 4096, False,
                        *_both("allenai/OLMo-2-1124-7B"), theta=5e5),
    "smollm3-3b": _shape("smollm3", 36, 2048, 11008, 16, 4, 128256, 65536, True,
                         "HuggingFaceTB/SmolLM3-3B", theta=5e6),
    "starcoder2-3b": _shape("starcoder2", 30, 3072, 12288, 24, 2, 49152, 16384, True,
                            "bigcode/starcoder2-3b", theta=1e6, sliding_window=4096),
    "mixtral-8x7b": _shape("mixtral", 32, 4096, 14336, 32, 8, 32000, 32768, False,
                           "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1",
                           theta=1e6, **_MIXTRAL),
    "qwen3-30b-a3b": _shape("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, 40960, False,
                            _QWEN + "Qwen3-30B-A3B", head_dim=128, theta=1e6, **_QWEN3_MOE),
    "gpt-oss-20b": _shape("gpt_oss", 24, 2880, 2880, 64, 8, 201088, 131072, False,
                          "openai/gpt-oss-20b", head_dim=64, theta=1.5e5, **_GPT_OSS),
    "deepseek-v2-lite": _shape("deepseek_v2", 27, 2048, 10944, 16, 16, 102400, 163840, False,
                               "deepseek-ai/DeepSeek-V2-Lite",
                               "deepseek-ai/DeepSeek-V2-Lite-Chat", **_DEEPSEEK_LITE),
}  # fmt: skip
_BY_HUB = {repository: name for name, shape in SHAPES.items() for repository in shape.hub}


def find_shape(name: str) -> dict[str, Any]:
    """The config.json fields of a shape; UserError with the nearest name for an unknown one."""
    known = SHAPES.get(name.lower())
    if known is None:
        raise UserError(
            f"--shape '{name}' is not known.{nearest(name.lower(), SHAPES)} "
            f"Known: {', '.join(SHAPES)}; any other model by its folder or hub id"
        )
    return known.fields


def shape_of(repository: str) -> str | None:
    """The name of a hub repository's shape, if it stands in the table."""
    return _BY_HUB.get(repository)


def source_of(model: str, trust_remote_code: bool) -> Any:
    """What `model.abstract` takes of a folder, GGUF file or hub id: its shape, where the table has
    it. UserError for a checkpoint in codes."""
    known = shape_of(model)
    if known is not None and not Path(model).expanduser().exists():
        return find_shape(known)
    if layout := stored_codes(model, trust_remote_code):
        raise UserError(
            f"{model}: the weights are in codes ({layout}), which a plan does not know: plan with "
            "the model they were made from, in codes of the run's (method qlora, teacher_quant)"
        )
    return model
