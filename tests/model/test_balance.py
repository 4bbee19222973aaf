"""Router losses: transformers' load balancing, and what it adds to a step's gradient."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.model import Inputs, balance, load, scan_layers
from mud_puppy.model.balance import router_losses, routing_of
from mud_puppy.model.names import flatten, hf_names
from mud_puppy.run.methods import SFT
from mud_puppy.run.step import make_loss
from tests.model.family_models import TOKENS as ANY_TOKENS
from tests.model.family_models import ours, saved

COEFFICIENT = 0.3
TOKENS = np.maximum(ANY_TOKENS, 1)  # torch gives the embedding of padding, 0, no gradient
SEGMENTS = np.ones_like(TOKENS)
SEGMENTS[1, 15:] = 0
LABELS = np.where(SEGMENTS > 0, TOKENS, -100)


def batch() -> dict[str, Any]:
    """TOKENS with the end of the second row as padding."""
    targets = np.roll(TOKENS, -1, axis=1)
    weights = (np.roll(SEGMENTS, -1, axis=1) > 0) & (SEGMENTS > 0)
    weights[:, -1] = False
    return {
        "tokens": jnp.asarray(TOKENS),
        "positions": jnp.broadcast_to(jnp.arange(24), TOKENS.shape),
        "segment_ids": jnp.asarray(SEGMENTS),
        "targets": jnp.asarray(targets),
        "weights": jnp.asarray(weights, jnp.float32),
    }


def theirs(model: Any) -> tuple[float, dict[str, np.ndarray]]:
    """transformers' (auxiliary loss, gradients of the whole loss by its file's names)."""
    import torch

    ids, labels, mask = (torch.tensor(x, dtype=torch.long) for x in (TOKENS, LABELS, SEGMENTS))
    out = model(input_ids=ids, labels=labels, attention_mask=mask, output_router_logits=True)
    out.loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return float(out.aux_loss.detach()), grads


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: Any) -> tuple[Path, float, dict[str, np.ndarray]]:
    """A folder with a model, and what transformers says of it."""
    folder = tmp_path_factory.mktemp("mixtral")
    fields = {"router_aux_loss_coef": COEFFICIENT, "output_router_logits": True}
    return folder, *theirs(saved("mixtral", folder, sliding_window=None, **fields))


def gradients(folder: Path, penalties: dict[str, float]) -> tuple[Any, Any, dict[str, Any]]:
    """(metrics, model, gradients by leaf) of one step's loss."""
    model, params = load(folder, dtype="float32")
    given, key = batch(), jax.random.key(0)
    loss = make_loss(model, SFT, partial(scan_layers, remat="none"), penalties)
    none = jax.tree.map(lambda x: None, params)

    def whole(params: Any) -> Any:
        return loss(params, none, None, given, key, given["weights"].sum())

    grads, metrics = jax.jit(jax.grad(whole, has_aux=True))(params)
    return metrics, model, flatten(grads)


def compare(model: Any, grads: dict[str, Any], wanted: dict[str, np.ndarray]) -> float:
    """The largest difference of routers, attention and embedding, as a share of their size."""
    worst = 0.0
    for path, names in hf_names(model.arch, grads_tree(grads)).items():
        stacked = path.startswith("layers/")
        for i, name in enumerate(names):
            name = name.replace("block_sparse_moe", "mlp")
            if "experts" in path or name not in wanted:
                continue
            own = np.asarray(grads[path][i] if stacked else grads[path])
            worst = max(worst, np.abs(own - wanted[name]).max() / np.abs(wanted[name]).max())
    return worst


def grads_tree(grads: dict[str, Any]) -> Any:
    tree: dict[str, Any] = {"layers": [[{}]]}
    for path, leaf in grads.items():
        *above, name = path.split("/")
        node: Any = tree
        for part in above:
            node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
        node[name] = leaf
    return tree


def test_the_whole_gradient_is_that_of_transformers(mixtral: Any) -> None:
    folder, aux, wanted = mixtral
    metrics, model, grads = gradients(folder, {"load_balance": COEFFICIENT})
    total, count = metrics["load_balance"]
    np.testing.assert_allclose(total / count, aux, rtol=1e-5)
    assert count == SEGMENTS.sum() * 3
    assert compare(model, grads, wanted) < 2e-5
    # Without it, or with padding counted, it is another.
    assert compare(model, gradients(folder, {})[2], wanted) > 1e-2


def test_the_comparison_fails_when_padding_counts(mixtral: Any, monkeypatch: Any) -> None:
    folder, aux, wanted = mixtral
    from mud_puppy.model import decoder

    monkeypatch.setattr(decoder, "routing_of", lambda a, x, c, s: balance.routing_of(a, x, c, None))
    metrics, model, grads = gradients(folder, {"load_balance": COEFFICIENT})
    total, count = metrics["load_balance"]
    assert abs(total / count - aux) > 1e-3 and compare(model, grads, wanted) > 1e-3


def test_values_by_hand() -> None:
    model, _ = ours("mixtral")
    even = jnp.zeros((1, 8, 4))
    both = jnp.broadcast_to(jnp.arange(2), (1, 8, 2))
    sums = router_losses(routing_of(model.arch, even, both, None))
    assert float(sums["load_balance"][0] / 8) == pytest.approx(2)  # k = 2 experts, evenly
    assert float(sums["router_z"][0] / 8) == pytest.approx(np.log(4) ** 2)
    one = even.at[..., :2].set(50.0)
    sums = router_losses(routing_of(model.arch, one, both, None))
    assert float(sums["load_balance"][0] / 8) == pytest.approx(4)  # all tokens to two of four
    assert router_losses(None) == {}


def test_micro_batches_share_a_steps_losses() -> None:
    """Each adds its own balance by its share of the weights, and z is the mean over tokens."""
    model, params = ours("qwen3_moe")
    given = batch()
    total = given["weights"].sum()
    none = jax.tree.map(lambda x: None, params)

    def value(penalties: dict[str, float], rows: slice) -> tuple[float, Any]:
        loss = jax.jit(make_loss(model, SFT, scan_layers, penalties))
        own = {name: x[rows] for name, x in given.items()}
        out, metrics = loss(params, none, None, own, jax.random.key(0), total)
        return float(out), metrics

    for row in (slice(0, 1), slice(1, 2)):
        plain, _ = value({}, row)
        more, metrics = value({"load_balance": 0.5, "router_z": 0.25}, row)
        share = given["weights"][row].sum() / total
        balance, z = (metrics[n][0] / metrics[n][1] for n in ("load_balance", "router_z"))
        assert more - plain == pytest.approx(float(share * (0.5 * balance + 0.25 * z)), rel=1e-4)


def test_padding_is_given_to_no_expert() -> None:
    model, params = ours("qwen2_moe")
    forward = jax.jit(model.forward)
    inputs = Inputs(jnp.asarray(TOKENS), segment_ids=jnp.asarray(SEGMENTS))
    hidden, _, sums = forward(params, inputs)
    other = jnp.where(jnp.asarray(SEGMENTS) > 0, inputs.tokens, 7)
    again, _, other_sums = forward(params, replace(inputs, tokens=other))
    seen = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(hidden)[seen], np.asarray(again)[seen], atol=1e-5)
    for name, (total, count) in sums.items():
        np.testing.assert_allclose((total, count), other_sums[name], rtol=1e-5)
