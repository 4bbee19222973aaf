"""The step that a plan compiles is the run's own: same shapes, same memory, counted right."""

import json

import jax
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.model import axes, init
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.plan.step import build, shapes_of
from mud_puppy.run.kinds import kind_of
from mud_puppy.run.prepare import load_params, prepare
from mud_puppy.run.reference import kept_of
from mud_puppy.run.teacher import load_teacher
from tests.tiny import SIZES, tiny_model

ROWS, LENGTH = 2, 64
METHODS = {
    "full": {"method": "full"},
    "full 8-bit states": {"method": "full", "optimizer": "adamw_8bit"},
    "lora": {"method": "lora"},
    "lora offloaded": {"method": "lora", "gradient_checkpointing": "offload"},
    "dora": {"method": "lora", "lora_dora": True},
    "nf4": {"method": "qlora", "quant_group": 16},
    "int4, embeddings": {
        "method": "qlora", "quant_backend": "int4", "quant_group": 16, "quant_embeddings": True
    },
    "qat": {"method": "qat", "qat_format": "int8"},
    "fp8": {"method": "full", "precision": "fp8-emulated"},
    "dpo": {"method": "preference"},
    "dpo full": {"method": "preference", "tune": "full"},
    "dpo full, codes": {"method": "preference", "tune": "full", "reference": "int8"},
    "dpo full, cached": {"method": "preference", "tune": "full", "reference": "cached"},
    "kto": {"method": "preference", "preference": "kto"},
    "distill, file": {"method": "distill", "teacher_logits": "no file yet"},
    "simpo full": {"method": "preference", "preference": "simpo", "tune": "full"},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with weights, for runs to compare with."""
    folder = tmp_path_factory.mktemp("saved")
    model, params = tiny_model(max_position_embeddings=4096)
    mp.save_hf(model, params, folder)
    return folder


def config_of(folder, keys, **more) -> Config:
    lora = {"lora_r": 4} if keys.get("tune", keys["method"]) not in ("full", "qat") else {}
    fixed = {"model": str(folder), "dataset": "-", "output": "-"}
    return Config.load(fixed | lora | keys | more)


def batch(config):
    row = kind_of(config).empty(LENGTH)
    return {name: np.stack([np.concatenate(ROWS * [x])]) for name, x in row.items()}


def planned(config, source, spec="data=1,fsdp=1", rows=ROWS):
    mesh = make_mesh(spec)
    with jax.set_mesh(mesh):
        step = build(config, source, mesh, rows, LENGTH)
        return step, step.traced.lower().compile().memory_analysis()


def sizes(stats) -> tuple[int, ...]:
    return (
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.host_temp_size_in_bytes,
    )


@pytest.mark.parametrize("keys", METHODS.values(), ids=METHODS)
def test_the_plan_is_of_the_run(saved, keys):
    """Shapes are those of the arrays that a run makes, the compiled step needs what the run's
    does, and what the plan names is what the run holds."""
    config, mesh = config_of(saved, keys), make_mesh("data=1,fsdp=1")
    _, shapes = shapes_of(config, str(saved))
    with jax.set_mesh(mesh):
        model, params = load_params(config, mesh)
        assert jax.tree.structure(shapes) == jax.tree.structure(params)
        jax.tree.map(lambda s, x: (s.shape, s.dtype) == (x.shape, x.dtype) or 1 / 0, shapes, params)
        kept = kept_of(config, params)
        run = prepare(config, model, params, mesh, 1000)
        stats = run.lower(batch(config)).compile().memory_analysis()
    step, plan = planned(config, str(saved))
    assert sizes(plan) == sizes(stats)
    held, bytes_of = step.held, lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    trained, frozen = bytes_of(run.state.train), bytes_of(run.frozen)
    whole = held.weights + held.adapter + held.optimizer
    assert whole == trained + frozen + bytes_of(run.state) - trained + bytes_of(kept)
    asked = "simpo" not in config.losses and config.reference != "cached"
    assert (kept is not None) == (keys.get("tune") == "full" and asked)
    assert (held.adapter == trained) == config.adapts and held.gradients == trained
    assert plan.argument_size_in_bytes == pytest.approx(whole + held.batch, rel=0.02)


def test_a_teacher_is_counted(saved):
    """As the run holds it: its memory is that of the weights, and it saves no activations."""
    keys = {"method": "distill", "teacher": str(saved), "teacher_quant": "int8", "tune": "full"}
    config, mesh = config_of(saved, keys), make_mesh("data=1,fsdp=1")
    with jax.set_mesh(mesh):
        model, params = load_params(config, mesh)
        run = prepare(config, model, params, mesh, 1000)
        stats = run.lower(batch(config)).compile().memory_analysis()
    step, plan = planned(config, str(saved))
    assert sizes(plan) == sizes(stats)
    alone, _ = planned(config_of(saved, {"method": "full"}), str(saved))
    teacher = sum(x.nbytes for x in jax.tree.leaves(load_teacher(config, mesh).params))
    assert step.held.weights == alone.held.weights + teacher
    # Beside what the student alone keeps, the teacher's hidden states.
    assert step.held.activations <= alone.held.activations + ROWS * LENGTH * 32 * 4


def test_what_the_forward_pass_keeps(saved):
    """Of each layer its input, on the device or on the host."""
    inputs = 2 * ROWS * LENGTH * 32 * 2  # layers, tokens, width, bfloat16
    found = {
        kind: planned(config_of(saved, {"method": "lora"}, gradient_checkpointing=kind), str(saved))
        for kind in ("full", "offload", "none")
    }
    full, offload, none = (found[kind][0].held for kind in ("full", "offload", "none"))
    assert offload.offloaded == inputs and full.offloaded == 0
    assert full.activations - offload.activations == inputs
    assert none.activations > 4 * full.activations


@pytest.mark.parametrize("spec", ["data=1,fsdp=4", "data=4,fsdp=1"])
def test_a_share_of_several_devices(saved, spec):
    config = config_of(saved, {"method": "full"}, mesh=spec)
    one, alone = planned(config, str(saved), rows=8)
    step, each = planned(config, str(saved), spec, rows=8)
    split = 4 if "fsdp=4" in spec else 1
    assert step.held.weights == pytest.approx(one.held.weights / split, rel=0.05)
    assert step.held.optimizer == pytest.approx(one.held.optimizer / split, rel=0.05)
    assert step.held.activations == one.held.activations // 4
    assert step.held.batch == one.held.batch // 4
    assert each.temp_size_in_bytes < alone.temp_size_in_bytes
    assert step.flops == pytest.approx(one.flops, rel=0.05)  # of all devices


def test_no_array_of_the_model_is_made(folder):
    before = sum(x.nbytes for x in jax.live_arrays())
    step, _ = planned(config_of(folder, METHODS["nf4"]), str(folder))
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1000 < step.held.weights


def test_flops_of_a_full_step(saved):
    """Forward, and twice as much backward; the logits once more, since they are not kept."""
    model, _ = tiny_model(max_position_embeddings=4096)
    D, F, V, layers = 32, 48, 64, 2
    kv = model.arch.kv_heads * model.arch.head_dim
    linears = layers * (2 * D * D + 2 * D * kv + 3 * D * F)
    keys = {"method": "full", "gradient_checkpointing": "none"}
    tokens = ROWS * LENGTH
    none = planned(config_of(saved, keys), str(saved))[0].flops
    full = planned(config_of(saved, {"method": "full"}), str(saved))[0].flops
    heads = layers * tokens * LENGTH * D * 2  # scores or values of all pairs, once
    least = tokens * (6 * linears + 6 * V * D) + 6 * heads / 2
    most = tokens * (6 * linears + 8 * V * D) + 8 * heads
    assert least <= none <= most
    assert full - none == pytest.approx(2 * tokens * linears + 2 * heads, rel=0.2)
    twice = config_of(saved, keys, gradient_accumulation=2)
    assert planned(twice, str(saved))[0].flops == 2 * none


def test_random_params_have_the_plans_shapes():
    """`init`, which speed is measured with, and a plan agree."""
    model, _ = tiny_model()
    config = config_of("-", {"method": "full"})
    shapes = shapes_of(config, json.loads(model.arch.config))[1]
    params = init(model.arch, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    assert shardings(make_mesh(), axes(model.arch), shapes) is not None


def test_an_embedding_that_is_looked_up_is_not_counted_as_read():
    """What a step reads at least: all its arguments, but of an untied embedding a few rows."""
    untied = {"model_type": "llama", "tie_word_embeddings": False, **SIZES}
    keys = METHODS["lora"]
    step, _ = planned(config_of("-", keys), untied)
    assert step.held.looked_up == 64 * 32 * 2
    tied, _ = planned(config_of("-", keys), untied | {"tie_word_embeddings": True})
    trained, _ = planned(config_of("-", METHODS["full"]), untied)
    assert tied.held.looked_up == trained.held.looked_up == 0
