"""Classification heads: reward models and token classifiers of every family that transformers has
them of, with its scores, in its files, and in PEFT's."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.auto import modeling_auto

from mud_puppy.errors import UserError
from mud_puppy.export import save_hf, save_merged, save_quantized
from mud_puppy.model import Inputs, abstract, init, load, score_head, with_score_head
from mud_puppy.model.decoder import head
from mud_puppy.model.families import FAMILIES, HEADS
from mud_puppy.parallel import make_mesh
from mud_puppy.weights import (
    Lora,
    adapter_head,
    add_lora,
    combine,
    is_weight,
    load_adapter,
    merge_lora,
    partition,
    quantize,
    save_adapter,
    strip_lora,
)
from tests.model.family_cases import CASES, FIELDS
from tests.model.test_bitsandbytes_format import run as bitsandbytes_run
from tests.tiny import tiny_model

# PEFT calls what transformers has renamed, and tells of what it does with experts.
pytestmark = pytest.mark.filterwarnings("ignore")

TENSORS = "model.safetensors"
ENDS = (29, 39)
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 40), dtype=np.int32)
TOKENS[0, ENDS[0] + 1 :] = 0  # padding: FIELDS' pad_token_id
LABELS = {"sequence": 1, "token": 3}
AUTO = {
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
}


def family_of(case: str) -> str:
    return getattr(transformers, f"{CASES[case][0]}Config").model_type


KNOWN = [(c, t) for c in CASES for t in HEADS.get(family_of(c), {})]
# A common one, an odd one, experts that are renamed, and a softcap that scores have not.
FAST = {("llama", "token"), ("gpt2", "token"), ("gemma2", "sequence"), ("mixtral", "sequence")}
EACH = [k if k in FAST else pytest.param(*k, marks=pytest.mark.slow) for k in KNOWN]


@dataclass(frozen=True)
class Made:
    folder: Path
    torch: Any
    scores: np.ndarray  # transformers', [B, labels], of a token classifier [B, T, labels]


def config_of(case: str, **fields: Any) -> Any:
    name, own = CASES[case]
    fields = FIELDS | {"attn_implementation": "eager"} | own | fields
    return getattr(transformers, f"{name}Config")(**fields)


def of_torch(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Callable[[str, str], Made]:
    """made(case, task): transformers' classifier, saved; each is made once."""
    found: dict[tuple[str, str], Made] = {}

    def make(case: str, task: str) -> Made:
        if (case, task) in found:
            return found[case, task]
        torch.manual_seed(0)
        model = AUTO[task].from_config(config_of(case, num_labels=LABELS[task])).eval()
        one = 0.0 if "emma" in CASES[case][0] else 1.0
        with torch.no_grad():
            for path, x in model.named_parameters():
                noise = torch.randn_like(x)
                norm = ("norm" in path or "ln_" in path) and path.endswith("weight")
                x.copy_(one + 0.3 * noise if norm else 0.2 * noise)
        folder = tmp_path_factory.mktemp("head")
        model.save_pretrained(folder)
        return found.setdefault((case, task), Made(folder, model, of_torch(model)))

    return make


def at_ends(scores: Any, task: str) -> np.ndarray:
    """What transformers gives, of scores at every position."""
    scores = np.asarray(scores)
    return scores if task == "token" else scores[np.arange(2), list(ENDS)]


