"""The rows of a family: every leaf of its params tree, and the tensors of a file that hold it.

A linear's path in the tree is that of HF's module inside of a layer, so that files, adapters and
codes map one to one. Norms, routers and positions have our own names.
"""

import re
from dataclasses import dataclass, replace

from mud_puppy.model.arch import Arch
from mud_puppy.model.families.modules import Axes
from mud_puppy.model.families.tables import FAMILIES


@dataclass(frozen=True)
class Row:
    """One leaf: logical axes (without the layer axis) and HF tensor name, `{i}` for the layer and
    `{e}` for the first axis where that one is spread over tensors.

    transposed: the file has the last two axes the other way round. sparse: only layers with experts
    have it, or only those without; None: all. wide: float32, whatever the dtype of the others.
    """

    axes: tuple[str, ...]
    hf: str
    transposed: bool = False
    sparse: bool | None = None
    wide: bool = False


# Tensors that old checkpoints carry and that hold nothing to learn.
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.(attn|attention)\.(masked_)?bias")


def is_buffer(tensor: str) -> bool:
    """Whether a tensor of a file is one of these."""
    return _BUFFERS.fullmatch(tensor) is not None


def is_left_out(arch: Arch, tensor: str) -> bool:
    """Whether a tensor is of a part of the family's models that is not read here."""
    pattern = FAMILIES[arch.family].left_out.format(layers=arch.layers)
    return re.fullmatch(pattern, tensor) is not None


def rows(arch: Arch) -> dict[str, Row]:
    """Every leaf of `arch` by path; paths under `layers/` are those inside one block."""
    family = FAMILIES[arch.family]
    embed, _, head = arch.modules
    table = {"embed": Row(("vocab", "embed"), f"{embed}.weight")}
    if arch.learned_positions:
        table["positions"] = Row(("positions", "embed"), family.name("positions") + ".weight")
    table |= _norm(arch, "final_norm", ("embed",), family.name("final_norm"))
    if arch.task != "lm":
        table |= _scores(arch)
    elif not arch.tied:
        table["head"] = Row(("vocab", "embed"), f"{head}.weight")
    for name in arch.norms:
        table |= _norm(arch, f"layers/{name}", ("embed",), _layer(arch, family.name(name)))
    table |= _qk_norms(arch)
    if arch.sinks:
        table["layers/self_attn/sinks"] = Row(("head",), _layer(arch, "self_attn.sinks"))
    for path, axes in family.linears(arch).items():
        table |= _linear(arch, path, axes)
    if arch.experts is not None:
        table |= _router(arch)
    return table


def _scores(arch: Arch) -> dict[str, Row]:
    """The head of a classification model, which trains beside adapters too: float32."""
    name = arch.modules[2]
    table = {"score/weight": Row(("labels", "embed"), f"{name}.weight", wide=True)}
    if "score" in arch.biases:
        table["score/bias"] = Row(("labels",), f"{name}.bias", wide=True)
    return table


def _layer(arch: Arch, name: str) -> str:
    return f"{arch.modules[1]}{{i}}.{name}"


def _norm(arch: Arch, path: str, axes: tuple[str, ...], hf: str) -> dict[str, Row]:
    table = {path: Row(axes, f"{hf}.weight")}
    if arch.norm_biases:
        table[f"{path}_bias"] = Row(axes, f"{hf}.bias")
    return table


def _qk_norms(arch: Arch) -> dict[str, Row]:
    table, family = {}, FAMILIES[arch.family]
    if arch.qk_norm is not None:
        for name, width, heads in (("q_norm", "heads", "head"), ("k_norm", "kv_heads", "kv_head")):
            axes = {"head": ("head_dim",), "heads": (heads, "head_dim"), "width": (width,)}
            hf = _layer(arch, f"{family.name(name)}.weight")
            table[f"layers/self_attn/{name}"] = Row(axes[arch.qk_norm], hf)
    if arch.latent is not None:
        ranks = {"kv_a_layernorm": "kv_rank"}
        ranks |= {"q_a_layernorm": "q_rank"} if arch.latent.q_rank else {}
        for name, axis in ranks.items():
            hf = _layer(arch, f"self_attn.{name}.weight")
            table[f"layers/self_attn/{name}"] = Row((axis,), hf)
    return table


def _linear(arch: Arch, path: str, axes: Axes) -> dict[str, Row]:
    """A module's weight and, if it has one, bias."""
    family = FAMILIES[arch.family]
    sparse = None
    if arch.experts is not None and "attn" not in path:
        sparse = "expert" in path
    hf, bias = path.replace("/", "."), path.split("/")[-1] in arch.biases
    transposed = path in family.transposed
    if axes[0] == "experts" and path in family.stacked:
        # One tensor of all experts, a parameter of the module above.
        weight, bias_name = hf, f"{hf}_bias"
    else:
        hf = hf.replace("experts.", "experts.{e}.") if axes[0] == "experts" else hf
        weight, bias_name = f"{hf}.weight", f"{hf}.bias"
    table = {f"layers/{path}/weight": Row(axes, _layer(arch, weight), transposed, sparse)}
    if bias:
        own = Row(axes[:-1], _layer(arch, bias_name), False, sparse)
        table[f"layers/{path}/bias"] = own
    return table


def _router(arch: Arch) -> dict[str, Row]:
    name = FAMILIES[arch.family].name("router")
    part = name.split(".")[0]
    table = {f"layers/{part}/router": Row(("experts", "embed"), name + ".weight")}
    if "router" in arch.biases:
        table[f"layers/{part}/router_bias"] = Row(("experts",), name + ".bias")
    if "choice" in arch.biases:
        row = Row(("experts",), name + ".e_score_correction_bias", wide=True)
        table[f"layers/{part}/choice_bias"] = row
    return {path: replace(row, hf=_layer(arch, row.hf), sparse=True) for path, row in table.items()}
