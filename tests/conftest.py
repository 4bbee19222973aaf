"""JAX for all tests: CPU, eight simulated devices, a shared compile cache."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On the CPU a step compiles in a ninth of the time, and a tiny model's runs as long as before.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    + [
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    ]
    * (os.environ["JAX_PLATFORMS"] == "cpu" and "MUD_PUPPY_ROCM" not in os.environ)
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "mud_puppy-test-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import json
import logging
from pathlib import Path

import jax
import pytest

# What tests share there says as much of a failed assertion as they do.
pytest.register_assert_rewrite("tests.bad_inputs", "tests.kernels")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = "red blue green one two three cat dog sun moon tea milk salt rice".split()


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """Folder of a tiny random llama (2 layers of 32) with a byte-level ChatML tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import mud_puppy as mp
    from tests.tiny import tiny_model

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )
    model, params = tiny_model(
        vocab_size=len(fast),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("chat_model")
    mp.save_hf(model, params, folder, dtype="float32", tokenizer=fast)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """JSONL file of 64 chats in which the answer repeats the question's word."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    words = [QUESTIONS[i % len(QUESTIONS)] for i in range(64)]
    rows = [
        [{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": f"{w} {w}"}]
        for w in words
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def config(chat_model, chats, tmp_path):
    """Keys of a short LoRA run on the tiny model, on one device."""
    return {
        "model": str(chat_model),
        "dataset": str(chats),
        "output": str(tmp_path / "out"),
        "precision": "fp32",
        "max_seq_length": 64,
        "batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "sample_prompts": 0,
        "mesh": "data=1,fsdp=1",
    }


MAPPINGS = 20_000  # of the 65,530 that Linux gives a process


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Every executable takes some of the process's memory mappings, and LLVM crashes where none is
    left: they are let go in time."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def fresh_log():
    """The command line sets the log up once, for the stderr of its process, which capsys replaces:
    each test has it as a new process does."""
    log = logging.getLogger("mud_puppy")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)