def ours(model: Any, params: Any) -> np.ndarray:
    return at_ends(model(params, jnp.asarray(TOKENS)), model.arch.task)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest, of tokens that are no padding, relative to the largest score."""
    assert a.shape == b.shape
    if a.ndim == 3:
        a, b = (np.concatenate([x[0, : ENDS[0] + 1], x[1]]) for x in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


# The table --------------------------------------------------------------------------------------


def test_the_table_is_that_of_transformers() -> None:
    """The same classes, tensors and biases for all families, and none that it has not."""
    names = {
        "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    theirs = {f: {t: n[f] for t, n in names.items() if f in n} for f in FAMILIES}
    known = {f: {t: h.hf_class for t, h in HEADS.get(f, {}).items()} for f in FAMILIES}
    assert known == theirs
    assert [f for f, heads in theirs.items() if not heads] == "granite cohere cohere2 olmoe".split()
    assert {f for f, heads in theirs.items() if set(heads) == {"sequence"}} == {
        "gemma3_text",
        "olmo2",
        "olmo3",
        "deepseek_v2",
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("task", LABELS)
def test_a_family_without_the_class_is_refused_by_name(family: str, task: str) -> None:
    case = next(c for c in CASES if family_of(c) == family)
    model, shapes = abstract(config_of(case))
    if task in HEADS.get(family, {}):
        scored, shapes = with_score_head(model, shapes, 2, task, key=jax.random.key(0))
        assert abstract(json.loads(scored.arch.config))[0].arch == scored.arch
        assert shapes["score"]["weight"].shape == (2, 32)
        assert "head" not in shapes
        return
    with pytest.raises(UserError, match=rf"no {task} classification for {family},.*deepseek_v3"):
        with_score_head(model, shapes, 2, task, key=jax.random.key(0))
    named = config_of(case, architectures=[f"{family}For{task.title()}Classification"])
    with pytest.raises(UserError, match=f"for {family}"):
        abstract(named)


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "task"), EACH)
def test_scores_and_files_are_those_of_transformers(
    case: str, task: str, made: Any, tmp_path: Path
) -> None:
    found = made(case, task)
    model, params = load(found.folder, dtype="float32")
    assert (model.arch.task, model.arch.labels) == (task, LABELS[task])
    assert "head" not in params
    assert difference(ours(model, params), found.scores) < 1e-5
    save_hf(model, params, tmp_path, dtype=None)
    before, after = (load_file(folder / TENSORS) for folder in (found.folder, tmp_path))
    assert {k: x.tobytes() for k, x in before.items()} == {k: x.tobytes() for k, x in after.items()}
    theirs = AUTO[task].from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(theirs).__name__ == HEADS[model.arch.family][task].hf_class
    assert difference(of_torch(theirs), found.scores) < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p | {"score": {"weight": p["score"]["weight"] * 1.01}},
        lambda p: p | {"final_norm": p["final_norm"] * 1.01},
        lambda p: p | {"embed": p["embed"] + 0.01},
    ],
)
def test_a_mutation_is_seen(change: Callable, made: Any) -> None:
    found = made("llama", "sequence")
    model, params = load(found.folder, dtype="float32")
    assert difference(ours(model, change(params)), found.scores) > 1e-3


def test_another_position_or_softcap_is_seen(made: Any) -> None:
    found = made("gemma2", "sequence")
    model, params = load(found.folder, dtype="float32")
    scores = np.asarray(model(params, jnp.asarray(TOKENS)))
    assert difference(scores[:, -2], found.scores) > 1e-3
    assert difference(2.0 * np.tanh(at_ends(scores, "sequence") / 2.0), found.scores) > 1e-3


def test_a_bias_is_read_and_may_be_left_out(made: Any, tmp_path: Path) -> None:
    found = made("llama", "token")
    model, params = load(found.folder, dtype="float32")
    bare = params | {"score": {"weight": params["score"]["weight"]}}
    bias = np.asarray(params["score"]["bias"])
    assert difference(ours(model, bare) + bias, found.scores) < 1e-5
    config = config_of("llama", token_classification_bias=False, num_labels=3)
    theirs = transformers.LlamaForTokenClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path, dtype="float32")
    assert set(params["score"]) == {"weight"}
    assert difference(ours(model, params), of_torch(theirs)) < 1e-5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["MistralForSequenceClassification"]}, "no llama model"),
        ({"id2label": {}}, "at least 1 label"),
        ({"id2label": {str(i): str(i) for i in range(2)}}, r"shape \(1, 32\).*\(2, 32\)"),
        ({"architectures": ["LlamaForTokenClassification"]}, r"score\.bias.*missing"),
        ({"architectures": ["LlamaForCausalLM"]}, "lm_head.weight.*missing"),
    ],
)
def test_a_config_of_another_head_is_refused(
    fields: dict[str, Any], words: str, made: Any, tmp_path: Path
) -> None:
    found = made("llama", "sequence")
    config = json.loads((found.folder / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(found.folder / TENSORS), tmp_path / TENSORS)
    with pytest.raises(UserError, match=words):
        load(tmp_path)


# From a language model ---------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "task", "labels"), [(True, "sequence", 1), (False, "token", 3)])
def test_a_language_model_becomes_one_that_transformers_loads(
    tied: bool, task: str, labels: int, tmp_path: Path
) -> None:
    model, params = tiny_model(tie_word_embeddings=tied, eos_token_id=[9, 8])
    scored, own = with_score_head(model, params, labels, task, key=jax.random.key(1))
    assert own["layers"] is params["layers"] and own["embed"] is params["embed"]
    assert hash(scored) is not None and own.keys() == params.keys() - {"head"} | {"score"}
    weight = np.asarray(own["score"]["weight"])
    assert abs(weight.std() / 0.2 - 1) < 0.4 and abs(weight.mean()) < 0.1
    assert ("bias" in own["score"]) == (task == "token")
    hidden, *_ = scored.forward(own, Inputs(jnp.asarray(TOKENS)))
    np.testing.assert_allclose(
        score_head(hidden[:, 7], own), scored(own, jnp.asarray(TOKENS))[:, 7], rtol=1e-5, atol=1e-6
    )
    save_hf(scored, own, tmp_path, dtype="float32")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == [HEADS["llama"][task].hf_class]
    assert len(fields["id2label"]) == len(fields["label2id"]) == labels
    assert fields["problem_type"] == ("regression" if task == "sequence" else None)
    assert fields["pad_token_id"] == 9
    theirs = AUTO[task].from_pretrained(tmp_path).eval()
    theirs.config.pad_token_id = 0  # what TOKENS are padded with
    assert theirs.num_labels == labels
    assert difference(of_torch(theirs), ours(scored, own)) < 1e-5
    again, back = load(tmp_path, dtype="bfloat16")
    assert again.arch.replace(config="") == scored.arch.replace(config="")
    assert back["score"]["weight"].dtype == jnp.float32  # it trains, also where all else is frozen
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract(tmp_path)[1])
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), back)


def test_transformers_makes_the_same_head() -> None:
    """The spread of a fresh head is that of transformers' own."""
    config = config_of("llama", hidden_size=64, num_labels=64)
    torch.manual_seed(0)
    theirs = transformers.LlamaForTokenClassification(config).score
    model, shapes = abstract(config, dtype="float32")
    params = init(model.arch, jax.random.key(0))
    _, params = with_score_head(model, params, 64, "token", key=jax.random.key(0))
    spread = float(theirs.weight.detach().std())
    assert abs(np.asarray(params["score"]["weight"]).std() / spread - 1) < 0.05
    assert not theirs.bias.detach().any() and not params["score"]["bias"].any()


