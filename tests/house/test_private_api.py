"""tests/private_api.txt: it is what the code uses, each name is there in the installed versions, and overrides fit.

Of torch, transformers and triton the oldest versions that are allowed and the newest are tried, with the whole suite.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from tests.house.package import lines_of
from tests.house.private import LIST, compare, inherited, parsed, parts, path_of, self_stores

LINES = lines_of(LIST)
X = torch.ones(2, requires_grad=True)


def _custom_op() -> Any:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    return torch.library.custom_op("house::double", double, mutates_args=())


# What "()" behind a path stands for, where it is no call without arguments.
SAMPLES: dict[str, Callable[[], Any]] = {
    "torch.nn.Module": lambda: nn.Linear(2, 2),
    "torch._dynamo.OptimizedModule": lambda: torch.compile(nn.Linear(2, 2)),
    "torch.autograd.graph.MulBackward0": lambda: (X * X).grad_fn,
    "torch.autograd.graph.ExpandBackward0": lambda: X.expand(3, 2).grad_fn,
    "torch.autograd.graph.TransposeBackward0": lambda: X.expand(3, 2).transpose(0, 1).grad_fn,
    "torch.library.custom_op": _custom_op,
    "transformers.PreTrainedConfig": PreTrainedConfig,
}


def resolve(path: str) -> Any:
    """The object that a line of the list names. Raises AttributeError or ImportError where there is none."""
    made, _, rest = path.rpartition("()")
    if not made:
        return _follow(rest)
    if made not in SAMPLES and inspect.isclass(kind := resolve(made)):
        name = rest.removeprefix(".")  # of a class that is not made in a moment: whether its code puts it on `self`
        if not any(name in self_stores(parsed(base)) for base in kind.__mro__[:-1]):
            raise AttributeError(f"{made} keeps no {name}")
        return None
    value = SAMPLES[made]() if made in SAMPLES else resolve(made)()
    for name in filter(None, rest.split(".")):
        value = getattr(value, name)
    return value


def _follow(path: str) -> Any:
    head, *rest = path.split(".")
    value = importlib.import_module(head)
    for name in rest:
        head = f"{head}.{name}"
        if inspect.ismodule(value) and not hasattr(value, name):
            value = importlib.import_module(head)  # torch.optim has no attribute `optimizer`
        else:
            value = getattr(value, name)
    return value


def misfits(ours: Callable[..., Any], parent: Callable[..., Any]) -> list[str]:
    """Ways of calling `parent` that `ours` does not take."""
    mine, theirs = inspect.signature(ours).parameters, inspect.signature(parent).parameters
    kinds = {p.kind for p in mine.values()}
    rest, keywords = inspect.Parameter.VAR_POSITIONAL in kinds, inspect.Parameter.VAR_KEYWORD in kinds
    places = [p for p in mine.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found = []
    for i, (name, p) in enumerate(theirs.items()):
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            if not (rest if p.kind is p.VAR_POSITIONAL else keywords):
                found.append(f"takes no {p}")
            continue
        own = next(
            (m for m in mine.values() if m.name == name and m.kind not in (m.VAR_POSITIONAL, m.VAR_KEYWORD)), None
        )
        if own is None and not keywords:
            found.append(f"{name!r} cannot be given by name")
        if p.kind is p.POSITIONAL_OR_KEYWORD and not (places[i].name == name if i < len(places) else rest):
            found.append(f"{name!r} cannot be given by position")
        if own is not None and own.default is own.empty and p.default is not p.empty:
            found.append(f"{name!r} must be given")
    needed = [n for n, p in mine.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return found + [f"{name!r} is asked for" for name in needed if name not in theirs]


def test_the_list_is_what_the_code_uses() -> None:
    lacking, stale = compare(set(LINES))
    assert not lacking, f"python -m tests.house.write private, then say whose it is in place of '?': {lacking}"
    assert not stale, f"used no more: python -m tests.house.write private: {stale}"
    assert len(LINES) == len(set(LINES))


@pytest.mark.parametrize("line", LINES)
def test_the_installed_versions_have_it(line: str) -> None:
    path, _, value = line.removeprefix("override ").partition("=")
    assert not value or resolve(path) == value
    resolve(path)


def test_overrides_take_what_the_hosts_methods_take() -> None:
    found = {
        f"{path_of(own)}.{name}, of {path_of(parent)}: {why}"
        for own, parent, name in inherited()[0]
        if (parent, name) != (nn.Module, "forward")  # which every module has in its own way
        for why in misfits(vars(own)[name], getattr(parent, name))
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    "path", ["torch._nothing", "transformers.TrainingArguments()._nothing", "torch.nn.Module()._no"]
)
def test_a_name_that_is_gone_is_noticed(path: str) -> None:
    with pytest.raises((AttributeError, ImportError)):
        resolve(path)


def test_a_new_name_and_a_stale_one_are_noticed() -> None:
    lacking, stale = compare({*LINES, "torch.Tensor._nothing"} - {"torch.Tensor._version", "torch._utils"})
    assert lacking == ["torch._utils", "?._version"]
    assert stale == ["torch.Tensor._nothing"]
    assert parts("override a.B._c") == ["a", "B", "_c"]


class Parent:
    def f(self, a: int, b: int = 0, *, c: int = 0) -> None: ...


@pytest.mark.parametrize(
    ("ours", "what"),
    [
        (lambda self, a, b=0, *, c=0: None, []),
        (lambda self, a, *args, **kwargs: None, []),
        (lambda self, *b, **kwargs: None, []),
        (lambda self, a, b=0: None, ["'c' cannot be given by name"]),
        (lambda self, a, b, *, c=0: None, ["'b' must be given"]),
        (lambda self, x, b=0, *, c=0: None, ["'a' cannot be given by name", "'a' cannot be given by position"]),
        (lambda self, a, b=0, *, c=0, d: None, ["'d' is asked for"]),
    ],
)
def test_misfits(ours: Callable[..., Any], what: list[str]) -> None:
    assert [found for found in misfits(ours, Parent.f) if "'x'" not in found] == what
