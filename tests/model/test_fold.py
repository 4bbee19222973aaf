"""Folding scales into what makes a linear's inputs changes no logits, of any family."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.model.block import canonical, original
from mud_puppy.model.decoder import spans
from mud_puppy.model.fold import Stage, fold, shared, spread, stages
from mud_puppy.weights.tree import at_path, linear_paths, repeats, with_path
from tests.model.family_cases import CASES
from tests.model.family_models import TOKENS, difference, ours

FAST = ("llama", "gemma2", "qwen2_moe")
EACH = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def folded(model: Any, params: Any, only: Any = None, fault: Any = None) -> tuple[Any, int]:
    """Every layer with random scales of each stage, or `only` some; and how many were scaled.
    fault(block before, block after, stage) -> the block."""
    rng, count, groups = np.random.default_rng(1), 0, []
    for group, _ in spans(params):
        blocks = []
        for stack in group:
            layers = []
            for r in range(repeats(group)):
                block = canonical(model.arch, jax.tree.map(lambda x, r=r: x[r], stack))
                for stage in stages(model.arch, block):
                    if stage.source is None or (only is not None and not only(stage)):
                        continue
                    w = at_path(block, stage.paths[0])["weight"]
                    n = shared(model.arch, stage, jnp.zeros(w.shape[-1])).shape
                    s = jnp.asarray(np.exp(rng.normal(size=(*w.shape[:-2], *n))), jnp.float32)
                    after = fold(model.arch, block, stage, s)
                    block = after if fault is None else fault(block, after, stage)
                    count += 1
                layers.append(original(model.arch, block))
            blocks.append(jax.tree.map(lambda *xs: jnp.stack(xs), *layers))
        groups.append(blocks)
    return {**params, "layers": groups}, count


def logits(model: Any, params: Any) -> Any:
    return model(params, jnp.asarray(TOKENS))


@pytest.mark.parametrize("case", EACH)
def test_logits_stay_as_they_are(case: str) -> None:
    model, params = ours(case)
    done, count = folded(model, params)
    assert count >= model.arch.layers or case.startswith(("olmo2", "olmo3", "cohere", "gpt_oss"))
    assert difference(logits(model, done), logits(model, params)) < 2e-5


@pytest.mark.parametrize("case", list(CASES))
def test_every_linear_is_of_one_stage(case: str) -> None:
    model, params = ours(case)
    for stack in (stack for group, _ in spans(params) for stack in group):
        block = canonical(model.arch, stack)
        found = [path for stage in stages(model.arch, block) for path in stage.paths]
        kept = {path for path in linear_paths(block) if path[-1] == "shared_expert_gate"}
        assert sorted(found) == sorted(set(linear_paths(block)) - kept)


@pytest.mark.parametrize("i", range(4))
def test_each_stage_changes_its_weights(i: int) -> None:
    model, params = ours("gemma")
    (group,) = params["layers"]
    stage = stages(model.arch, group[0])[i]
    done, _ = folded(model, params, lambda own: own == stage)
    for path in stage.paths:
        a, b = (at_path(p["layers"][0][0], path)["weight"] for p in (params, done))
        assert np.abs(np.asarray(a - b)).max() > 0.1

    # Without the source's part it is another function.
    def half(before: Any, after: Any, own: Stage) -> Any:
        assert own.source is not None
        return with_path(after, own.source, at_path(before, own.source))

    wrong, _ = folded(model, params, lambda own: own == stage, half)
    assert difference(logits(model, wrong), logits(model, params)) > 1e-2


def test_heads_that_share_a_key_share_its_scales() -> None:
    model, params = ours("llama")
    found = stages(model.arch, params["layers"][0][0])
    stage = found[1]
    x = jnp.arange(32.0)  # 4 heads of 8; 0 and 1 share a key
    means = shared(model.arch, stage, x)
    assert means.tolist() == [i + 4.0 for i in range(8)] + [i + 20.0 for i in range(8)]
    wide = spread(model.arch, stage, jnp.stack([means, 2 * means]))
    assert wide.shape == (2, 32)
    assert wide[0, :16].tolist() == [i + 4.0 for i in range(8)] * 2
    for other in (found[0], found[2], found[3]):
        assert shared(model.arch, other, x) is x and spread(model.arch, other, x) is x
