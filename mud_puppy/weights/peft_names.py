"""Names in PEFT's files, and of modules: ours, which are llama's in every family, and HF's."""

import re
from dataclasses import dataclass

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's names of a and b; an embedding's are transposed, its weight being [V, D] = [in, out].
LINEAR_KINDS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_KINDS = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# What transformers calls a head of scores, which PEFT saves whole beside the adapters
# (`modules_to_save`), and PEFT's names of what a model is for (`Arch.task`).
SCORES = ("score", "classifier")
TASKS = {"lm": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}

_LAYER = re.compile(r"(?:.*?\.)?(?:layers|h)\.(\d+)\.(.+)")
_EMBEDDINGS, _HEADS = ("embed_tokens", "wte", "embed_in"), ("lm_head", "embed_out")


@dataclass(frozen=True)
class PeftNames:
    """What PEFT has to know of a model: HF's names of embedding, layers ("model.layers.") and head;
    conv1d: its linears are transformers' Conv1D; stacked: the experts' modules that are one
    parameter of all experts in its files, in the order in which their module has them; task: what
    the head gives, one of TASKS."""

    embed: str = EMBEDDING
    layers: str = "model.layers."
    head: str = HEAD
    conv1d: bool = False
    stacked: tuple[str, ...] = ()
    task: str = "lm"

    def theirs(self, name: str) -> str:
        """HF's name of one of our modules."""
        if name in (EMBEDDING, HEAD):
            return self.embed if name == EMBEDDING else self.head
        return self.layers + name.removeprefix("model.layers.")


def ours(name: str) -> str:
    """Our name of a module, whatever its family calls what is above the layers."""
    if found := _LAYER.fullmatch(name):
        return f"model.layers.{found[1]}.{found[2]}"
    last = name.split(".")[-1]
    return EMBEDDING if last in _EMBEDDINGS else HEAD if last in _HEADS else name
