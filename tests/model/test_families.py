"""Every family against transformers: the rows of docs/models.md, and a mutation for every field of
`Arch` that turns its row red."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mud_puppy.model import init, load
from mud_puppy.model.arch import Arch, Experts, Latent, Layer, Rope
from mud_puppy.model.families import FAMILIES
from mud_puppy.model.module import build
from tests.model import family_rows as rows
from tests.model.family_cases import CASES

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Callable[[str], rows.Made]:
    """made(case): transformers' model of that case; each is made once."""
    found: dict[str, rows.Made] = {}

    def make(case: str) -> rows.Made:
        if case not in found:
            found[case] = rows.make(case, tmp_path_factory.mktemp("family"))
        return found[case]

    return make


def test_every_family_has_a_case(made: Any) -> None:
    from transformers import AutoConfig

    known = {AutoConfig.for_model(f).__class__.__name__ for f in FAMILIES}
    assert known == {f"{name}Config" for name, _ in CASES.values()}


# Each with parts that no other has; the whole rows of all take minutes.
WHOLE = ("gemma2", "phi4", "qwen2_moe", "gpt_oss", "gpt2", "deepseek_v3")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_files_are_those_of_transformers(case: str, made: Any, tmp_path: Path) -> None:
    assert rows.logits_error(made(case)) <= rows.BOUNDS["float32"]
    assert rows.round_trip(made(case), tmp_path)


