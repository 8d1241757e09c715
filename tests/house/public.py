"""The public API: what may be imported by name, with signatures as the code writes them.

`python -m tests.house.write public` writes it to tests/public_api.txt. Signatures are source text, so that they do not
depend on the versions of Python or of the hosts; of a class that stands on a host's only what is ours is listed.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

from tests.house.package import TESTS

LIST = TESTS / "public_api.txt"
# Whose `__all__` is the public API.
MODULES = (
    "hf_lowmem",
    "hf_lowmem.activations",
    "hf_lowmem.checkpoints",
    "hf_lowmem.codecs",
    "hf_lowmem.kernels",
    "hf_lowmem.memory",
    "hf_lowmem.optim",
    "hf_lowmem.planner",
    "hf_lowmem.preference.losses",
    "hf_lowmem.rules",
    "hf_lowmem.specs",
)


@cache
def public() -> dict[str, Any]:
    """Path → object. A class's bases are public with it, under their own modules' names."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        found |= {f"{name}.{item}": getattr(module, item) for item in module.__all__}
    classes = [value for value in found.values() if inspect.isclass(value) and _is_ours(value)]
    bases = {base for cls in classes for base in cls.__mro__ if _is_ours(base)} - set(classes)
    return found | {f"{base.__module__}.{base.__qualname__}": base for base in bases}


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("hf_lowmem")


def _code(value: Any) -> Any:
    """The definition of a function or a class."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]


def _signature(value: Any) -> str:
    code = _code(value)
    returns = f" -> {ast.unparse(code.returns)}" if code.returns else ""
    return f"({ast.unparse(code.args)}){returns}"


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """(name, function or property) of what is written in a class."""
    for name, value in vars(cls).items():
        value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        value = property(value.func) if isinstance(value, cached_property) else value
        written = value.fget if isinstance(value, property) else value
        # Not what a dataclass has made, nor a default.
        made = inspect.isfunction(written) and (written.__name__ == "<lambda>" or "<" in written.__code__.co_filename)
        hidden = name.startswith("_") and name not in ("__init__", "__call__")
        # An optimizer's first instance gives its class a `step` of its own: the parent's in a wrapper of torch.
        above = next((vars(c)[name] for c in cls.__mro__[1:] if name in vars(c)), None)
        hidden |= (
            inspect.isfunction(above)
            and inspect.isfunction(written)
            and inspect.unwrap(written) is inspect.unwrap(above)
        )
        if inspect.isfunction(written) and _is_ours(written) and not made and not hidden:
            yield name, value


def fields(cls: type) -> Iterator[str]:
    """Annotated attributes, in the words of the code."""
    for node in _code(cls).body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            value = "" if node.value is None else f" = {_default(node.value)}"
            yield f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{value}"


def _default(node: ast.expr) -> str:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "field":
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        return given.get("default") or given.get("default_factory") or "field()"
    return ast.unparse(node) if not isinstance(node, ast.Dict) else "{...}"


def dump() -> list[str]:
    """The lines of the list."""
    lines = []
    for path, value in public().items():
        if inspect.isclass(value) and _is_ours(value):
            bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
            lines.append(f"{path}({bases})" if bases else path)
            lines += [f"{path}.{field}" for field in fields(value)]
            for name, member in members(value):
                kind = isinstance(member, property)
                lines.append(f"{path}.{name}" + (": property" if kind else _signature(member)))
        elif inspect.isfunction(inspect.unwrap(value)) and _is_ours(value):
            lines.append(path + _signature(value))
        elif isinstance(value, dict):
            lines.append(f"{path} = {{{', '.join(sorted(map(str, value)))}}}")
        else:
            lines.append(f"{path}: {type(value).__name__}")
    return sorted(set(lines))


def documented() -> Iterator[tuple[str, str | None]]:
    """(path, docstring) of every public function, class and method; that of a method may be its base's."""
    for path, value in public().items():
        if inspect.isclass(value) and _is_ours(value):
            yield path, value.__doc__
            for name, _ in members(value):
                if not name.startswith("__"):  # the class says how it is made and called
                    yield f"{path}.{name}", inspect.getdoc(getattr(value, name))
        elif inspect.isfunction(inspect.unwrap(value)) and _is_ours(value):
            yield path, value.__doc__


def write() -> None:
    LIST.write_text("\n".join(dump()) + "\n")
