"""Who may import whom, held by parsing every file; and what `import hf_lowmem` may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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
    "reasons": 0,
    "cards": 2,
    "codecs": 2,
    "optim": 3,
    "activations": 3,
    "losses": 3,
    "skips": 3,
    "report": 4,
    "own_defaults": 4,
    "rules": 4,
    "arguments": 5,
    "model_card": 5,
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
    "wrap": 8,
    "worker": 9,
    "card_commands": 8,
    "doctor": 8,
    "demo": 8,
    "cli": 10,
    "__init__": 11,
}
HOSTS = {"transformers", "trl", "accelerate", "peft", "datasets"}
MAY_SEE_HOSTS = {
    "arguments", "own_defaults", "skips", "trainer", "callbacks", "report", "model_card", "plugin", "launch", "planner",
    "pairs", "reference", "dpo_config", "rules", "wrap", "sft", "dpo", "demo", "cli", "card_commands",
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


def offences(path: Path) -> Iterator[str]:
    """What a file imports and may not."""
    here = room(path)
    if here not in LEVEL:
        yield f"{here} has no place in the layers: give it one"
        return
    for name in sorted(imports(path)):
        top, *rest = name.split(".")
        if top == "hf_lowmem" and rest:
            there = rest[0]
            if there in LEVEL and there != here and here != "__init__" and LEVEL[there] >= LEVEL[here]:
                yield f"{here} must not import {there}"
        if top in HOSTS and here not in MAY_SEE_HOSTS:
            yield f"{here} must not import {top}"
        if top == "triton" and (here != "kernels" or path.name not in ("triton.py", "_device.py")):
            yield "triton is imported by kernels alone, in the files named here"
        if top in ("scripts", "integrations", "tests"):
            yield f"the package must not import {top}"
        if here == "specs" and top in ("torch", "hf_lowmem"):
            yield "specs is a leaf without torch"


def test_imports_go_down() -> None:
    assert len(FILES) > 100
    assert not [f"{path.relative_to(PACKAGE)}: {what}" for path in FILES for what in offences(path)]


@pytest.mark.parametrize(
    ("place", "line", "what"),
    [
        ("codecs/a.py", "import hf_lowmem.optim", "codecs must not import optim"),
        ("optim/a.py", "from hf_lowmem.activations import x", "optim must not import activations"),
        ("optim/a.py", "def f():\n    import trl", "optim must not import trl"),
        ("optim/triton.py", "import triton", "triton is imported by kernels alone"),
        ("kernels/glu/cases.py", "import triton.language", "triton is imported by kernels alone"),
        ("memory/a.py", "from tests.conftest import x", "the package must not import tests"),
        ("specs.py", "import torch", "specs is a leaf"),
        ("elsewhere.py", "import os", "elsewhere has no place"),
    ],
)
def test_an_offence_is_found(place: str, line: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{line}\n")
    [found] = set(offences(path))
    assert what in found


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
