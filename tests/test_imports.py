"""The house's one rule: a room imports only rooms before it."""

import ast
from pathlib import Path

import mud_puppy

ROOT = Path(mud_puppy.__file__).parent
ORDER = (
    "errors kernels rocm weights losses parallel model sampling run export results gptq train "
    "plan doctor commands cli".split()
)
ALONE = {"data": {"errors"}, "config": {"errors"}, "kernels": set(), "losses": set()}
ALONE["rocm"] = {"errors", "kernels"}
ALONE["errors"] = set()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    assert not [n for n in froms if n.level], f"{path}: relative import"
    # `from mud_puppy import x` imports the room x.
    for n in froms:
        whole = n.module == "mud_puppy"
        names += [f"{n.module}.{a.name}" if whole else n.module or "" for a in n.names]
    return names


def allowed(importer: str) -> set[str]:
    if importer in ALONE:
        return ALONE[importer] | {importer}
    # `python -m mud_puppy.train` is the command line's training form under another name.
    entry = {"cli"} if importer == "train" else set()
    return {*ORDER[: ORDER.index(importer) + 1], "data", "config", ""} | entry


def offences(path: Path, importer: str) -> list[str]:
    ours = [room(name) for name in imports(path) if name.split(".")[0] == "mud_puppy"]
    return [f"{path.relative_to(ROOT)} imports {r}" for r in ours if r not in allowed(importer)]


def test_every_import_runs_with_the_order():
    outside = {ROOT / "__init__.py", ROOT / "__main__.py"}
    files = [p for p in ROOT.rglob("*.py") if p not in outside]
    assert len(files) > 30
    importer = {p: p.relative_to(ROOT).parts[0].removesuffix(".py") for p in files}
    assert [o for p in files for o in offences(p, importer[p])] == []


def test_the_rule_can_fail(tmp_path):
    bad = tmp_path / "x.py"
    bad.write_text("from mud_puppy.run import step\nfrom mud_puppy import export\n")
    assert {room(n) for n in imports(bad)} - allowed("model") == {"run", "export"}


def test_no_torch_and_no_jax_where_it_does_not_belong():
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 100
    for path in files:
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"torch", "peft", "trl", "accelerate"}, path
        if path.relative_to(ROOT).parts[0].removesuffix(".py") in ("data", "config", "errors"):
            assert not tops & {"jax", "flax", "optax"}, path