@pytest.mark.parametrize(
    ("fields", "given", "pad"),
    [
        ({"pad_token_id": 5, "eos_token_id": 7}, None, 5),
        ({"pad_token_id": 5, "eos_token_id": 7}, 6, 6),
        ({"pad_token_id": None, "eos_token_id": 7}, None, 7),
        ({"pad_token_id": -1, "eos_token_id": [7, 8]}, None, 7),
        ({"pad_token_id": None, "eos_token_id": None}, None, None),
    ],
)
def test_the_token_that_pooling_skips(
    fields: dict[str, Any], given: int | None, pad: int | None
) -> None:
    model, params = tiny_model(**fields)
    scored, _ = with_score_head(model, params, key=jax.random.key(0), pad_token_id=given)
    assert json.loads(scored.arch.config)["pad_token_id"] == pad


def test_words_and_scores_are_not_mixed_up() -> None:
    model, params = tiny_model()
    scored, own = with_score_head(model, params, key=jax.random.key(0))
    with pytest.raises(UserError, match="gives scores"):
        head(own)
    with pytest.raises(UserError, match="1 scores of each sequence"):
        with_score_head(scored, own, key=jax.random.key(0))
    with pytest.raises(UserError, match="at least 1 label"):
        with_score_head(model, params, 0, key=jax.random.key(0))
    with pytest.raises(UserError, match="no kind of classification"):
        with_score_head(model, params, 1, "tokens", key=jax.random.key(0))


# Adapters and codes -----------------------------------------------------------------------------


