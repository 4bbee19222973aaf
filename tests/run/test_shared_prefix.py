"""Pairs whose prompt is computed once: the losses and gradients of pairs that have it twice."""

import json
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.data import Loader, collate_pairs
from mud_puppy.data.example import Example, PairExample
from mud_puppy.errors import UserError
from mud_puppy.model import Inputs, abstract, axes, check_prefix, init, scan_layers
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.run.methods import method_of
from mud_puppy.run.prepare import prepare
from mud_puppy.run.step import make_loss
from mud_puppy.weights import combine
from tests.tiny import SIZES, tiny_model

# (prompt, chosen, rejected): no prompt, one of a token, the prompt short and long.
PAIRS = [(0, 4, 6), (1, 5, 3), (2, 3, 4), (9, 4, 1), (24, 8, 6), (17, 2, 9), (12, 12, 12)]
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 2,
}
MODELS = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},  # norms of queries and keys
    "mixtral": {"model_type": "mixtral"} | MIXTURE,
    "gemma2": {  # softcaps; its window is no shorter than a row
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 128,
    },
    "gpt_oss": {"model_type": "gpt_oss", "head_dim": 8, "sliding_window": 128} | MIXTURE,  # sinks
    "deepseek_v2": {"model_type": "deepseek_v2"} | LATENT,
}


def pairs(once: bool, sizes: Any = PAIRS) -> list[PairExample]:
    rng = np.random.default_rng(0)
    made = []
    for k, (prompt, *answers) in enumerate(sizes):
        asked = rng.integers(1, SIZES["vocab_size"], prompt)
        both = []
        for answer in answers:
            tokens = np.r_[asked, rng.integers(1, SIZES["vocab_size"], answer)].astype(np.int32)
            weights = np.r_[np.zeros(prompt), np.ones(answer)].astype(np.float32)
            weights[0] = 0
            both.append(Example(tokens, weights, f"x:{k}"))
        chosen, rejected = both
        pair = PairExample(chosen, rejected, prompt, margin=0.1 * k, prompt_once=once)
        made.append(pair)
    return made


def batch_of(once: bool, length: int = 128, rows: int | None = None, **options: Any) -> dict:
    """All pairs in one step [B, ...], several a row."""
    collate = partial(collate_pairs, shared_prefix=once, **options)
    loader = Loader(pairs(once), 1, max_seq_length=length, collate=collate)
    assert loader.most > 1
    rows = rows or len(loader.rows)
    return Loader(pairs(once), rows, max_seq_length=length, collate=collate).batch_at(0)


def config_of(**keys: Any) -> Config:
    given = dict(model="m", dataset="d", output="o", method="preference", tune="full")
    return Config.load(given | {"precision": "fp32"} | keys)


def model_of(fields: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(model, params, other params: the reference's)"""
    model, _ = abstract({"model_type": "llama"} | SIZES | fields)
    return model, *(init(model.arch, jax.random.key(seed)) for seed in (0, 1))


@cache
def compiled(model: Any, config: Config) -> Any:
    method = method_of(config)
    loss = make_loss(model, method, scan_layers)

    def run(params: Any, kept: Any, micro: Any) -> Any:
        frozen = jax.tree.map(lambda x: None, params)
        weight_sum, key = micro["pair_weights"].sum(), jax.random.key(0)

        def value(params: Any) -> Any:
            before = kept if method.reference else None
            return loss(params, frozen, before, micro, key, weight_sum)

        (total, metrics), grads = jax.value_and_grad(value, has_aux=True)(params)
        return total, metrics, grads

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def results(made: Any, batch: dict, config: Config) -> tuple[Any, Any, Any]:
    """(value, metrics, gradient of all params) of the loss of a batch [1, B, ...]."""
    model, params, kept = made
    micro = {name: x[0] for name, x in batch.items()}
    return jax.device_get(compiled(model, config)(params, kept, micro))


def differences(a: Any, b: Any) -> float:
    """The largest over a leaf's own size."""
    found = []
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.isfinite(x).all() and np.isfinite(y).all()
        found.append(np.abs(x - y).max() / max(np.abs(y).max(), 1e-2))
    return max(found)


SLOW = ("gpt_oss", "deepseek_v2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS],
)
def test_dpo_is_that_of_both_prompts(name: str) -> None:
    made, config = model_of(MODELS[name]), config_of()
    once, twice = batch_of(True), batch_of(False)
    tokens = [np.count_nonzero(batch["segment_ids"]) for batch in (once, twice)]
    assert tokens[1] - tokens[0] == sum(max(prompt - 1, 0) for prompt, *_ in PAIRS)
    value, metrics, grads = results(made, once, config)
    want, want_metrics, want_grads = results(made, twice, config)
    assert value == pytest.approx(want, rel=1e-5) and abs(value - np.log(2)) > 1e-2
    assert differences(grads, want_grads) < 1e-5
    for kind in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        np.testing.assert_allclose(metrics[kind], want_metrics[kind], rtol=1e-4, atol=1e-5)


MUTATIONS = {
    "no prefix is seen": lambda b: b | {"prefix_ids": np.zeros_like(b["prefix_ids"])},
    "the chosen answer is seen": lambda b: b | {"prefix_ids": wider(b)},
    "positions start anew": lambda b: b | {"positions": np.where(tail(b), 0, b["positions"])},
    "another pair's prompt": lambda b: (
        b | {"prefix_ids": np.where(b["prefix_ids"] < 0, -1, b["prefix_ids"])}
    ),
}


def tail(batch: dict) -> Any:
    return batch["prefix_ids"] < 0


def wider(batch: dict) -> Any:
    """Prefixes that hold one token more: the chosen answer's first."""
    ids = batch["prefix_ids"]
    return np.where((np.roll(ids, 2, -1) > 0) & (ids == 0), np.roll(ids, 2, -1), ids)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_batch_differs(name: str) -> None:
    made, config = model_of({}), config_of()
    value, _, grads = results(made, MUTATIONS[name](batch_of(True)), config)
    want, _, want_grads = results(made, batch_of(False), config)
    assert differences(grads, want_grads) > 1e-3 and value != pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"preference": "orpo", "train_on_prompt": True}, {"train_on_prompt": True}),
        ({"preference": "sigmoid=0.8,sft=0.2", "ld_alpha": 0.5}, {"ld_alpha": 0.5}),
        pytest.param({"preference": "simpo"}, {}, marks=pytest.mark.slow),
    ],
)
def test_other_losses(keys: dict, options: dict) -> None:
    made, config = model_of({}), config_of(**keys)
    got = results(made, batch_of(True, **options), config)
    want = results(made, batch_of(False, **options), config)
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert differences(got[2], want[2]) < 1e-5


