"""config.json of hub repositories, with the odd fields that they have, and configs that no model
can have."""

from typing import Any

import pytest

from mud_puppy.errors import UserError
from mud_puppy.model import abstract
from mud_puppy.model.arch import Layer
from tests.model.family_cases import FIELDS

# Fields beside those of FIELDS, as the repositories have them (sizes are tiny).
HUB: dict[str, dict[str, Any]] = {
    "Phi-4-mini": {
        "model_type": "phi3",
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": [2.0] * 3, "short_factor": [1.0] * 3, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
    },
    "starcoder2-3b": {
        "model_type": "starcoder2",
        "mlp_type": "default",
        "norm_type": "layer_norm",
        "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813,
    },
    "Qwen3-Coder-30B-A3B": {
        "model_type": "qwen3_moe",
        "use_qk_norm": True,
        "shared_expert_intermediate_size": 0,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "c4ai-command-r7b": {
        "model_type": "cohere2",
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "sliding_window_pattern": 4,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
    },
    "gpt2-medium": {"model_type": "gpt2", "n_special": 0, "predict_special_tokens": True},
    "gpt-neox-20b": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu_fast",
        "attention_probs_dropout_prob": 0,
        "hidden_dropout_prob": 0,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
    },
    "vicuna": {"model_type": "llama", "max_sequence_length": 2048},
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "experts_per_token": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "initial_context_length": 4096,
        "head_dim": 8,
        "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []},
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "aux_loss_alpha": 0.001,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 2,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 32,
            "type": "yarn",
        },
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HUB)
def test_a_hub_config_is_read(name: str) -> None:
    model, shapes = abstract(FIELDS | HUB[name])
    assert model.arch.layers == 3 and shapes["embed"].shape == (64, 32)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Phi-4-mini", {"full_attn_mod": 2}),
        ("starcoder2-3b", {"norm_type": "rms_norm"}),
        ("Qwen3-Coder-30B-A3B", {"shared_expert_intermediate_size": 8}),
        ("c4ai-command-r7b", {"position_embedding_type": "rope_neox"}),
        ("DeepSeek-V2-Lite", {"scoring_func": "sigmoid"}),
        ("DeepSeek-V2-Lite", {"moe_layer_freq": 2}),
    ],
)
def test_other_values_of_these_fields_are_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        abstract(FIELDS | HUB[name] | change)


def test_what_the_odd_fields_mean() -> None:
    arch = abstract(FIELDS | HUB["c4ai-command-r7b"] | {"num_hidden_layers": 4})[0].arch
    assert [kind.rope for kind in arch.kinds] == [0, 0, 0, None]
    arch = abstract(FIELDS | HUB["Phi-4-mini"])[0].arch
    assert len(arch.ropes[0].inv_freq) == 3 and arch.ropes[0].long is not None
    assert arch.kinds == (Layer(262144),) * 3


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
V3 = {
    **HUB["DeepSeek-V2-Lite"],
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_routed_experts": 8,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (MIXTRAL | {"num_experts_per_tok": 9}, "9 experts a token of 4"),
        (MIXTRAL | {"num_experts_per_tok": 0}, "0 experts a token of 4"),
        (V3 | {"n_group": 3, "topk_group": 2}, "3 groups of 8 experts"),
        (V3 | {"n_group": 2, "topk_group": 3}, "3 of 2 groups"),
        (V3 | {"n_group": 8, "topk_group": 4}, "ranked by their two best"),
        (V3 | {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "3 experts a token"),
        (
            HUB["Qwen3-Coder-30B-A3B"] | {"decoder_sparse_step": 0},
            "decoder_sparse_step must be at least 1",
        ),
    ],
)
def test_mixtures_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        abstract(FIELDS | fields)


def test_a_config_object_is_left_as_it_is() -> None:
    from mud_puppy.model.hf_config import to_config

    config = to_config(FIELDS | HUB["gpt-oss-20b"])
    abstract(config)
    assert config.quantization_config["quant_method"] == "mxfp4"
