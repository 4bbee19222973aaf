"""Keys of quantization: of a frozen base (qlora), in training (qat), after it (gptq). `keys.Config`
has them beside its own."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mud_puppy.config.schema import AT_LEAST_1, AT_LEAST_2, INSIDE_1, Limit, Need, Parser, key

Backend = Literal["nf4", "int4", "int8", "mxfp4", "fp8"]
Base = Literal[Backend, "stored"]
ROW = -1  # gptq_group_size: one group, the whole row, as quantize_config.json says it

_GPTQ = Need("method gptq", lambda c: c.method == "gptq")
_QLORA = Need("method (or tune) qlora", lambda c: c.trains == "qlora")
_QAT = Need("method qat", lambda c: c.method == "qat")
_GROUPS = Need(
    "method (or tune) qlora with quant_backend nf4, int4, int8 or fp8 (mxfp4's is 32)",
    lambda c: c.trains == "qlora" and c.quant_backend not in ("mxfp4", "stored"),
)
_ENCODES = Need(
    "method (or tune) qlora with a quant_backend that is not stored",
    lambda c: c.trains == "qlora" and c.quant_backend != "stored",
)
_NF4 = Need(
    "method (or tune) qlora with quant_backend nf4",
    lambda c: c.trains == "qlora" and c.quant_backend == "nf4",
)


def _group(value: Any) -> int:
    size = int(str(value))
    if size < 2 and size != ROW:
        raise ValueError
    return size


GPTQ_BITS = Limit("among 2, 3, 4 and 8", lambda v: v in (2, 3, 4, 8))
GPTQ_GROUP = Parser("a whole number at least 2, or -1 for a whole row", _group)

_quant = partial(key, "quantization")


@dataclass(frozen=True, kw_only=True)
class QuantizationKeys:
    """Keys of methods qlora, qat and gptq."""

    quant_backend: Base = _quant(
        "nf4",
        "format of the base model's weights; stored: the codes that its files hold",
        needs=_QLORA,
    )
    quant_group: int | None = _quant(
        None,
        "weights that share a scale; null: 64 (nf4, int4) or a row (int8, fp8)",
        AT_LEAST_2,
        needs=_GROUPS,
    )
    quant_double: bool = _quant(True, "nf4's scales in 8 bits too", needs=_NF4)
    quant_embeddings: bool = _quant(False, "embedding and head in int8 too", needs=_ENCODES)
    qat_format: Literal["int8", "int4"] = _quant(
        "int8", "format that the model is trained for", needs=_QAT
    )
    qat_group: int | None = _quant(
        None, "weights that share a scale; null: a row (int8) or 64 (int4)", AT_LEAST_2, needs=_QAT
    )
    qat_activations: Literal["none", "int8"] = _quant(
        "none", "round the inputs of the linears too, a scale each token", needs=_QAT
    )
    qat_ranges: Literal["dynamic", "learned"] = _quant(
        "dynamic", "ranges of the weights: their largest, or trained (LSQ)", needs=_QAT
    )
    qat_lora: bool = _quant(False, "train adapters instead of the weights", needs=_QAT)
    gptq_bits: int = _quant(4, "bits of a code", GPTQ_BITS, needs=_GPTQ)
    gptq_group_size: int = _quant(
        64, "inputs that share a scale; -1: a row", GPTQ_GROUP, needs=_GPTQ
    )
    gptq_actorder: bool = _quant(
        True, "take inputs with a large Hessian diagonal first", needs=_GPTQ
    )
    gptq_damp_percent: float = _quant(
        0.01, "share of the Hessian's mean diagonal that is added to it", INSIDE_1, needs=_GPTQ
    )
    gptq_symmetric: bool = _quant(True, "no zero points but the middle", needs=_GPTQ)
    gptq_awq: bool = _quant(False, "enlarge inputs that matter first (AWQ)", needs=_GPTQ)
    gptq_samples: int = _quant(
        128, "rows of the dataset that are observed, drawn by seed", AT_LEAST_1, needs=_GPTQ
    )
