"""Module names: ours, which are llama's in every family, and those of PEFT's files, HF's own."""

import re
from dataclasses import dataclass

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

_LAYER = re.compile(r"(?:.*?\.)?(?:layers|h)\.(\d+)\.(.+)")
_EMBEDDINGS, _HEADS = ("embed_tokens", "wte", "embed_in"), ("lm_head", "embed_out")


@dataclass(frozen=True)
class PeftNames:
    """What PEFT has to know of a family: HF's names of embedding, layers ("model.layers.") and
    head; conv1d: its linears are transformers' Conv1D; stacked: the experts' modules that are one
    parameter of all experts in its files, in the order in which their module has them."""

    embed: str = EMBEDDING
    layers: str = "model.layers."
    head: str = HEAD
    conv1d: bool = False
    stacked: tuple[str, ...] = ()

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
