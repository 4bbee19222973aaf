"""Which classification models transformers has of a family, and what it calls their head.

Two kinds (`Arch.task`): "sequence" scores a whole text, at its last token; "token" scores each
token. The decoder below is the language model's, under the same names; the head is here
`params["score"]`. Source: transformers 5.23, `modeling_layers.py`, and the modules of gpt2 and
gpt_neox, whose classes are their own.
"""

import json
from dataclasses import dataclass
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Arch

ENDINGS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}


@dataclass(frozen=True)
class Head:
    """One class of transformers': its name, its head's module, and whether that has a bias; None:
    unless the config's `token_classification_bias` is false."""

    hf_class: str
    module: str = "score"
    bias: bool | None = False


def _sequence(name: str) -> dict[str, Head]:
    return {"sequence": Head(name + ENDINGS["sequence"])}


def _both(name: str) -> dict[str, Head]:
    return _sequence(name) | {"token": Head(name + ENDINGS["token"], bias=None)}


def _classifier(name: str) -> dict[str, Head]:
    """The families whose classes are older than transformers' common ones."""
    return _sequence(name) | {"token": Head(name + ENDINGS["token"], "classifier", True)}


# No class at all: granite, cohere, cohere2, olmoe.
HEADS: dict[str, dict[str, Head]] = {
    "llama": _both("Llama"),
    "mistral": _both("Mistral"),
    "qwen2": _both("Qwen2"),
    "qwen3": _both("Qwen3"),
    "gemma": _both("Gemma"),
    "gemma2": _both("Gemma2"),
    "gemma3_text": _sequence("Gemma3Text"),
    "phi3": _both("Phi3"),
    "olmo2": _sequence("Olmo2"),
    "olmo3": _sequence("Olmo3"),
    "smollm3": _both("SmolLM3"),
    "starcoder2": _both("Starcoder2"),
    "glm": _both("Glm"),
    "glm4": _both("Glm4"),
    "gpt2": _classifier("GPT2"),
    "gpt_neox": _classifier("GPTNeoX"),
    "stablelm": _both("StableLm"),
    "mixtral": _both("Mixtral"),
    "qwen2_moe": _both("Qwen2Moe"),
    "qwen3_moe": _both("Qwen3Moe"),
    "gpt_oss": _both("GptOss"),
    "deepseek_v2": _sequence("DeepseekV2"),
    "deepseek_v3": _both("DeepseekV3"),
}


def head_of(family: str, task: str) -> Head:
    """The class of a family for a task; UserError, with the families that have one, where
    transformers has none."""
    if task not in ENDINGS:
        raise UserError(f"'{task}' is no kind of classification; there are {', '.join(ENDINGS)}")
    if task in (known := HEADS.get(family, {})):
        return known[task]
    others = sorted(name for name, heads in HEADS.items() if task in heads)
    raise UserError(
        f"transformers has no {task} classification for {family}, so nothing else could load such "
        f"a model; families that have it: {', '.join(others)}"
    )


def read_head(arch: Arch, config: Any) -> Arch:
    """`arch` with the head that a transformers config's `architectures` name: a language model's,
    or one of `num_labels` scores."""
    for name in config.architectures or ():
        task = next((task for task, ending in ENDINGS.items() if name.endswith(ending)), None)
        if task is None:
            continue
        if (known := head_of(arch.family, task).hf_class) != name:
            raise UserError(
                f"config: architectures says {name}, which is no {arch.family} model ({known} is)"
            )
        return with_head(arch, task, config.num_labels)
    return arch


def with_head(arch: Arch, task: str, labels: int) -> Arch:
    """`arch` with a head of `labels` scores. What a family does to its logits is not done to
    scores. UserError as `head_of`, and for fewer labels than one."""
    head = head_of(arch.family, task)
    if not isinstance(labels, int) or labels < 1:
        raise UserError(f"a head has at least 1 label, not {labels!r}")
    bias = head.bias
    if bias is None:
        bias = bool(json.loads(arch.config).get("token_classification_bias", True))
    return arch.replace(
        task=task,
        labels=labels,
        modules=(*arch.modules[:2], head.module),
        biases=(*arch.biases, "score") if bias else arch.biases,
        logit_scale=1.0,
        logit_softcap=None,
    )
