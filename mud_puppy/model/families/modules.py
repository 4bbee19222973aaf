"""Modules of a block: HF's path of each linear with the logical axes of its weight [out, in]."""

from mud_puppy.model.arch import Arch

Axes = tuple[str, ...]
Modules = dict[str, Axes]

QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
_GLU = {
    "gate_proj": ("mlp", "embed"),
    "up_proj": ("mlp", "embed"),
    "down_proj": ("embed", "mlp"),
}


def attention() -> Modules:
    """q, k, v and o of their own."""
    return {
        "self_attn/q_proj": ("heads", "embed"),
        "self_attn/k_proj": ("kv_heads", "embed"),
        "self_attn/v_proj": ("kv_heads", "embed"),
        "self_attn/o_proj": ("embed", "heads"),
    }


def latent_attention(arch: Arch) -> Modules:
    """DeepSeek's; `Latent.q_rank` decides how queries are made."""
    assert arch.latent is not None
    queries = {"self_attn/q_proj": ("heads", "embed")}
    if arch.latent.q_rank is not None:
        queries = {
            "self_attn/q_a_proj": ("q_rank", "embed"),
            "self_attn/q_b_proj": ("heads", "q_latent"),
        }
    return queries | {
        "self_attn/kv_a_proj_with_mqa": ("kv_rank_rotated", "embed"),
        "self_attn/kv_b_proj": ("keys_values", "kv_rank"),
        "self_attn/o_proj": ("embed", "values"),
    }


def glu(arch: Arch, part: str = "mlp", inner: str = "mlp") -> Modules:
    """A gated MLP of `inner` units."""
    names = {"mlp": inner, "embed": "embed"}
    return {f"{part}/{name}": tuple(names[a] for a in axes) for name, axes in _GLU.items()}


def llama(arch: Arch) -> Modules:
    return attention() | glu(arch)


def phi3(arch: Arch) -> Modules:
    return {"self_attn/qkv_proj": ("qkv", "embed"), "self_attn/o_proj": ("embed", "heads")} | (
        gate_up(arch)
    )


def glm(arch: Arch) -> Modules:
    return attention() | gate_up(arch)


def gate_up(arch: Arch) -> Modules:
    """Gate and input of the MLP as one: the gate's rows first."""
    return {"mlp/gate_up_proj": ("gate_up", "embed"), "mlp/down_proj": ("embed", "mlp")}


def starcoder2(arch: Arch) -> Modules:
    return attention() | {"mlp/c_fc": ("mlp", "embed"), "mlp/c_proj": ("embed", "mlp")}


def gpt2(arch: Arch) -> Modules:
    return {
        "attn/c_attn": ("qkv", "embed"),
        "attn/c_proj": ("embed", "heads"),
        "mlp/c_fc": ("mlp", "embed"),
        "mlp/c_proj": ("embed", "mlp"),
    }


def gpt_neox(arch: Arch) -> Modules:
    return {
        "attention/query_key_value": ("qkv", "embed"),
        "attention/dense": ("embed", "heads"),
        "mlp/dense_h_to_4h": ("mlp", "embed"),
        "mlp/dense_4h_to_h": ("embed", "mlp"),
    }


def experts(arch: Arch, part: str = "mlp", names: tuple[str, str, str] = MLP) -> Modules:
    """gate, up and down of every expert."""
    gate, up, down = names
    return {
        f"{part}/experts/{gate}": ("experts", "expert_mlp", "embed"),
        f"{part}/experts/{up}": ("experts", "expert_mlp", "embed"),
        f"{part}/experts/{down}": ("experts", "embed", "expert_mlp"),
    }


def mixtral(arch: Arch) -> Modules:
    return attention() | experts(arch, "block_sparse_moe", ("w1", "w3", "w2"))


def qwen2_moe(arch: Arch) -> Modules:
    shared = glu(arch, "mlp/shared_expert", "shared_mlp")
    shared["mlp/shared_expert_gate"] = ("one", "embed")
    return attention() | dense_layers(arch) | experts(arch) | shared


def qwen3_moe(arch: Arch) -> Modules:
    return attention() | dense_layers(arch) | experts(arch)


def dense_layers(arch: Arch) -> Modules:
    """The MLP of the layers without experts, where there are such."""
    return {} if all(kind.sparse for kind in arch.kinds) else glu(arch)


def gpt_oss(arch: Arch) -> Modules:
    return attention() | {
        "mlp/experts/gate_up_proj": ("experts", "expert_gate_up", "embed"),
        "mlp/experts/down_proj": ("experts", "embed", "expert_mlp"),
    }


def deepseek(arch: Arch) -> Modules:
    assert arch.experts is not None
    shared = glu(arch, "mlp/shared_experts", "shared_mlp") if arch.experts.shared else {}
    return latent_attention(arch) | dense_layers(arch) | experts(arch) | shared
