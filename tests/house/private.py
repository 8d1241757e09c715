"""Private names of the libraries below us that the package uses, overrides or patches: how they are found.

    use       an import, an attribute, a string that is the name of one, a target of mock.patch.object
    override  a method of ours in the place of a host's, by the classes' method resolution order

An attribute shows its name, not whose it is, so the list says that: by hand for a new one; the rest is kept
by `python -m tests.house.write private`. A line is

    torch.Tensor._version                    a path that `import` and `getattr` follow
    torch.nn.Module()._modules               of an instance; see SAMPLES in test_private_api.py
    a.b.CONSTANT=_its_value                  a name that the host itself has in a constant
    override a.b.Class._method
"""

import ast
import importlib
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

from tests.house.package import TESTS, lines_of, module_of, trees

LIST = TESTS / "private_api.txt"
HOSTS = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "datasets", "triton", "numpy")
# Python documents them: of named tuples.
PUBLIC = {"_replace", "_asdict", "_fields", "_make"}
# Strings and attributes that name nothing of a host.
NOT_THEIRS = {
    "_added": "of a record of ours",
    "_lowmem_chosen": "of our own arguments",
    "_is_sharing": "of our own, put on a trainer",
    "_shared_models": "of our own, put on a trainer",
    "_shares_batches": "of our own, put on a trainer",
    "_codecs": "Python's module",
    "_lowmem_base": "of our own, put on a class",
    "_lowmem_lent": "of our own, put on a module",
    "_model_name_or_path": "in the file of the demo's model",
    "_getframe": "Python's",
}
# Classes that are made in a function, by what they are made from.
LOCAL = {"planner/step.py:Weighed": "trl.trainer.dpo_trainer.DPOTrainer"}


def is_private(name: str) -> bool:
    return len(name) > 1 and name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def _is_private_path(path: str) -> bool:
    return path.split(".")[0] in HOSTS and any(map(is_private, path.split(".")))


def _names_in(tree: ast.Module) -> dict[str, str]:
    """What a file calls the modules and classes that it imports → their paths."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def _path_of(node: ast.AST, names: dict[str, str]) -> str | None:
    """The path that `a.b.c` stands for where `a` is imported."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def _defined(tree: ast.Module) -> Iterator[str]:
    """Attributes that classes of a file have by their own code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    yield item.name
                elif isinstance(item, ast.AnnAssign) and item.value is not None and isinstance(item.target, ast.Name):
                    yield item.target.id
                elif isinstance(item, ast.Assign):
                    yield from (t.id for t in item.targets if isinstance(t, ast.Name))
    yield from self_stores(tree)


def _globals(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _raw(tree: ast.Module) -> Iterator[str]:
    """Private names of a file, of whomever: whole paths where the code says them, else bare names."""
    names = _names_in(tree)
    for path in names.values():
        if _is_private_path(path):
            yield path
    nodes = list(ast.walk(tree))
    formatted = {id(v) for node in nodes if isinstance(node, ast.JoinedStr) for v in node.values}
    within = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    known = {id(n) for node in nodes if _path_of(node, names) for n in ast.walk(node)}
    for node in nodes:
        if id(node) in formatted:
            continue
        if isinstance(node, ast.Attribute) and id(node) in known:
            path = str(_path_of(node, names)).split(".")
            while path and not is_private(path[-1]):
                path.pop()
            if id(node) not in within and _is_private_path(".".join(path)):
                yield ".".join(path)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = node.value
            if (word.isidentifier() and is_private(word)) or (
                all(map(str.isidentifier, word.split("."))) and "." in word and _is_private_path(word)
            ):
                yield word
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("patch.object") and len(node.args) > 1:
            target, name = _path_of(node.args[0], names), node.args[1]
            if target and target.split(".")[0] in HOSTS and isinstance(name, ast.Constant):
                yield f"{target}.{name.value}"


@cache
def uses() -> dict[str, set[str]]:
    """What the code uses: a path or a bare name → the files."""
    ours = {name for tree in trees().values() for name in _defined(tree)}
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees().items():
        own = set(_globals(tree))
        for name in _raw(tree):
            known = name in ours or name in NOT_THEIRS or (name in own and "." not in name)
            if not known:
                found[name].add(path)
    return dict(found)


def _heirs() -> dict[type, list[list[type]]]:
    """Classes of ours that stand before a host's: for each class that is made of them, the hosts' classes behind."""
    files = set()
    for path, tree in trees().items():
        names = _names_in(tree)
        bases = [b for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for b in node.bases]
        if any((_path_of(b, names) or "").split(".")[0] in HOSTS for b in bases):
            files.add(path)
    behind: dict[type, list[list[type]]] = defaultdict(list)
    for path in sorted(files):
        for cls in vars(importlib.import_module(module_of(path))).values():
            if inspect.isclass(cls) and cls.__module__ == module_of(path):
                for i, own in enumerate(cls.__mro__):
                    theirs = [b for b in cls.__mro__[i + 1 :] if b.__module__.split(".")[0] in HOSTS]
                    if own.__module__.startswith("hf_lowmem") and theirs:
                        behind[own].append(theirs)
    return behind


def self_stores(code: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(code)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        if isinstance(node.ctx, ast.Store)
    }


@cache
def _kept_by(cls: type) -> set[str]:
    """What a class of Python puts on `self`. (torch's modules have a table for it, which the list names.)"""
    return set() if cls.__module__.split(".")[0] == "torch" else self_stores(parsed(cls))


@cache
def parsed(cls: type) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(cls)))


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def inherited() -> tuple[set[tuple[type, type, str]], set[str]]:
    """(class of ours, class of a host, name) of every method that ours overrides; and the private names that a class of
    ours shares with a host above it, as paths: methods, and what both keep on `self`."""
    overrides, shared = set[tuple[type, type, str]](), set[str]()
    for own, made in _heirs().items():
        methods = [n for n, value in vars(own).items() if inspect.isfunction(value) and not n.startswith("__")]
        used = {
            node.attr
            for node in ast.walk(parsed(own))
            if isinstance(node, ast.Attribute) and is_private(node.attr)
            if ast.unparse(node.value) in ("self", "super()")
        }
        for theirs in made:
            for name in methods:
                overrides |= {(own, b, name) for b in [b for b in theirs if name in vars(b)][:1]}
            for name in used:
                having = [f"{path_of(b)}.{name}" for b in theirs if name in vars(b)]
                keeping = [f"{path_of(b)}().{name}" for b in theirs if name in _kept_by(b)]
                shared |= set((having or keeping)[:1])
    return overrides, shared


