"""compressed-tensors' quantization_config: written, read by name, and refused in one line."""

import json
from dataclasses import replace
from typing import Any

import pytest

from mud_puppy.errors import UserError
from mud_puppy.model.compressed_config import quantization_config, scheme_for
from mud_puppy.model.compressed_tensors import Scheme

INT4 = Scheme(4, 64, packed=True)
W8A8 = Scheme(8, "row", activations="int8")
FP8 = Scheme(8, "row", type="float")
MXFP4 = Scheme(4, 32, packed=True, type="float")
NAMES = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("mlp.up_proj", "self_attn.q_proj")]


@pytest.mark.parametrize(
    "scheme",
    [
        INT4,
        W8A8,
        FP8,
        MXFP4,
        Scheme(8, "tensor"),
        Scheme(8, "tensor", type="float"),
        Scheme(4, 32, symmetric=False),
    ],
)
def test_a_config_says_what_was_written(scheme: Scheme) -> None:
    config = json.loads(json.dumps(quantization_config(dict.fromkeys(NAMES, scheme))))
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert {scheme_for(config, name) for name in NAMES} == {scheme}
    assert scheme_for(config, "lm_head") is None
    assert scheme_for(config, "model.embed_tokens") is None


def test_a_mixed_config() -> None:
    for last in (INT4, FP8, MXFP4):
        given = dict(zip(NAMES, (INT4, W8A8, None, last), strict=True))
        config = quantization_config(given)
        assert config["format"] == "mixed-precision" and config["ignore"] == ["lm_head", NAMES[2]]
        assert {name: scheme_for(config, name) for name in NAMES} == given
    with pytest.raises(UserError, match="no module is quantized"):
        quantization_config({"lm_head": None})


def test_names_go_before_expressions_and_these_before_classes() -> None:
    config = quantization_config({"a": INT4, "b": W8A8})
    groups = config["config_groups"]
    (four, eight) = (groups[g] for g in ("group_0", "group_1"))
    four["targets"], eight["targets"] = ["Linear", "x.up"], ["re:.*[.]up"]
    assert scheme_for(config, "x.down") == INT4 and scheme_for(config, "x.up") == INT4
    assert scheme_for(config, "y.up") == W8A8
    config["ignore"] = ["re:y[.]"]
    assert scheme_for(config, "y.up.deep") is None and scheme_for(config, "x.y.up") == W8A8


def changed(path: str, value: Any, scheme: Scheme = W8A8) -> dict:
    config = json.loads(json.dumps(quantization_config({"a": scheme})))
    *parents, name = path.split("/")
    node = config
    for parent in parents:
        node = node[parent]
    node[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quantization_status", "frozen", "only compressed weights"),
        ("kv_cache_scheme", {"num_bits": 8}, "has a kv_cache_scheme"),
        ("config_groups/group_0", ["Linear"], "preset"),
        ("config_groups/group_0/format", "nvfp4-pack-quantized", "format is 'nvfp4"),
        ("config_groups/group_0/weights/type", "float", "weights is 'float'; supported: 'int'"),
        ("config_groups/group_0/weights/num_bits", 3, "num_bits is 3; supported: 4, 8"),
        ("config_groups/group_0/weights/strategy", "block", "strategy is 'block'"),
        ("config_groups/group_0/weights/actorder", "group", "actorder is 'group'"),
        ("config_groups/group_0/output_activations", {"num_bits": 8}, "output_activations"),
    ],
)
def test_what_is_not_read_is_refused(path: str, value: Any, message: str) -> None:
    assert scheme_for(changed("ignore", []), "a") == W8A8
    with pytest.raises(UserError, match=message):
        scheme_for(changed(path, value), "a")


GROUP = "config_groups/group_0"
TOKENS = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    ("scheme", "path", "value", "message"),
    [
        (FP8, f"{GROUP}/weights/type", "int", "float-quantized weights is 'int'"),
        (FP8, f"{GROUP}/weights/num_bits", 4, "float weights num_bits is 4; supported: 8"),
        (FP8, f"{GROUP}/weights/strategy", "block", "block_structure is None, not two sizes"),
        (FP8, f"{GROUP}/weights/strategy", "group", "weights group_size is None, not a size"),
        (FP8, f"{GROUP}/weights/symmetric", False, "float weights symmetric is False"),
        (FP8, f"{GROUP}/format", "nvfp4-pack-quantized", "format is 'nvfp4-pack-quantized'"),
        (FP8, f"{GROUP}/format", "mxfp8-quantized", "format is 'mxfp8-quantized'"),
        (MXFP4, f"{GROUP}/weights/num_bits", 8, "packed float weights num_bits is 8; supported: 4"),
        (MXFP4, f"{GROUP}/weights/group_size", 16, "group_size is 16; supported: 32"),
        (MXFP4, f"{GROUP}/weights/strategy", "tensor_group", "strategy is 'tensor_group'"),
    ],
)
def test_what_is_not_read_of_floats_is_refused(
    scheme: Scheme, path: str, value: Any, message: str
) -> None:
    assert scheme_for(changed("ignore", [], scheme), "a") == scheme
    with pytest.raises(UserError, match=message):
        scheme_for(changed(path, value, scheme), "a")


@pytest.mark.parametrize(
    ("scheme", "change", "unrounded"),
    [
        (FP8, {}, "float8 a token"),
        (FP8, {"type": "int"}, "int8 a token"),
        (MXFP4, {}, "float8 a token"),
        (INT4, {}, "float8 a token"),
        (Scheme(8, symmetric=False), {"type": "int"}, "int8 a token"),
        (W8A8, {}, "float8 a token"),
        (W8A8, {"type": "int", "symmetric": False}, "int8 a token"),
        (
            W8A8,
            {"type": "int", "strategy": "tensor", "dynamic": False},
            "int8 a tensor, with scales of the file",
        ),
    ],
)
def test_inputs_that_stay_as_they_are(scheme: Scheme, change: dict, unrounded: str) -> None:
    read = scheme_for(changed(f"{GROUP}/input_activations", TOKENS | change, scheme), "a")
    assert read == replace(scheme, activations="none", unrounded=unrounded)


def test_blocks() -> None:
    config = changed(f"{GROUP}/weights/strategy", "block", FP8)
    weights = config["config_groups"]["group_0"]["weights"]
    weights["block_structure"] = [64, 128]
    assert scheme_for(config, "a") == Scheme(8, 128, type="float", block=64)
    weights["block_structure"] = [64, 0]
    with pytest.raises(UserError, match=r"block_structure is \[64, 0\], not two sizes"):
        scheme_for(config, "a")


def test_naive_is_either_type() -> None:
    assert scheme_for(changed(f"{GROUP}/format", "naive-quantized", FP8), "a") == FP8
    assert scheme_for(changed(f"{GROUP}/format", "naive-quantized"), "a") == W8A8
