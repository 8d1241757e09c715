"""Who may import whom, held by parsing every file; and what `import hf_lowmem` may load."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_lowmem"

# A room may import from rooms of a lower number, and from itself.
LEVEL = {
    "specs": 0,
    "reasons": 0,
    "moved": 0,
    "kernels": 1,
    "distributed": 1,
    "patching": 0,
    "memory": 1,
    "checkpoints": 1,
    "codecs": 2,
    "weights": 2,
    "optim": 3,
    "activations": 3,
    "matmul": 3,
    "preference": 3,
    "rules": 4,
    "runs": 4,
    "training": 5,
    "planner": 6,
    "demo": 7,
    "cli": 8,
    "__init__": 9,
}
# What is named here may import what stands above it.
UPWARD = {
    ("training/mixin.py", "planner"): "a trainer asks for a budget, and the planner runs the trainers themselves",
}
# Files of one room that import each other, each of them a group.
CIRCLES = {
    ("training.arguments", "training.dpo", "training.dpo_config", "training.mixin", "training.sft", "training.wrap"): (
        "whoever hands a config of ours to a Trainer gets one of ours, whatever of this was imported"
    ),
}
HOSTS = {"transformers", "trl", "accelerate", "peft", "datasets"}
MAY_SEE_TRITON = {"triton.py", "_device.py", "_groups.py", "tiles.py", "ahead.py"}
MAY_SEE_HOSTS = {"training", "runs", "planner", "preference", "rules", "demo", "cli"}
# A module by name, perhaps with a function of it, or the beginning of such a name.
NAME = re.compile(r"hf_lowmem\.[\w.]+(:\w+)?")
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def is_file(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it, or names in a string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            assert node.module
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= names if all(map(is_file, names)) else names | {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            found.add(node.value.partition(":")[0].rstrip("."))  # of an f-string, its beginning
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
            allowed = here in (there, "__init__") or (str(path.relative_to(PACKAGE)), there) in UPWARD
            if there in LEVEL and not allowed and LEVEL[there] >= LEVEL[here]:
                yield f"{here} must not import {there}"
        if top in HOSTS and here not in MAY_SEE_HOSTS:
            yield f"{here} must not import {top}"
        if top == "triton" and (here != "kernels" or path.name not in MAY_SEE_TRITON):
            yield "triton is imported by kernels alone, in the files named here"
        if top in ("numba", "llvmlite") and (here, path.name) != ("kernels", "_cpu.py"):
            yield "numba is imported by kernels/_cpu.py alone"
        if top in ("scripts", "integrations", "tests"):
            yield f"the package must not import {top}"
        if here == "specs" and top in ("torch", "hf_lowmem"):
            yield "specs is a leaf without torch"


def test_imports_go_down() -> None:
    assert len(FILES) > 100
    assert not [f"{path.relative_to(PACKAGE)}: {what}" for path in FILES for what in offences(path)]


def graph() -> dict[str, set[str]]:
    """Each module of the package, without the package's name, and those of its own room that it imports."""
    paths = {".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    return {
        name: {n for i in imports(path) if (n := i.removeprefix("hf_lowmem.")) in paths and n != name}
        & {n for n in paths if n.partition(".")[0] == name.partition(".")[0]}
        for name, path in paths.items()
    }


def circles(graph: dict[str, set[str]]) -> set[tuple[str, ...]]:
    """Groups of nodes each of which reaches all others of its group."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set[str](), list(graph[start])
        while todo:
            if (node := todo.pop()) not in seen:
                seen.add(node)
                todo += graph[node]
        reach[start] = seen
    return {tuple(sorted(m for m in reach[n] if n in reach[m])) for n in graph if n in reach[n]}


def test_files_of_a_room_do_not_import_each_other_in_a_circle() -> None:
    assert circles(graph()) == set(CIRCLES)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {("b", "c")}


@pytest.mark.parametrize(
    ("place", "line", "what"),
    [
        ("codecs/a.py", "import hf_lowmem.optim", "codecs must not import optim"),
        ("optim/a.py", "from hf_lowmem.activations import x", "optim must not import activations"),
        ("optim/a.py", "def f():\n    import trl", "optim must not import trl"),
        ("optim/triton.py", "import triton", "triton is imported by kernels alone"),
        ("kernels/glu/cases.py", "import triton.language", "triton is imported by kernels alone"),
        ("kernels/glu/reference.py", "import numba", "numba is imported by kernels/_cpu.py alone"),
        ("memory/a.py", "from tests.conftest import x", "the package must not import tests"),
        ("specs.py", "import torch", "specs is a leaf"),
        ("optim/a.py", "import_module('hf_lowmem.planner.search')", "optim must not import planner"),
        ("optim/a.py", "import_module(f'hf_lowmem.training.{name}')", "optim must not import training"),
        ("codecs/a.py", "if TYPE_CHECKING:\n    from hf_lowmem.optim import base", "codecs must not import optim"),
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


@pytest.mark.train
def test_importing_the_package_costs_next_to_nothing() -> None:
    """Two files of ours and, of Python, what any program has: no wall clock is needed to see that."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import collections.abc, importlib.machinery, types, typing\n"
        "before = set(sys.modules)\nimport hf_lowmem\nprint(*(set(sys.modules) - before))"
    )
    # -S: without what an environment's .pth files load.
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"hf_lowmem", "hf_lowmem.moved"}


def _loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.train
def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = _loaded("import hf_lowmem")
    assert "hf_lowmem" in loaded
    assert not loaded & {"torch", "triton", "numba", "bitsandbytes", "trl", "transformers"}


@pytest.mark.train
def test_the_optimizers_need_no_trl_and_no_transformers() -> None:
    loaded = _loaded("from hf_lowmem import make_optimizer\nimport hf_lowmem.preference.losses, hf_lowmem.memory")
    assert "torch" in loaded
    assert not loaded & {"numba", "bitsandbytes", "trl", "transformers", "peft"}


def test_every_public_name_exists() -> None:
    import hf_lowmem

    for name in hf_lowmem.__all__:
        assert getattr(hf_lowmem, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        hf_lowmem.nothing_of_that_name  # noqa: B018