@pytest.mark.parametrize(
    "case", [c if c in WHOLE else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_row_is_green(case: str, made: Any, tmp_path: Path) -> None:
    row = rows.measure(made(case), tmp_path)
    assert row.float32 <= rows.BOUNDS["float32"]
    assert row.bfloat16 <= rows.BOUNDS["bfloat16"]
    assert row.gradient <= rows.BOUNDS["gradient"]
    assert row.round_trip
    assert row.greedy
    assert row.adapter


def test_docs_models_has_these_rows() -> None:
    """The table is written by tools/family_table.py, whose rows these are."""
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    table = {cells[0].strip().strip("`"): [c.strip() for c in cells[1:]] for cells in lines}
    assert table.keys() == CASES.keys()
    for family, float32, bfloat16, gradient, *same in table.values():
        assert family in FAMILIES
        assert float(float32) <= rows.BOUNDS["float32"]
        assert float(bfloat16) <= rows.BOUNDS["bfloat16"]
        assert float(gradient) <= rows.BOUNDS["gradient"]
        assert same == ["yes"] * 3


# Mutations -------------------------------------------------------------------------------------


def arch(case: str, **changes: Any) -> tuple[str, Callable]:
    """Other values of fields of a case's Arch."""
    return case, lambda own: own.replace(**changes)


def part(case: str, name: str, **changes: Any) -> tuple[str, Callable]:
    """Other values of fields of the Arch's `experts` or `latent`."""
    return case, lambda own: own.replace(
        **{name: dataclasses.replace(getattr(own, name), **changes)}
    )


def rope(case: str, **changes: Any) -> tuple[str, Callable]:
    return case, lambda own: own.replace(
        ropes=tuple(dataclasses.replace(r, **changes) for r in own.ropes)
    )


def layers(case: str, **changes: Any) -> tuple[str, Callable]:
    return case, lambda own: own.replace(
        kinds=tuple(dataclasses.replace(k, **changes) for k in own.kinds)
    )


MUTATIONS: dict[str, tuple[str, Callable[[Arch], Arch]]] = {
    "Arch.family": arch("gemma2", family="olmo2"),
    "Arch.vocab_size": arch("llama", vocab_size=65),
    "Arch.hidden_size": arch("llama", hidden_size=33),
    "Arch.mlp_size": arch("llama", mlp_size=49),
    "Arch.heads": arch("llama", heads=5),
    "Arch.kv_heads": arch("llama", kv_heads=1),
    "Arch.head_dim": arch("llama", head_dim=4),
    "Arch.max_positions": arch("gpt2", max_positions=32),
    "Arch.kinds": arch("mistral", kinds=(Layer(6),) * 3),
    "Arch.ropes": arch("llama", ropes=(Rope((1.0, 0.5, 0.2, 0.1)),)),
    "Arch.learned_positions": arch("gpt2", learned_positions=False),
    "Arch.interleaved": arch("glm", interleaved=False),
    "Arch.act": arch("gemma", act="gelu"),
    "Arch.act_limit": arch("gpt_oss", act_limit=1.0),
    "Arch.norm": arch("cohere", norm="rms"),
    "Arch.norm_eps": arch("llama", norm_eps=1e-2),
    "Arch.norm_offset": arch("gemma", norm_offset=0.0),
    "Arch.norms": arch("gemma2", norms=("attn_norm", "mlp_norm")),
    "Arch.norm_biases": arch("starcoder2", norm_biases=False),
    "Arch.parallel": arch("gpt_neox", parallel=False),
    "Arch.qk_norm": arch("stablelm 2 12b", qk_norm=None),
    "Arch.qkv_by_head": arch("gpt_neox", qkv_by_head=False),
    "Arch.sinks": arch("gpt_oss", sinks=False),
    "Arch.attn_scale": arch("granite", attn_scale=None),
    "Arch.attn_softcap": arch("gemma2", attn_softcap=None),
    "Arch.embed_scale": arch("granite", embed_scale=1.0),
    "Arch.residual_scale": arch("granite", residual_scale=1.0),
    "Arch.logit_scale": arch("granite", logit_scale=1.0),
    "Arch.logit_softcap": arch("gemma2", logit_softcap=None),
    "Arch.experts": arch("mixtral", experts=Experts(4, 48, 1)),
    "Arch.latent": arch("deepseek_v2", latent=None),
    "Arch.biases": arch("qwen2", biases=()),
    "Arch.tied": arch("llama 3.1", tied=False),
    "Arch.renames": arch("gpt2", renames=()),
    "Arch.modules": arch("gpt2", modules=("model.wte", "model.h.", "lm_head")),
    "Arch.task": arch("llama", task="sequence", labels=1),
    "Arch.labels": arch("llama", labels=1),
    "Arch.init_std": arch("llama", init_std=0.3),
    "Arch.config": arch("llama", config="{}"),
    "Layer.window": layers("mistral", window=None),
    "Layer.rope": layers("smollm3", rope=0),
    "Layer.sparse": layers("qwen2_moe", sparse=True),
    "Rope.inv_freq": rope("llama 3.1", inv_freq=tuple(1000.0 ** -(np.arange(0, 8, 2) / 8))),
    "Rope.scale": rope("olmo3", scale=1.0),
    "Rope.dynamic": rope("llama", dynamic=(10000.0, 4.0, 16)),
    "Rope.long": rope("phi4", long=None),
    "Experts.count": part("mixtral", "experts", count=5),
    "Experts.size": part("mixtral", "experts", size=47),
    "Experts.per_token": part("mixtral", "experts", per_token=1),
    "Experts.shared": part("deepseek_v3", "experts", shared=0),
    "Experts.score": part("deepseek_v3", "experts", score="softmax"),
    "Experts.renormalize": part("mixtral", "experts", renormalize=False),
    "Experts.scale": part("deepseek_v2", "experts", scale=1.0),
    "Experts.groups": part("deepseek_v2", "experts", groups=1),
    "Experts.groups_per_token": part("deepseek_v2", "experts", groups_per_token=3),
    "Experts.group_pairs": part("deepseek_v3", "experts", group_pairs=False),
    "Latent.q_rank": part("deepseek_v2", "latent", q_rank=None),
    "Latent.kv_rank": part("deepseek_v2", "latent", kv_rank=11),
    "Latent.nope": part("deepseek_v2", "latent", nope=7),
    "Latent.rotated": part("deepseek_v2", "latent", rotated=2),
    "Latent.value": part("deepseek_v2", "latent", value=7),
}


def test_every_field_has_a_mutation() -> None:
    kinds = (Arch, Layer, Rope, Experts, Latent)
    fields = {f"{kind.__name__}.{f.name}" for kind in kinds for f in dataclasses.fields(kind)}
    assert MUTATIONS.keys() == fields


# These leave a model that cannot be computed or written at all, with the error that says so.
BROKEN: dict[str, type[Exception]] = {
    "Arch.latent": AssertionError,
    "Arch.renames": KeyError,
    "Arch.config": KeyError,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_turns_the_row_red(mutation: str, made: Any, tmp_path: Path) -> None:
    case, mutate = MUTATIONS[mutation]
    found = made(case)

    def change(model: Any, params: Any) -> tuple[Any, Any]:
        mutated = mutate(model.arch)
        assert mutated != model.arch
        return dataclasses.replace(model, arch=mutated), params

    if mutation not in BROKEN:
        assert red(found, change, tmp_path)
        return
    with pytest.raises(BROKEN[mutation]):
        red(found, change, tmp_path)


@pytest.mark.parametrize("case", sorted({case for case, _ in MUTATIONS.values()}))
def test_a_row_without_a_mutation_is_not_red(case: str, made: Any, tmp_path: Path) -> None:
    assert not red(made(case), rows.unchanged, tmp_path)


def red(found: rows.Made, change: rows.Change, out: Path) -> bool:
    """Whether the row shows the change: other leaves, other random weights, other logits or another
    file."""
    model, params = change(*load(found.folder, dtype="float32"))
    shapes = jax.tree.map(lambda leaf: leaf.shape, build(model.arch)[1])
    if shapes != jax.tree.map(lambda leaf: leaf.shape, params):
        return True
    spread = float(np.std(np.asarray(init(model.arch, jax.random.key(0))["embed"])))
    if abs(spread / 0.2 - 1) > 0.1:  # FIELDS' initializer_range
        return True
    if rows.logits_error(found, change) > 3 * rows.BOUNDS["float32"]:
        return True
    return not rows.round_trip(found, out, change)
