"""A loaded state is whole, finite and of this parameter, or it is refused by the parameter's name with a remedy."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer
from hf_lowmem.optim.state import COUNTS

SHAPE = (80, 64)
CODECS = ["fp32", "8bit"]


def make(name: str, codec: str = "fp32", **kwargs: Any) -> tuple[nn.Parameter, LowMemOptimizer]:
    p = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    defaults = OPTIMIZERS[name].DEFAULTS
    settings: dict[str, Any] = {k: v for k, v in {"rank": 4, "update_gap": 3}.items() if defaults.get(k, 0) > v}
    if "role" in OPTIMIZERS[name].FACTS:  # which has both moments where the method's own rule has none
        settings["role"] = "other"
    return p, OPTIMIZERS[name]([("layer.weight", p)], **({"lr": 0.01, "state": codec} | settings | kwargs))


def train(p: nn.Parameter, optimizer: LowMemOptimizer, steps: range) -> None:
    for seed in steps:
        p.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        optimizer.step()


def saved(name: str, codec: str = "fp32") -> dict[str, Any]:
    p, optimizer = make(name, codec)
    train(p, optimizer, range(4))
    return copy.deepcopy(optimizer.state_dict())


def refuse(name: str, codec: str, state_dict: dict[str, Any], *words: str) -> None:
    _, optimizer = make(name, codec)
    with pytest.raises(ValueError, match=r"'layer\.weight'") as caught:
        optimizer.load_state_dict(state_dict)
    for word in (*words, "fresh"):
        assert word in str(caught.value)
    assert not optimizer.state, "nothing of it was taken"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_tensor_of_a_state_must_be_there_in_its_dtype_and_no_other(name: str, codec: str) -> None:
    whole = saved(name, codec)
    make(name, codec)[1].load_state_dict(copy.deepcopy(whole))
    for key in whole["state"][0].keys() - set(COUNTS):
        missing, converted = copy.deepcopy(whole), copy.deepcopy(whole)
        del missing["state"][0][key]
        refuse(name, codec, missing, f"has no {key!r}", "step count of 4")
        converted["state"][0][key] = converted["state"][0][key].to(torch.float16)
        refuse(name, codec, converted, f"{key!r} in torch.float16")
    extra = copy.deepcopy(whole)
    extra["state"][0]["max_exp_avg_sq"] = torch.zeros(SHAPE)
    refuse(name, codec, extra, "'max_exp_avg_sq'", "does not keep")


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("codec", [*CODECS, "bf16", "int4"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_value_that_is_not_finite_is_refused(name: str, codec: str, bad: float) -> None:
    whole = saved(name, codec)
    for key in whole["state"][0].keys() - set(COUNTS):
        if whole["state"][0][key].is_floating_point():
            spoiled = copy.deepcopy(whole)
            spoiled["state"][0][key].view(-1)[-1] = bad
            refuse(name, codec, spoiled, repr(key.split(".")[0]), "NaN or Inf")


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [n for n, cls in OPTIMIZERS.items() if "exp_avg_sq" in cls.STATES])
def test_a_negative_second_moment_is_refused(name: str, codec: str) -> None:
    whole = saved(name, codec)
    whole["state"][0]["exp_avg_sq"].view(-1)[7] = -1e-6
    refuse(name, codec, whole, "negative value", "'exp_avg_sq'")


@pytest.mark.parametrize("codec", ["fp8", "fp8_expand"])
def test_a_code_that_stands_for_nan_is_refused(codec: str) -> None:
    whole = saved("adamw", codec)
    whole["state"][0]["exp_avg.codes"].view(-1)[3] = 0x7F
    refuse("adamw", codec, whole, "NaN or Inf", "'exp_avg'")
    negative = saved("adamw", codec)
    negative["state"][0]["exp_avg_sq.codes"].view(-1)[3] |= 0x80
    refuse("adamw", codec, negative, "'exp_avg_sq'")


BAD_STEPS: list[tuple[Any, str]] = [
    (0, "step=0"),
    (-1, "step=-1"),
    (True, "step=True"),
    (5.0, "step=5.0"),
    (math.nan, "step=nan"),
    (None, "step=None"),
    ("5", "step='5'"),
    (torch.tensor(5.0), "expected an integer"),
    (torch.tensor(0), "step=0"),
    (torch.tensor(True), "expected an integer"),
    (torch.tensor([5, 5]), "expected an integer"),
]


@pytest.mark.parametrize(("step", "word"), BAD_STEPS, ids=[str(s) for s, _ in BAD_STEPS])
@pytest.mark.parametrize("name", ["adamw", "lion", "soap", "apollo"])
def test_a_step_is_a_whole_number_of_at_least_one(name: str, step: Any, word: str) -> None:
    whole = saved(name)
    whole["state"][0]["step"] = step
    refuse(name, "fp32", whole, word)
    del whole["state"][0]["step"]
    refuse(name, "fp32", whole, "step=None")


def test_a_state_of_another_shape_or_layout_is_refused() -> None:
    for name, key in (("soap", "factor_left"), ("fira", "prev_norm")):
        whole = saved(name)
        whole["state"][0][key] = torch.ones(3, 3)
        refuse(name, "fp32", whole, repr(key), "(3, 3)")


@pytest.mark.parametrize("codec", ["fp32", "8bit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_0_1_0_are_read(name: str, codec: str) -> None:
    """Their whole numbers were Python's."""
    (p, optimizer), (q, other) = make(name, codec), make(name, codec)
    train(p, optimizer, range(4))
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        state |= {k: int(v) for k, v in state.items() if k in COUNTS}
    for group in old["param_groups"]:
        group.pop("experts", None)
    other.load_state_dict(old)
    q.data.copy_(p.data)
    train(p, optimizer, range(4, 8))
    train(q, other, range(4, 8))
    assert torch.equal(p, q)


