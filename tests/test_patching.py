"""Standing in for a module's forward: around whoever stands there, taken away in any order."""

import copy
import inspect
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.activations import convert, undo
from hf_lowmem.activations.checkpoint import is_wrapped, wrap_layer
from hf_lowmem.patching import ForwardPatch, check_version, forwards_of, version_of
from hf_lowmem.preference.sharing.share import share_prompts, shares_prompts, unshare_prompts
from tests.activations.wrapped_models import llama


class Digit(ForwardPatch):
    """Append a digit to the number that the forward below returns."""

    def __init__(self, module: nn.Module, digit: int) -> None:
        super().__init__(module)
        self.digit = digit

    def __call__(self, x: int) -> int:
        return 10 * self.original(x) + self.digit


class Same(nn.Module):
    def forward(self, x: int) -> int:
        return x


def stack(count: int) -> tuple[nn.Module, list[Digit]]:
    module, patches = Same(), []
    for digit in range(1, count + 1):
        patches.append(Digit(module, digit))
        patches[-1].put()
    return module, patches


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_patches_go_in_any_order(order: tuple[int, ...]) -> None:
    module, patches = stack(3)
    assert module(0) == 123
    assert list(forwards_of(module)) == patches[::-1]
    left = [1, 2, 3]
    for index in order:
        assert patches[index].take_away()
        assert not patches[index].take_away()
        left.remove(index + 1)
        assert module(0) == int("".join(map(str, left)) or 0)
    assert "forward" not in vars(module)


def test_a_patch_stands_once_and_around_what_it_finds() -> None:
    module, (first, _) = stack(2)
    first.put()
    assert module(0) == 12
    first.take_away()
    first.put()
    assert module(0) == 21
    assert inspect.signature(module.forward) == inspect.signature(Same().forward)


def test_somebody_elses_forward_stays() -> None:
    module = Same()
    theirs = vars(module)["forward"] = lambda x: x + 5
    patch = Digit(module, 1)
    patch.put()
    assert module(0) == 51
    vars(module)["forward"] = over = lambda x: patch(x)
    assert not patch.take_away()
    assert module.forward is over
    vars(module)["forward"] = patch
    assert patch.take_away()
    assert module.forward is theirs


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_patches_of_its_own(again: Any) -> None:
    module, patches = stack(2)
    twin = again(module)
    ours = list(forwards_of(twin))
    assert all(patch.module is twin for patch in ours)
    ours[1].take_away()
    assert (twin(0), module(0)) == (2, 12)
    assert list(forwards_of(module)) == patches[::-1]


def test_tiers_and_shared_prompts_of_one_module_do_not_need_each_others_order() -> None:
    model: Any = llama(1)
    backbone = model.model
    share_prompts(model)
    unwrap = wrap_layer(backbone)  # over the shared forward
    share_prompts(model)
    assert len(list(forwards_of(backbone))) == 2
    unshare_prompts(model)
    assert not shares_prompts(model)
    assert is_wrapped(backbone)
    share_prompts(model)
    assert is_wrapped(backbone)
    with pytest.raises(ValueError, match="is wrapped already, as checkpoint_fp8"):
        wrap_layer(backbone)
    unwrap()
    unwrap()
    assert not is_wrapped(backbone)
    assert shares_prompts(model)
    convert(model, "fp8")
    undo(model)
    assert shares_prompts(model)
    unshare_prompts(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_a_change_in_place_is_autograds_error() -> None:
    x = torch.zeros(2, 3)
    version = version_of(x)
    check_version(x, version)
    x += 1
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: \[.*\[2, 3\]\] is at version 1; exp"):
        check_version(x, version)
    with torch.inference_mode():
        frozen: Tensor = torch.zeros(2)
    check_version(frozen, version_of(frozen))