def adapted(params: Any, **options: Any) -> Any:
    """With an adapter as training leaves it: b is not zero."""

    def trained(w: Any) -> Any:
        if not isinstance(w, Lora):
            return w
        return replace(w, b=0.1 * jax.random.normal(jax.random.key(w.b.size), w.b.shape))

    params = add_lora(params, rank=3, alpha=5, key=jax.random.key(0), **options)
    return jax.tree.map(trained, params, is_leaf=is_weight)


def scored_llama(task: str = "sequence", **fields: Any) -> tuple[Any, Any]:
    model, params = tiny_model(**{"pad_token_id": 0} | fields)
    return with_score_head(model, params, LABELS[task], task, key=jax.random.key(1))


def test_the_head_trains_beside_adapters_too() -> None:
    _, plain = scored_llama("token")
    for params in (adapted(plain), adapted(quantize(plain, "int8"))):
        train, frozen = partition(params)
        assert train["score"]["weight"] is plain["score"]["weight"]
        assert frozen["score"] == {"weight": None, "bias": None}
        assert jax.tree.leaves(train["embed"]) == []
        back = combine(train, frozen)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        for change in (merge_lora, strip_lora):
            assert change(back)["score"]["bias"] is plain["score"]["bias"]
    train, _ = partition(quantize(plain, "int8"))
    assert train["score"]["weight"] is plain["score"]["weight"]


def test_its_gradient_is_that_of_the_score() -> None:
    model, plain = scored_llama()
    train, frozen = partition(adapted(plain))

    def loss(train: Any) -> Any:
        return model(combine(train, frozen), jnp.asarray(TOKENS))[0, -1, 0]

    gradient = jax.jit(jax.grad(loss))(train)
    hidden, *_ = model.forward(combine(train, frozen), Inputs(jnp.asarray(TOKENS)))
    np.testing.assert_allclose(gradient["score"]["weight"][0], hidden[0, -1], rtol=1e-5, atol=1e-6)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient["layers"]))


PEFT = [("llama", "sequence"), ("gpt2", "token")]


