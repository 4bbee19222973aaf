"""Keys of distillation; `keys.Config` has them beside its own."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from mud_puppy.config.schema import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, Limit, Need, key

Codes = Literal["nf4", "int4", "int8", "mxfp4", "fp8", "stored"]

_DISTILL = Need("method distill", lambda c: c.method == "distill")
_TEACHER = Need("method distill with teacher", lambda c: c.method == "distill" and c.teacher)
_MAKES = _TEACHER & Need("teacher_logits", lambda c: c.teacher_logits)
_ON_POLICY = Need(
    "method distill with teacher, no teacher_logits, distill_sft 0 and train_on_prompt false (what "
    "the student samples is in no file, and is not to be imitated)",
    lambda c: c.method == "distill" and c.asks_teacher and not (c.distill_sft or c.train_on_prompt),
)
_SAMPLES = Need("distill_on_policy above 0", lambda c: c.distill_on_policy > 0) & _ON_POLICY
_SHARE = Limit("from 0 to 1", lambda v: 0 <= v <= 1)

_key = partial(key, "distillation", needs=_DISTILL)


@dataclass(frozen=True, kw_only=True)
class DistillKeys:
    """Keys of method distill."""

    teacher: str | None = _key(
        None, "the model to learn from: folder, GGUF file or hub id, of the same tokenizer"
    )
    teacher_quant: Codes | None = _key(
        None,
        "format that the teacher's weights are held in; stored: the codes that its GGUF file "
        "holds; null: the type that the run computes in",
        needs=_TEACHER,
    )
    teacher_logits: str | None = _key(
        None,
        "safetensors file of the teacher's likeliest tokens, read instead of asking the teacher; "
        "where it is missing the teacher writes it, before the training",
    )
    distill_top_k: int = _key(
        64, "tokens after each token that the teacher writes", AT_LEAST_1, needs=_MAKES
    )
    distill_beta: float = _key(
        0.5, "generalised JS divergence: 0 is KL(teacher, student), 1 KL(student, teacher)", _SHARE
    )
    distill_temperature: float = _key(
        1.0, "both models' logits are divided by this in the divergence", POSITIVE
    )
    distill_sft: float = _key(
        0.0, "weight of the supervised loss beside the divergence", NOT_NEGATIVE
    )
    distill_on_policy: float = _key(
        0.0,
        "share of the steps whose answers the student samples, then, to the data's prompts "
        "(GKD's lambda)",
        _SHARE,
        needs=_ON_POLICY,
    )
    rollout_max_new_tokens: int = _key(
        128, "longest sampled answer in tokens", AT_LEAST_1, needs=_SAMPLES
    )
    rollout_temperature: float = _key(
        1.0, "temperature that answers are sampled at", POSITIVE, needs=_SAMPLES
    )

    @property
    def asks_teacher(self) -> bool:
        """Whether each step asks the teacher, and no file."""
        return self.teacher is not None and self.teacher_logits is None