def found() -> tuple[set[str], set[str]]:
    """Whole lines that the list must have, and bare names that some line of it must end in."""
    overrides, shared = inherited()
    lines = {f"override {path_of(parent)}.{name}" for _, parent, name in overrides if is_private(name)}
    for place, parent in LOCAL.items():
        file, _, name = place.partition(":")
        [code] = [n for n in ast.walk(trees()[file]) if isinstance(n, ast.ClassDef) and n.name == name]
        methods = {n.name for n in code.body if isinstance(n, ast.FunctionDef) and is_private(n.name)}
        module, _, cls = parent.rpartition(".")
        for base in getattr(importlib.import_module(module), cls).__mro__:
            lines |= {f"override {path_of(base)}.{m}" for m in methods & set(vars(base))}
            methods -= set(vars(base))
    lines |= {path for path in shared if f"override {path}" not in lines}
    lines |= {name for name in uses() if "." in name}
    return lines, {name for name in uses() if "." not in name}


def parts(line: str) -> list[str]:
    path, _, value = line.removeprefix("override ").partition("=")
    return [value] if value else path.replace("()", "").split(".")


def compare(lines: set[str]) -> tuple[list[str], list[str]]:
    """(what the list lacks, what it has too much)."""
    whole, bare = found()
    said = {part for line in lines | whole for part in parts(line)}
    lacking = sorted(whole - lines) + [f"?.{name}" for name in sorted(bare - said)]
    stale = sorted(line for line in lines - whole if parts(line)[-1] not in bare)
    return lacking, stale


def write() -> None:
    """Bring the list up to date; a new attribute gets a "?" for its owner."""
    head = [line for line in LIST.read_text().splitlines() if line.startswith("#")] if LIST.exists() else []
    lines = set(lines_of(LIST)) if LIST.exists() else set()
    lacking, stale = compare(lines)
    LIST.write_text("\n".join([*head, *sorted((lines | set(lacking)) - set(stale), key=_order)]) + "\n")


def _order(line: str) -> tuple[str, bool]:
    return line.removeprefix("override "), line.startswith("override")