@pytest.mark.parametrize(
    ("case", "task"),
    [k if k in PEFT else pytest.param(*k, marks=pytest.mark.slow) for k in KNOWN],
)
def test_our_adapter_in_peft_and_back(case: str, task: str, made: Any, tmp_path: Path) -> None:
    found = made(case, task)
    model, params = load(found.folder, dtype="float32")
    score = {kind: x + 0.1 for kind, x in params["score"].items()}
    own = adapted(params | {"score": score})
    save_adapter(model, own, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == {"sequence": "SEQ_CLS", "token": "TOKEN_CLS"}[task]
    assert config["modules_to_save"] == [HEADS[model.arch.family][task].module]
    base = AUTO[task].from_pretrained(found.folder, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert difference(of_torch(theirs), ours(model, own)) < 1e-5
    assert difference(ours(model, params), ours(model, own)) > 1e-2
    assert difference(ours(model, own | {"score": params["score"]}), ours(model, own)) > 1e-3
    back = load_adapter(params, tmp_path)
    assert jax.tree.structure(back) == jax.tree.structure(own)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(x, y)
    assert adapter_head(tmp_path) == (task, LABELS[task])


@pytest.mark.parametrize(
    ("case", "task", "options"),
    [
        ("llama", "sequence", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
        ("llama", "token", {"task_type": "TOKEN_CLS", "target_modules": ["q_proj", "up_proj"]}),
        ("gpt2", "token", {"task_type": "TOKEN_CLS", "target_modules": ["c_attn"]}),
        # What TRL's reward trainer asks for.
        ("llama", "sequence", {"target_modules": ["q_proj"], "modules_to_save": ["score"]}),
    ],
)
def test_an_adapter_that_peft_trained_loads(
    case: str, task: str, options: dict[str, Any], made: Any, tmp_path: Path
) -> None:
    found = made(case, task)
    base = AUTO[task].from_pretrained(found.folder, attn_implementation="eager")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, **options))
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.square().mean().backward()
        optimizer.step()
    theirs.eval()
    theirs.save_pretrained(str(tmp_path))
    model, params = load(found.folder, dtype="float32")
    own = load_adapter(params, tmp_path)
    assert np.abs(own["score"]["weight"] - params["score"]["weight"]).max() > 1e-4
    assert difference(ours(model, own), of_torch(theirs)) < 1e-5
    assert adapter_head(tmp_path) == (task, LABELS[task])


def test_adapters_of_another_head_are_refused(tmp_path: Path) -> None:
    model, params = tiny_model()
    scored, own = scored_llama()
    save_adapter(scored, adapted(own), tmp_path)
    with pytest.raises(UserError, match=r"head of scores .*\(1, 32\).* give it one first"):
        load_adapter(params, tmp_path)
    _, three = scored_llama("token")
    with pytest.raises(UserError, match=r"\(1, 32\).*but the model's is .*\(3, 32\)"):
        load_adapter(three, tmp_path)
    assert adapter_head(tmp_path) == ("sequence", 1)
    # The way there from the base that the folder names.
    task, labels = adapter_head(tmp_path) or ("", 0)
    _, fresh = with_score_head(model, params, labels, task, key=jax.random.key(5))
    np.testing.assert_array_equal(
        load_adapter(fresh, tmp_path)["score"]["weight"], own["score"]["weight"]
    )
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.score"
    lora = {f"{name}.lora_A.weight": np.ones((3, 32)), f"{name}.lora_B.weight": np.ones((1, 3))}
    del tensors[f"{name}.weight"]
    save_file(tensors | lora, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="a head of scores is trained whole"):
        load_adapter(own, tmp_path)
    save_adapter(model, adapted(params), tmp_path)
    assert adapter_head(tmp_path) is None
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None


def test_merged_and_in_codes(tmp_path: Path) -> None:
    """Adapters are merged around the head, and a quantized reward model is one in transformers."""
    model, plain = scored_llama(hidden_size=64, intermediate_size=64)
    own = adapted(plain)
    save_merged(model, own, tmp_path / "merged", dtype="float32")
    theirs = AUTO["sequence"].from_pretrained(tmp_path / "merged").eval()
    assert difference(of_torch(theirs), ours(model, own)) < 5e-5
    coded = quantize(plain, "int8")
    save_quantized(model, coded, tmp_path / "int8", dtype="float32")
    config = json.loads((tmp_path / "int8/config.json").read_text())
    assert "score" in config["quantization_config"]["ignore"]
    again, back = load(tmp_path / "int8", dtype="float32")
    np.testing.assert_array_equal(back["score"]["weight"], plain["score"]["weight"])
    assert difference(ours(again, back), ours(model, coded)) < 1e-6
    assert difference(ours(model, coded), ours(model, plain)) > 1e-3


IN_CODES = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
folder = sys.argv[1]
tokens = load_file(folder + "/tokens.safetensors")["tokens"].long()
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # its products are bfloat16's
assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
assert type(model.score) is torch.nn.Linear
with torch.no_grad():
    save_file({"scores": model(tokens).logits}, folder + "/scores.safetensors")
"""


@pytest.mark.slow
def test_a_reward_model_in_nf4_is_one_in_transformers(tmp_path: Path) -> None:
    """With bitsandbytes itself, which lies in MUD_PUPPY_BNB (test_bitsandbytes_format.py)."""
    model, plain = scored_llama(hidden_size=64, intermediate_size=64)
    coded = quantize(plain, "nf4")
    save_quantized(model, coded, tmp_path, dtype="float32")
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    bitsandbytes_run(IN_CODES, tmp_path)
    theirs = load_file(tmp_path / "scores.safetensors")["scores"]
    assert difference(theirs, ours(model, coded)) < 1e-4
    assert difference(theirs, ours(model, plain)) > 1e-3


def test_eight_devices_hold_a_part_each(made: Any) -> None:
    found = made("llama", "token")
    mesh = make_mesh("data=2,fsdp=4")
    model, params = load(found.folder, dtype="float32", mesh=mesh)
    weight = params["score"]["weight"]
    assert weight.sharding.shard_shape(weight.shape) == (3, 8)
    with jax.set_mesh(mesh):
        assert difference(ours(model, params), found.scores) < 1e-5
    lm, words = tiny_model()
    words = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P())), words)
    _, own = with_score_head(lm, words, key=jax.random.key(0))
    assert own["score"]["weight"].sharding.shard_shape((1, 32)) == (1, 8)
