"""Who may import whom, held by parsing every file; and what `import hf_lowmem` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_lowmem"

# A room may import from rooms of a lower number, and from itself.
LEVEL = {
    "specs": 0,
    "kernels": 1,
    "distributed": 1,
    "memory": 1,
    "checkpoints": 1,
    "section": 1,
    "zero": 1,
    "cards": 2,
    "codecs": 2,
    "optim": 3,
    "activations": 3,
    "losses": 3,
    "report": 3,
    "compatibility": 4,
    "arguments": 5,
    "model_card": 4,
    "trainer": 6,
    "callbacks": 6,
    "plugin": 6,
    "planner": 6,
    "pairs": 5,
    "reference": 4,
    "dpo_config": 6,
    "launch": 7,
    "sft": 7,
    "dpo": 7,
    "card_commands": 8,
    "demo": 8,
    "cli": 9,
    "__init__": 10,
}
HOSTS = {"transformers", "trl", "accelerate", "peft", "datasets"}
MAY_SEE_HOSTS = {
    "arguments", "trainer", "callbacks", "report", "model_card", "plugin", "launch", "planner", "pairs", "reference",
    "dpo_config", "sft", "dpo", "demo", "cli", "card_commands",
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            assert node.module
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    assert here in LEVEL, f"{here} has no place in the layers: give it one"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "hf_lowmem" and rest:
            there = rest[0]
            if there in LEVEL and there != here and here != "__init__":
                assert LEVEL[there] < LEVEL[here], f"{here} must not import {there}"
        if top in HOSTS:
            assert here in MAY_SEE_HOSTS, f"{here} must not import {top}"
        if top == "triton":
            alone = "triton is imported by kernels alone, in the files named here"
            assert here == "kernels", alone
            # ahead.py compiles for GPUs that are not there; nothing that trains imports it.
            assert path.name in ("triton.py", "_device.py", "ahead.py"), alone
        if top in ("scripts", "integrations", "tests"):
            pytest.fail(f"the package must not import {top}")
        if here == "specs":
            assert top not in ("torch", "hf_lowmem"), "specs is a leaf without torch"


def test_the_walk_finds_a_forbidden_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from trl.trainer import dpo_trainer\n    import hf_lowmem.optim.base\n")
    assert {"trl.trainer.dpo_trainer", "hf_lowmem.optim.base"} <= imports(bad)


def _loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = _loaded("import hf_lowmem")
    assert "hf_lowmem" in loaded
    assert not loaded & {"torch", "triton", "bitsandbytes", "trl", "transformers"}


def test_the_optimizers_need_no_trl_and_no_transformers() -> None:
    loaded = _loaded("from hf_lowmem import make_optimizer\nimport hf_lowmem.losses, hf_lowmem.memory")
    assert "torch" in loaded
    assert not loaded & {"bitsandbytes", "trl", "transformers", "peft"}


def test_every_public_name_exists() -> None:
    import hf_lowmem

    for name in hf_lowmem.__all__:
        assert getattr(hf_lowmem, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        hf_lowmem.nothing_of_that_name  # noqa: B018
