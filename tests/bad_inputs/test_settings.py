"""Flags and config files that make no sense, alone or together."""

import pytest

# flags on top of a sound run: what the line says
FLAGS: dict[str, tuple[str, ...]] = {
    "--learning-rate -1": ("--learning-rate: '-1' is not a number above 0",),
    "--batch-size 0": ("--batch-size: '0' is not a whole number at least 1",),
    "--optimizer adam": ("--optimizer: 'adam' is not one of adamw", "Did you mean 'adamw'?"),
    "--method lorra": ("--method: 'lorra' is not one of full, lora", "Did you mean 'lora'?"),
    "--method gptq": ("--max-steps: '2' has no effect: max_steps needs a method other than gptq",),
    "--gptq-bits 3": ("--gptq-bits: '3' has no effect: gptq_bits needs method gptq",),
    "--quant-backend int8": (
        "--quant-backend: 'int8' has no effect",
        "needs method (or tune) qlora",
    ),
    "--method qlora --quant-group 48": ("_proj/weight cannot be quantized", "groups that fit"),
    "--precision fp8": ("cpu has no float8 products", "use --precision bf16"),
    "--method qat --precision fp8": ("--precision: method qat rounds the weights to integers",),
    "--stream": ("--stream: arrives with the scaling issue; remove it",),
    "--compile": ("--compile: has no meaning here", "remove it"),
    "--lerning-rate 1": ("unknown flag --lerning-rate.", "Did you mean '--learning-rate'?"),
    "-lora-r 4": ("unknown flag -lora-r.", "Did you mean '--lora-r'?"),
    "--eval-steps 3": ("--eval-steps: '3' has no effect", "needs eval_dataset or eval_split"),
    "--resume --overwrite": ("--overwrite: true has no effect", "give one of the two"),
    "--mesh dta=2": ("--mesh: 'dta=2' is not a mesh", "Did you mean 'data'?"),
    "--mesh data=16": ("mesh 'data=16' needs 16 devices, 8 are here; make it smaller",),
    "--mesh data=3": ("batch_size 2 rows cannot be split over 3 devices", "a multiple of 3"),
    "--lora-targets q_prj": ("LoRA target 'q_prj' matches no module", "Did you mean 'q_proj'?"),
    "--lora-targets lm_head": ("LoRA target 'lm_head'", "tied to its embedding; leave it out"),
    "--lora-targets (q_proj": ("--lora-targets: '(q_proj'", "as a regular expression: missing )"),
    "--roles-to-train assitant": ("unknown role 'assitant'", "Did you mean 'assistant'?"),
    "--roles-to-train tool": ("d.jsonl:1: no tool turn to train on",),
    "--max-seq-length 8": ("none of 64 rows can be trained on", "max_seq_length cuts off all"),
    "--on-long stop --max-seq-length 9": ("d.jsonl:1: 35 tokens are more", "max_seq_length 9"),
    "--sample-max-new-tokens 512 --sample-prompts 1": (
        "sample_max_new_tokens 512: the model has 512 positions",
        "lower it",
    ),
    f"--sample-prompts {'x' * 600}": (
        "sample_prompts: prompt 1 has 6",
        "the 512 positions of the model: shorten it",
    ),
    "--sample-prompts \udcff": ("--sample-prompts: ['0', '\\udcff'] is not a count or a list",),
    "--adapter nowhere": ("nowhere: no such adapter folder", "downloaded first"),
    "--adapter run --method full": (
        "--adapter: 'run' has no effect: adapter needs method (or tune) lora",
    ),
    "--eval-dataset d.json": ("d.json does not exist; check the path. Did you mean 'd.jsonl'?",),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags, bench, refused, monkeypatch):
    monkeypatch.chdir(bench.root)
    refused(bench.train(*flags.split(" ")), *FLAGS[flags])


# name: (content of c.yaml, what the line says)
YAML: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "unknown key": (
        b"model: m\nlearning_rat: 1\n",
        ("c.yaml:2: learning_rat: unknown key. Did you mean 'learning_rate'?",),
    ),
    "syntax": (b"model: m\n  x: [\n", ("c.yaml:2: not valid YAML (mapping values are not",)),
    "a list": (b"- a\n", ("c.yaml: the config is not a list of `key: value` lines",)),
    "twice": (b"seed: 1\nseed: 2\n", ("c.yaml:2: seed: the key stands twice", "remove one")),
    "not UTF-8": (b"model: \xff\n", ("c.yaml: not UTF-8 (byte 7)",)),
    "code": (b"model: !!python/object:os.system x\n", ("c.yaml:1: not valid YAML",)),
    "no number": (b"learning_rate: .nan\n", ("c.yaml:1: learning_rate: nan is not a number",)),
    "empty": (b"", ("c.yaml: the config is empty; give at least model, dataset and output",)),
}


@pytest.mark.parametrize(("content", "says"), YAML.values(), ids=list(YAML))
def test_config_files(content, says, bench, refused):
    path = bench.root / "c.yaml"
    path.write_bytes(content)
    refused(["--config", path, "--output", bench.out], *says)


def test_config_file_missing(bench, refused):
    (bench.root / "lora.yaml").touch()
    refused(["--config", bench.root / "lor.yaml"], "no such config file.", "mean 'lora.yaml'?")
