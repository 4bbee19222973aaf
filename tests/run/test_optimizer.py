"""Which leaves decay, what LoRA+ multiplies, and that Muon works matrix by matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.optimization import Adafactor

from mud_puppy.run.optimizer import make_optimizer
from mud_puppy.run.schedule import schedule
from mud_puppy.weights import add_lora, partition

RATE = schedule("constant", 0.1, 10, 0)


def update(name, train, grads, **options):
    tx = make_optimizer(name, RATE, train, **options)
    return tx.update(grads, tx.init(train), train)[0]


def test_norms_and_biases_do_not_decay():
    train = {"final_norm": jnp.ones(3), "x": {"bias": jnp.ones(3), "weight": jnp.ones((3, 3))}}
    zero = jax.tree.map(jnp.zeros_like, train)
    moved = update("adamw", train, zero, weight_decay=0.5)
    assert float(jnp.abs(moved["final_norm"]).max()) == 0
    assert float(jnp.abs(moved["x"]["bias"]).max()) == 0
    np.testing.assert_allclose(moved["x"]["weight"], -0.05, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["attn_norm_bias", "final_norm_bias", "router_bias", "choice_bias", "q_a_layernorm"]
)
def test_other_biases_do_not_decay_either(name):
    x = {"layers": [[{name: jnp.ones((2, 4)), "router": jnp.ones((2, 4, 4))}]]}
    zeros = jax.tree.map(jnp.zeros_like, x)
    (moved,) = update("adamw", x, zeros, weight_decay=0.5)["layers"][0]
    assert not np.any(moved[name]) and np.all(moved["router"] != 0)


def test_adamw_is_torchs():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(4, 3)).astype(np.float32)
    gs = rng.normal(size=(5, 4, 3)).astype(np.float32)
    p = torch.nn.Parameter(torch.tensor(w))
    theirs = torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    ours = {"weight": jnp.asarray(w)}
    options = dict(weight_decay=0.3, beta1=0.8, beta2=0.95, epsilon=1e-6)
    tx = make_optimizer("adamw", RATE, ours, **options)
    state = tx.init(ours)
    for g in gs:
        p.grad = torch.tensor(g)
        theirs.step()
        move, state = tx.update({"weight": jnp.asarray(g)}, state, ours)
        ours = optax.apply_updates(ours, move)
    np.testing.assert_allclose(ours["weight"], p.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adafactor_is_transformers_layer_by_layer():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 128, 160)).astype(np.float32)
    gs = rng.normal(size=(4, 2, 128, 160)).astype(np.float32)
    gs[1:, 1] *= 30  # only the second layer is clipped
    ps = [torch.nn.Parameter(torch.tensor(x)) for x in w]
    theirs = Adafactor(ps, lr=0.1, scale_parameter=False, relative_step=False)
    for g in gs:
        for p, x in zip(ps, g, strict=True):
            p.grad = torch.tensor(x)
        theirs.step()
    want = np.stack([p.detach().numpy() for p in ps])

    def ours(name):
        params = {name: jnp.asarray(w)}
        tx = make_optimizer("adafactor", RATE, params)
        state = tx.init(params)
        for g in gs:
            move, state = tx.update({name: jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, move)
        return params[name]

    np.testing.assert_allclose(ours("layers"), want, rtol=1e-4, atol=1e-5)
    assert np.abs(ours("one matrix") - want).max() > 0.01


def test_lora_plus_multiplies_b(tiny):
    train, _ = partition(add_lora(tiny[1], 4, 8, key=jax.random.key(0)))
    ones = jax.tree.map(jnp.ones_like, train)
    plain, plus = (update("adamw", train, ones, loraplus_lr_ratio=r) for r in (1.0, 16.0))
    for path, x in jax.tree.leaves_with_path(plus):
        ratio = 16.0 if jax.tree_util.keystr((path[-1],)) == ".b" else 1.0
        before = dict(jax.tree.leaves_with_path(plain))[path]
        np.testing.assert_allclose(x, before * ratio, rtol=1e-6)


def test_muon_orthogonalises_each_layer_alone():
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.normal(size=(3, 8, 6)), jnp.float32)

    def tree(x):
        return {"layers": [[{"weight": x}]], "embed": jnp.ones((4, 4))}

    stacked = update("muon", tree(g), tree(g))["layers"][0][0]["weight"]
    alone = update("muon", tree(g[1:2]), tree(g[1:2]))["layers"][0][0]["weight"]
    np.testing.assert_allclose(stacked[1], alone[0], rtol=1e-4, atol=1e-5)
    singular = np.linalg.svd(np.asarray(stacked[1]), compute_uv=False)
    assert singular.max() / singular.min() < 2.5


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_each_expert_is_a_matrix_and_its_bias_is_none(name):
    """[n, E, out, in] as n E matrices; biases [n, E, out] and norms of each head [n, H, hd] not."""
    rng = np.random.default_rng(0)
    w, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 8, 6), (2, 3, 8)))

    def tree(w, b):
        return {"layers": [[{"experts": {"weight": w, "bias": b}, "q_norm": b}]]}

    def moved(w, b):
        return update(name, tree(w, b), tree(10 * w, b))["layers"][0][0]

    ours = moved(w, b)
    flat = moved(w.reshape(6, 8, 6), b)["experts"]["weight"].reshape(w.shape)
    if name == "muon":
        np.testing.assert_allclose(ours["experts"]["weight"], flat, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.abs(ours["experts"]["bias"]), RATE(0), rtol=1e-3)
        np.testing.assert_allclose(np.abs(ours["q_norm"]), RATE(0), rtol=1e-3)
    else:
        rms = np.sqrt(np.mean(np.square(ours["experts"]["weight"]), axis=(2, 3)))
        assert (rms <= 1.001 * RATE(0)).all()