def test_rewards() -> None:
    """A reward model reads the last tokens, of which one is a pad token here."""
    fields = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    config = config_of(method="rm")
    last = int(pairs(True)[4].rejected.tokens[-1])
    got, want = (
        results(model_of(fields), batch_of(once, pad_token_id=last), config)
        for once in (True, False)
    )
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert differences(got[2], want[2]) < 1e-5


def test_eight_devices() -> None:
    """Two steps on a mesh, with prompts once, are those of one device with prompts twice."""
    found = []
    for once, spec in ((True, "data=2,fsdp=4"), (False, "data=1,fsdp=1")):
        model, params = tiny_model()
        mesh = make_mesh(spec)
        params = jax.device_put(params, shardings(mesh, axes(model.arch), params))
        config = config_of(optimizer="sgd", learning_rate=0.1, max_grad_norm=None)
        run = prepare(config, model, params, mesh, 2)
        state = run.state
        with jax.set_mesh(mesh):
            for _ in range(2):
                state, metrics = run.step(state, batch_of(once, length=64, rows=8))
        train = jax.device_get(combine(state.train, run.frozen))
        found.append((float(metrics["loss"][0] / metrics["loss"][1]), train))
    (loss, train), (want, want_train) = found
    assert loss == pytest.approx(want, rel=1e-5) and loss != pytest.approx(np.log(2), abs=1e-3)
    assert differences(train, want_train) < 1e-5


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (MODELS["gemma2"] | {"sliding_window": 48}, r"gemma2\) see 48 tokens back .* rows have 64"),
        (MODELS["gpt_oss"] | {"sliding_window": 8}, r"gpt_oss\) see 8 tokens"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
            | {"max_position_embeddings": 32},
            "a RoPE that changes beyond 32 tokens, but rows have 64",
        ),
        (
            {"model_type": "phi3", "rope_parameters": LONGROPE}
            | {"max_position_embeddings": 64, "original_max_position_embeddings": 32},
            "a RoPE that changes beyond 32 tokens.* max_seq_length to at most 16",
        ),
    ],
)
def test_models_that_cannot(fields: dict, words: str) -> None:
    model, _ = abstract({"model_type": "llama"} | SIZES | fields)
    with pytest.raises(UserError, match=words):
        check_prefix(model.arch, 64)
    check_prefix(model.arch, 8)
    ids = jnp.zeros((1, 64), jnp.int32)
    inputs = Inputs(ids, ids, ids, prefix_ids=ids)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model.forward, init(model.arch, jax.random.key(0)), inputs)


def test_inputs_that_mean_nothing() -> None:
    model, params = tiny_model()
    ids = jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="prefix_ids need positions and segment_ids"):
        model.forward(params, Inputs(ids, prefix_ids=ids))


def written(path: Path) -> str:
    rows = [
        {"prompt": f"say {w}", "chosen": f"{w} {w}", "rejected": "no"}
        for w in "red blue green one two three cat dog".split()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained(config: dict[str, Any], tmp_path: Path, once: bool, **keys: Any) -> list[dict]:
    """The lines of a run's metrics."""
    base = config | {"method": "preference", "output": str(tmp_path / f"{once}")}
    base |= {"dataset": written(tmp_path / "pairs.jsonl"), "max_steps": 4}
    base |= {"pack_sequences": False, "shared_prefix": once}
    result = mp.train(base | keys)
    lines = (result.output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("keys", [{}, pytest.param({"method": "rm"}, marks=pytest.mark.slow)])
def test_runs_are_those_with_both_prompts(config: Any, tmp_path: Path, keys: dict) -> None:
    once, twice = (trained(config, tmp_path, way, **keys) for way in (True, False))
    assert len(once) == len(twice) == 4
    for a, b in zip(once, twice, strict=True):
        for name in {"loss", "grad_norm", "rewards/margins", "accuracy", "margin"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    assert min(line["loss"] for line in once) < 0.9 * once[0]["loss"]


def test_a_run_whose_model_cannot(config: Any, tmp_path: Path) -> None:
    """It is said before the weights are read."""
    folder = shutil.copytree(config["model"], tmp_path / "mistral")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fields | {"sliding_window": 24}))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"mistral\) see 24 tokens back .* rows have 64"):
        trained(config | {"model": str(folder)}, tmp_path, True)


@pytest.mark.parametrize(
    "keys", [{"preference": "kto"}, {"method": "rm", "reward": "labels"}, {"method": "prm"}]
)
def test_methods_that_have_no_pairs(keys: dict) -> None:
    with pytest.raises(UserError, match=r"shared_prefix .*pairs"):
        config_of(shared_prefix=True, **keys)