@pytest.mark.parametrize("first_is_bad", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_whose_first_updates_were_left_out_is_whole(name: str, first_is_bad: bool) -> None:
    p, optimizer = make(name)
    if first_is_bad:
        p.grad = torch.full(SHAPE, math.nan)
        optimizer.step()
        optimizer.step()
    else:
        train(p, optimizer, range(1))
    _, other = make(name)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state_dict()["state"][0].keys() == optimizer.state_dict()["state"][0].keys()


@pytest.mark.parametrize("reload", [False, True], ids=["in place", "and load_state_dict"])
@pytest.mark.parametrize("codec", ["fp32", "8bit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_restores_a_state_in_place(name: str, codec: str, reload: bool, tmp_path: Any) -> None:
    (p, optimizer), (q, other) = make(name, codec, seed=1), make(name, codec, seed=1)
    train(p, optimizer, range(5))
    other.param_groups[0]["param_names"] = ["another"]  # whose random numbers start elsewhere
    train(q, other, range(7, 8))
    other.param_groups[0]["param_names"] = ["layer.weight"]
    dcp.save(optimizer.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    loaded = other.state_dict()
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert loaded["state"].keys() == {0}
    if reload:
        other.load_state_dict(loaded)
    for key, value in optimizer.state[p].items():
        assert torch.equal(value, other.state[q][key]), key
    q.data.copy_(p.data)
    train(p, optimizer, range(5, 9))
    train(q, other, range(5, 9))
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_somebody_has_moved_goes_on(name: str) -> None:
    """As offloading code does with every tensor of a state."""
    p, optimizer = make(name)
    train(p, optimizer, range(2))
    state = optimizer.state[p]
    for key, value in state.items():
        state[key] = value.clone()
    train(p, optimizer, range(2, 4))
    assert int(state["step"]) == 4
    assert state["step"].device.type == "cpu"


def said_on_loading(optimizer: LowMemOptimizer, state_dict: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.load_state_dict(copy.deepcopy(state_dict))
    return [str(w.message) for w in said]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("adamw", {"weight_decay": 0.3}),
        ("adamw", {"betas": (0.5, 0.6)}),
        ("lamb", {"eps": 1e-3}),
        ("apollo", {"scale": 7.0}),
        ("galore", {"update_gap": 2}),
        ("lion", {"cautious": True}),
    ],
)
def test_settings_that_the_checkpoint_has_otherwise_are_told(name: str, changed: dict[str, Any]) -> None:
    (option, value), *_ = changed.items()
    _, optimizer = make(name, **changed)
    (said,) = said_on_loading(optimizer, saved(name))
    assert f"this optimizer has {option}={value!r}" in said
    assert "param_groups" in said
    assert f"{option}={optimizer.param_groups[0][option]!r}, this" in said, "the checkpoint's counts, as in torch"
    assert not said_on_loading(make(name)[1], saved(name))


def test_what_a_schedule_moves_is_no_change_but_its_start_is() -> None:
    def scheduled(lr: float) -> tuple[nn.Parameter, LowMemOptimizer, Any]:
        p, optimizer = make("adamw", lr=lr)
        return p, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=20)

    p, optimizer, schedule = scheduled(0.01)
    train(p, optimizer, range(3))
    for _ in range(3):
        schedule.step()
    state_dict = optimizer.state_dict()
    assert optimizer.param_groups[0]["betas"] != make("adamw")[1].param_groups[0]["betas"]
    assert not said_on_loading(scheduled(0.01)[1], state_dict)
    (said,) = said_on_loading(scheduled(0.02)[1], state_dict)
    assert "this optimizer has lr=" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", "1e-3"),
        ("betas", (2.0, 5.0)),
        ("betas", None),
        ("eps", -1.0),
        ("weight_decay", math.nan),
        ("update_gap", 0),
        ("scale", None),
        ("rotate", "yes"),
    ],
)
def test_a_setting_that_no_constructor_takes_is_refused(option: str, value: Any) -> None:
    """A negative rate, as a damaged file may have it, would lead uphill without a word."""
    state_dict = saved("galore")
    state_dict["param_groups"][0][option] = value
    _, optimizer = make("galore")
    with pytest.raises(ValueError, match=rf"parameter group 0 has a setting.*{option}.*fresh optimizer"):
        optimizer.load_state_dict(state_dict)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.01


def spoiled(state_dict: Any, where: tuple[Any, ...], value: Any) -> Any:
    *path, last = where
    inner = state_dict
    for key in path:
        inner = inner[key]
    inner[last] = value
    return state_dict


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("param_groups",), None, "no list of groups"),
        (("param_groups", 0, "params"), "x", "neither numbers nor names"),
        (("param_groups", 0, "params"), [None], "neither numbers nor names"),
        (("param_groups", 0, "param_names"), [1], "not the names of its 1 parameters"),
        (("param_groups", 0, "skipped"), [1], r"skipped=\[1\], expected three counts"),
        (("param_groups", 0, "skipped"), [2**80, 1, 1], "expected three counts"),
        (("state",), None, "no dict of dicts"),
        (("state", 0), 5, "no dict of dicts"),
        (("state", 0, 3), 5, "no dict of dicts"),
        (("state", 0, "step"), 2**80, r"step=\d+, expected at least 1 and below 2\*\*63"),
    ],
)
def test_what_is_no_state_dict_is_refused(where: tuple[Any, ...], value: Any, words: str) -> None:
    _, optimizer = make("adamw")
    with pytest.raises(ValueError, match=f"the checkpoint.*{words}.*fresh optimizer"):
        optimizer.load_state_dict(spoiled(saved("adamw"), where, value))
    assert not optimizer.state
