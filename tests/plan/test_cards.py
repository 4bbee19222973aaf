"""Plans for a card with the compiler replaced: devices, refusals, bounds, and what ends early."""

import threading
from contextlib import nullcontext

import jax
import pytest

from mud_puppy.errors import UserError
from mud_puppy.plan import answer, compilers, plan, text
from mud_puppy.plan.compilers import Built
from mud_puppy.plan.places import find_place
from mud_puppy.plan.step import Held
from mud_puppy.rocm.compile import Compiled, CompileError, Compiler, Memory, Unit

GIB = 2**30


class NoWorker(Compiler):
    """Starts no process."""

    def __init__(self):
        pass

    def __exit__(self, *_):
        pass


def built(needed=GIB, flops=10**15) -> Built:
    return Built(needed, 0, Held(0, 0, 0, 0, 0, 0, 0, 0), flops, 1)


@pytest.fixture
def asked(monkeypatch):
    """(rows, length, devices) that would have been compiled; nothing is."""
    found = []

    def build(config, rows, length, devices):
        found.append((rows, length, devices))
        return built()

    monkeypatch.setattr(answer, "compiler", lambda place, source: nullcontext(build))
    return found


@pytest.mark.parametrize(
    ("mesh", "devices", "count"),
    [(None, None, 1), ("data=2,fsdp=1", None, 2), ("fsdp=-1", None, 1), ("fsdp=-1", 2, 2)],
)
def test_a_mesh_says_how_many_cards(config, asked, mesh, devices, count):
    found = plan(config | {"mesh": mesh}, "7900xtx", devices=devices, search=False)
    assert found.place.devices == count and asked == [(2, 128, count)]


def test_rows_of_all_the_positions_that_a_model_has(folder, config, asked):
    """100 positions are rows of 128 tokens, the last of which are padding, as in a run."""
    import json

    path = folder / "config.json"
    fields = json.loads(path.read_text()) | {"max_position_embeddings": 100}
    path.write_text(json.dumps(fields))
    found = plan(config | {"max_seq_length": 100}, "7900xtx")
    assert found.max_seq_length == found.max_seq_length_offloaded == 100
    assert {length for _, length, _ in asked} == {128}
    with pytest.raises(UserError, match="max_seq_length 101: the model has 100 positions"):
        plan(config | {"max_seq_length": 101}, "7900xtx")


def test_the_bound_of_float8_is_float8s(config, asked):
    """2,614.9 TFLOP/s of an MI300X, twice those in bf16."""
    floors = {
        precision: plan(config | {"precision": precision}, "mi300x", search=False).floor_s
        for precision in ("bf16", "fp8", "fp8-emulated")
    }
    assert floors["bf16"] == floors["fp8-emulated"] == 10**15 / 1307.4e12
    assert floors["fp8"] == 10**15 / 2614.8e12


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("UserError: precision fp8: no: products", "^precision fp8: no: products$"),
        ("XlaRuntimeError: bad", "^the step does not compile for Radeon RX 7900 XTX: XlaRun.*bad$"),
    ],
)
def test_a_failure_is_the_compilers_words_alone(monkeypatch, config, said, words):
    class Worker(NoWorker):
        def compile(self, unit: Unit, timeout_s: float = 0.0):
            raise CompileError(unit, said)

    monkeypatch.setattr(compilers, "Compiler", Worker)
    with pytest.raises(UserError, match=words):
        plan(config, "7900xtx", search=False)


@pytest.mark.parametrize("problem", [RuntimeError("Unable to initialize"), AssertionError()])
def test_a_jax_that_does_not_start_is_one_line(monkeypatch, problem):
    def fails():
        raise problem

    monkeypatch.setattr(jax, "default_backend", fails)
    with pytest.raises(UserError, match=r"JAX does not start: .*doctor"):
        find_place("cpu", None, None)


def test_an_end_does_not_wait_for_the_searches(monkeypatch, config):
    """Ctrl-C: the compilers are closed while a search still compiles, and it starts no other."""
    go, slow, after = threading.Event(), threading.Event(), []

    class Worker(NoWorker):
        def __exit__(self, *_):
            after.append("closed")
            go.set()

        def compile(self, unit: Unit, timeout_s: float = 0.0):
            if unit.arguments["rows"] == 2:  # the batch that was asked for
                fields = dict.fromkeys(Held.__annotations__, 0)
                notes = {"held": fields, "flops": 1}
                return Compiled(unit, Memory(GIB, 0, 0, 0, 0, 0), (), 0.1, notes)
            if unit.arguments["config"].get("sequence_tile"):
                slow.set()
                assert go.wait(60)
                after.append("slow")
                raise CompileError(unit, "the compiler crashed")
            assert slow.wait(60)
            raise KeyboardInterrupt

    monkeypatch.setattr(compilers, "Compiler", Worker)
    with pytest.raises(KeyboardInterrupt):
        plan(config, "7900xtx")
    assert after[0] == "closed"


def test_a_config_that_has_the_long_rows_levers_is_searched_once(config, asked):
    plain = plan(config, "7900xtx")
    assert "with sequence_tile 2048, gradient_checkpointing offload: 4096" in text(plain)
    both = {"sequence_tile": 2048, "gradient_checkpointing": "offload"}
    count = len(asked)
    found = plan(config | both, "7900xtx")
    assert found.max_seq_length == found.max_seq_length_offloaded == 4096
    assert "with" not in text(found) and len(asked) - count < count
