"""A wrapper changes neither the name of a parameter, nor its random numbers, nor which states are read."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import offload_wrapper as offload

from hf_lowmem.optim import OPTIMIZERS, make_optimizer
from hf_lowmem.optim.names import named_parameters, same_names, without_wrappers
from tests.conftest import tiny_llama

LOW_RANK: dict[str, Any] = {"rank": 4, "update_gap": 3}


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def each_layer(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], nn.Module]:
    def run(model: Any) -> nn.Module:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrap(layer)
        return model

    return run


WRAPS: dict[str, Callable[[Any], nn.Module]] = {
    "compile": compiled,
    "regional compile": each_layer(compiled),
    "DataParallel": nn.DataParallel,
    "checkpoint_wrapper": each_layer(checkpoint_wrapper),
    "offload_wrapper": each_layer(offload),
    "checkpoint_wrapper at the root": checkpoint_wrapper,
    "nested": lambda model: compiled(nn.DataParallel(each_layer(lambda m: checkpoint_wrapper(compiled(m)))(model))),
}


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    for i, (_, _, p) in enumerate(named_parameters(model)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i))
    optimizer.step()


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("name", ["apollo", "galore"])
def test_a_wrapper_changes_nothing(name: str, wrap: Callable[[Any], nn.Module]) -> None:
    plain, inside = tiny_llama(), tiny_llama()
    wrapped = wrap(inside)
    one = make_optimizer(name, plain, lr=0.01, **LOW_RANK)
    other = make_optimizer(name, wrapped, lr=0.01, **LOW_RANK)
    assert [g["param_names"] for g in other.param_groups] == [g["param_names"] for g in one.param_groups]
    for seed in range(2):
        step(plain, one, seed)
        step(wrapped, other, seed)
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p, q)
    saved = copy.deepcopy(one.state_dict()), copy.deepcopy(other.state_dict())
    one.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    step(plain, one, 2)
    step(wrapped, other, 2)
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_the_classes_themselves_know_wrappers_by_their_names(wrap: Callable[[Any], nn.Module]) -> None:
    keys = []
    for make in (lambda model: model, wrap):
        model = make(tiny_llama())
        optimizer = OPTIMIZERS["apollo"](list(model.named_parameters()), **LOW_RANK)
        step(model, optimizer, 0)
        keys.append([int(s["key"]) for s in optimizer.state.values() if "key" in s])
    assert keys[0] == keys[1]
    assert len(keys[0]) > 1


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_states_that_were_saved_under_prefixed_names_are_read(wrap: Callable[[Any], nn.Module]) -> None:
    """As 0.1.0 saved them; afterwards the names are without prefixes."""
    wrapped = wrap(tiny_llama())
    paths = {name: path for path, name, _ in named_parameters(wrapped)}
    saving = make_optimizer("apollo", wrapped, **LOW_RANK)
    step(wrapped, saving, 0)
    saved = copy.deepcopy(saving.state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [paths[name] for name in group["param_names"]]
    loading = make_optimizer("apollo", tiny_llama(), **LOW_RANK)
    names = [g["param_names"] for g in loading.param_groups]
    loading.load_state_dict(saved)
    assert [g["param_names"] for g in loading.param_groups] == names
    assert len(loading.state) == len(saving.state)


class Own(nn.Module):
    """Submodules of the user's own that are called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 8, bias=False)
        self.weight = nn.Parameter(torch.zeros(8, 8))
        self._orig_mod = nn.ModuleDict({"module": nn.Linear(8, 8, bias=False)})


def test_a_submodule_that_is_really_called_module_keeps_its_name() -> None:
    names = [name for _, name, _ in named_parameters(nn.Sequential(Own()))]
    assert names == ["0.weight", "0.module.weight", "0._orig_mod.module.weight"]
    wrapped = [name for _, name, _ in named_parameters(compiled(nn.DataParallel(nn.Sequential(Own()))))]
    assert wrapped == names


def test_names_that_would_become_equal_are_kept() -> None:
    names = ["a._orig_mod.weight", "a.weight", "b._orig_mod.weight", "_orig_mod"]
    assert without_wrappers(names) == ["a._orig_mod.weight", "a.weight", "b.weight", "_orig_mod"]
    double = nn.DataParallel(nn.Linear(4, 4, bias=False))
    double.weight = nn.Parameter(torch.zeros(4, 4))
    assert sorted(name for _, name, _ in named_parameters(double)) == ["module.weight", "weight"]
    optimizer = make_optimizer("apollo", double, rank=1)
    step(double, optimizer, 0)
    low = [s["key"] for s in optimizer.state.values() if "key" in s]
    assert len(low) == 1  # the other is no linear layer's


def test_two_parameters_of_one_name_without_wrappers_have_streams_of_their_own() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(8, 8)}), "b": nn.Linear(8, 8)})
    model["a"].register_parameter("weight", nn.Parameter(torch.zeros(8, 8)))
    params = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    optimizer = OPTIMIZERS["apollo"](params, rank=2)
    step(model, optimizer, 0)
    assert len({int(s["key"]) for s in optimizer.state.values()}) == len(params) == 3


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        (["a.w", "b.w"], ["_orig_mod.a.w", "_orig_mod.b.w"], True),
        (["module.a.w", "module.b.w"], ["a.w", "b.w"], True),
        (["a.w"], ["_orig_mod.module.module.a.w"], True),
        (["a.b.w"], ["a.module.b.w"], True),
        (["a.w", "a.module.w"], ["a.module.w", "a.w"], False),
        (["a.w", "b.w"], ["b.w", "a.w"], False),
        (["a.w"], ["a.module_list.w"], False),
        (["a.w"], ["my_orig_mod.a.w"], False),
        (["a.w"], ["a.w", "b.w"], False),
    ],
)
def test_which_names_are_the_same(ours: list[str], theirs: list[str], same: bool) -> None:
    assert same_names(ours, theirs) is same
    assert same_names(theirs, ours) is same
