"""Files, functions and argument lists that a reader can hold in mind; and one home for every list of names."""

import ast
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.house.package import PACKAGE, trees

LINES, FUNCTION, ARGUMENTS, ROOT_FILES = 400, 80, 10, 6
# An op of torch, or a launch on a device, takes everything one by one.
OP_BOUNDARY = {
    "kernels/adamw/cpu.py": ("adamw_step",),
    "kernels/adamw/reference.py": ("adamw_step",),
    "kernels/adamw/triton.py": ("adamw_step",),
    "kernels/apollo/cpu.py": ("apollo_step",),
    "kernels/apollo/reference.py": ("apollo_step",),
    "kernels/apollo/triton.py": ("apollo_kernel", "apollo_step", "norm_kernel"),
    "kernels/codecs/tiles.py": ("encode_tile",),
    "kernels/codecs/triton.py": ("_encode",),
    "kernels/glu/triton.py": ("save_kernel", "product_kernel", "backward_kernel"),
    "kernels/lion/cpu.py": ("lion_step",),
    "kernels/lion/reference.py": ("lion_step",),
    "kernels/lion/triton.py": ("lion_step",),
    "kernels/operands/triton.py": ("rows_kernel", "columns_kernel"),
    "kernels/quantize/triton.py": ("quantize_kernel",),
    "kernels/rmsnorm/triton.py": ("forward_kernel", "again_kernel", "backward_kernel"),
    "kernels/step/cpu.py": ("run_steps",),
    "kernels/step/launch.py": ("run_steps",),
    "kernels/step/triton.py": (
        "adamw",
        "adamw_coded",
        "adam_family",
        "step_tile",
        "step_kernel",
        "steps_kernel",
        "moments_kernel",
    ),
}
# A door to which everything is said by name; and formulas in fp32, whose arguments are the symbols of the paper.
BY_NAME = {
    "optim/__init__.py": ("make_optimizer",),
    "optim/base.py": ("__init__",),
    "optim/lamb.py": ("lamb_",),
    "optim/soap.py": ("soap_",),
    "planner/simulate.py": ("plan",),
    "planner/step.py": ("simulate_step",),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(function: Function) -> int:
    """Lines of a function's code; what its docstring explains is not long but kind."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    spared = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - spared


def arguments_of(function: Function) -> int:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for i, name in enumerate(names) if i or name not in ("self", "cls")])


def functions(tree: ast.AST) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def test_files_are_short() -> None:
    sizes = {path: len((PACKAGE / path).read_text().splitlines()) for path in trees()}
    assert not {path: n for path, n in sizes.items() if n > LINES}


def test_functions_are_short() -> None:
    found = {f"{path}: {f.name}": lines_of(f) for path, tree in trees().items() for f in functions(tree)}
    assert not {name: n for name, n in found.items() if n > FUNCTION}


def test_argument_lists_are_short() -> None:
    long = {(path, f.name) for path, tree in trees().items() for f in functions(tree) if arguments_of(f) > ARGUMENTS}
    allowed = {(path, name) for table in (OP_BOUNDARY, BY_NAME) for path, names in table.items() for name in names}
    assert not long - allowed, "put what belongs together into a dataclass"
    assert not allowed - long, "no longer long: take it off the list"


def test_the_root_of_the_package_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_FILES


def strings_of(node: ast.expr) -> tuple[str, ...] | None:
    """Strings of a literal tuple, list or set, or the keys of a dict; None where it is something else."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "frozenset" and len(node.args) == 1:
        node = node.args[0]
    items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", None)
    if not items:
        return None
    nested = [strings_of(item) for item in items if isinstance(item, ast.Tuple | ast.List)]
    if len(nested) == len(items) and all(nested):
        return tuple(" ".join(part) for part in nested if part)
    words = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return tuple(words) if len(words) == len(items) else None


def constants(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, its strings) of the constants of a module that list at least three."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id.isupper() and value is not None:
            words = strings_of(value)
            if words and len(words) > 2:
                yield target.id, tuple(sorted(words))


# Tables by the names of another list, which they must not import.
SAME_NAMES = {
    ("optim/lowrank/projector.py:PROJECTORS", "specs.py:PROJECTIONS"): "specs says what may be asked, without torch",
}


def homes(files: dict[str, ast.Module]) -> set[tuple[str, ...]]:
    """Groups of constants that list the same."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, tree in files.items():
        for name, words in constants(tree):
            found[words].append(f"{path}:{name}")
    return {tuple(sorted(places)) for places in found.values() if len({p.partition(":")[0] for p in places}) > 1}


def test_a_list_of_names_stands_once() -> None:
    assert homes(trees()) == set(SAME_NAMES)


def test_the_named_pairs_are_equal() -> None:
    from hf_lowmem.optim.lowrank.projector import PROJECTORS
    from hf_lowmem.specs import PROJECTIONS

    assert set(PROJECTORS) == set(PROJECTIONS)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("A = ('a', 'b', 'c')", "B = ['c', 'b', 'a']", True),
        ("A: tuple = ('a', 'b', 'c')", "B = frozenset({'c', 'b', 'a'})", True),
        ("A = {'a': 1, 'b': 2, 'c': 3}", "B = ('a', 'b', 'c')", True),
        ("A = (('a', 'b'), ('b', 'c'), ('c', 'd'))", "B = [('a', 'b'), ('b', 'c'), ('c', 'd')]", True),
        ("A = ('a', 'b')", "B = ('a', 'b')", False),
        ("A = ('a', 'b', 'c')", "B = ('a', 'b', 'd')", False),
        ("A = ('a', 'b', 'c')", "b = ('a', 'b', 'c')", False),
    ],
)
def test_a_second_home_is_found(first: str, second: str, same: bool) -> None:
    assert bool(homes({"a.py": ast.parse(first), "b.py": ast.parse(second)})) is same


def test_what_is_measured() -> None:
    code = 'class A:\n    def f(self, a, *, b):\n        """One\n        two."""\n        return a'
    [function] = functions(ast.parse(code))
    assert (lines_of(function), arguments_of(function)) == (2, 2)
