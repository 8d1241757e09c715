"""Slots: decided once for a parameter, made anew when what they depend on has changed, and alive for nobody's sake."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowmem.codecs import codec_pair
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, roles, slot
from hf_lowmem.optim.roles import ROLES
from hf_lowmem.optim.sharded import row_dim, row_layout
from hf_lowmem.optim.slot import Slot
from hf_lowmem.optim.state import Counted, values_of, whole_layout

SHAPE = (80, 64)


def make(name: str = "adamw", dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[nn.Parameter, Any]:
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(SHAPE, generator=draw).to(dtype))
    if "rank" in OPTIMIZERS[name].DEFAULTS:
        options.setdefault("rank", 4)
    if name == "scale":  # which keeps nothing of other matrices
        options.setdefault("role", "head")
    return p, OPTIMIZERS[name]([("w", p)], lr=0.01, **options)


def step(p: Tensor, optimizer: LowMemOptimizer, seed: int = 0) -> None:
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
    optimizer.step()


def slot_of(optimizer: LowMemOptimizer) -> Slot:
    group = optimizer.param_groups[0]
    return optimizer.slot(group["params"][0], group)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_slot_is_made_once_and_asks_for_its_codecs_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(slot, "codec_pair", lambda state: (asked.append(state), codec_pair(state))[1])
    p, optimizer = make(name, state="8bit", weights="bf16_sr")
    first = slot_of(optimizer)
    for seed in range(3):
        step(p, optimizer, seed)
        optimizer.param_groups[0]["lr"] *= 0.5  # as a schedule does
    optimizer.state_bytes(p, optimizer.param_groups[0])
    assert slot_of(optimizer) is first
    assert len(asked) == 1


def swapped(p: nn.Parameter, optimizer: LowMemOptimizer) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(torch.ones(SHAPE)))


def moved(p: nn.Parameter, optimizer: LowMemOptimizer) -> None:
    p.data = p.data.float()


def replaced(p: nn.Parameter, optimizer: LowMemOptimizer) -> None:
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(40, 64, dtype=torch.bfloat16))


def option_set(p: nn.Parameter, optimizer: LowMemOptimizer) -> None:
    optimizer.param_groups[0]["weights"] = "keep"


def seed_set(p: nn.Parameter, optimizer: LowMemOptimizer) -> None:
    optimizer.param_groups[0]["seed"] = 7


def loaded(p: nn.Parameter, optimizer: LowMemOptimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("change", [swapped, moved, replaced, option_set, seed_set, loaded])
def test_it_is_made_anew_when_its_facts_have_changed(
    change: Callable[[nn.Parameter, LowMemOptimizer], None],
) -> None:
    p, optimizer = make(weights="bf16_sr")
    step(p, optimizer)
    before = slot_of(optimizer)
    p.grad = None
    change(p, optimizer)
    after = slot_of(optimizer)
    assert after is not before
    now = optimizer.param_groups[0]["params"][0]
    assert after.shape == now.shape
    assert after.store.name == ("bf16_sr" if change in (replaced, seed_set, loaded) else "keep")
    step(now, optimizer, 1)
    assert slot_of(optimizer) is after
    assert now.isfinite().all()


def test_a_group_that_is_added_leaves_the_slots_of_the_others() -> None:
    _, optimizer = make()
    first, q = slot_of(optimizer), nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("v", q)], "state": "int8"})
    assert slot_of(optimizer) is first
    assert [c.name for c in optimizer.slot(q, optimizer.param_groups[1]).codecs] == ["fp32", "fp32"], "it is small"


def by_pickle(optimizer: LowMemOptimizer) -> LowMemOptimizer:
    return pickle.loads(pickle.dumps(optimizer))


def by_file(optimizer: LowMemOptimizer) -> LowMemOptimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_file])
@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_a_copy_decides_for_itself_and_goes_on_alike(name: str, copied: Callable[[Any], LowMemOptimizer]) -> None:
    p, optimizer = make(name, state="8bit", weights="bf16_ecc")
    step(p, optimizer)
    other = copied(optimizer)
    q = other.param_groups[0]["params"][0]
    assert slot_of(other) is not slot_of(optimizer)
    step(p, optimizer, 1)
    step(q, other, 1)
    assert torch.equal(p, q)
    ours, theirs = values_of(optimizer.state[p]), values_of(other.state[q])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_a_state_that_is_put_in_place_is_seen() -> None:
    """Whoever moves a state to another device assigns it; a slot may not write to the old one."""
    p, optimizer = make(state="8bit")
    step(p, optimizer)
    optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
    kept = slot_of(optimizer).load("exp_avg").clone()
    step(p, optimizer, 1)
    assert optimizer.state[p]["step"] == 2
    assert not torch.equal(slot_of(optimizer).load("exp_avg"), kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_at_a_slot_makes_no_state(name: str) -> None:
    p, optimizer = make(name, state="8bit")
    look = slot_of(optimizer)
    assert not look.load("exp_avg").any()
    assert optimizer.state_bytes(p, optimizer.param_groups[0]) == look.nbytes() > 0
    assert not optimizer.state


def test_slots_keep_neither_parameter_nor_optimizer_alive() -> None:
    p, optimizer = make()
    slot_of(optimizer)
    old, gone = weakref.ref(p), weakref.ref(optimizer)
    gc.disable()
    try:
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))
        del p
        assert old() is None
        slot_of(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("shape", [(80, 64), (64, 80), (3, 20, 30), (3, 30, 20), (77,), ()], ids=str)
@pytest.mark.parametrize(
    ("name", "role"),
    [(n, role) for n, cls in OPTIMIZERS.items() for role in (ROLES if "role" in cls.FACTS else ROLES[:1])],
)
def test_rows_of_every_state_can_be_put_in_front_and_back(name: str, role: str, shape: tuple[int, ...]) -> None:
    """What is cut has the parameter's rows, its channels or its experts in front; the way back is the way there."""
    cls = OPTIMIZERS[name]
    group = (
        cls.DEFAULTS
        | roles.DEFAULTS
        | {"role": role, "rank": 4, "experts": len(shape) == 3, "history": 5, "state": "int8", "weights": "keep"}
    )
    size = torch.Size(shape)
    whole = whole_layout(cls.STATES, codec_pair("int8"), size, group)
    rows = row_layout(whole, size, group)
    assert whole.keys() == rows.keys()
    assert "exp_avg" in rows or (name == "scale" and role in ("linear", "embedding"))
    for key, state in whole.items():
        dim = row_dim(state, size, group)
        assert rows[key].cut == (dim is not None)
        if dim is None:
            assert rows[key].shape == state.shape
            assert key == "basis" or not state.shape, key
            continue
        assert rows[key].shape[0] in (shape[0], max(shape)) or cls.unsharded_only(size, group), key
        value = torch.arange(state.shape.numel()).view(state.shape)
        turned = value.movedim(dim, 0)
        assert turned.shape == rows[key].shape
        assert torch.equal(turned.movedim(0, dim), value)


@pytest.mark.parametrize("name", ["adamw", "apollo", "galore"])
def test_an_eps_below_what_coded_moments_reach_is_refused(name: str) -> None:
    p = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"eps=1e-12 with state='8bit'.*Take 1e-10 or more, or state 'fp32'"):
        OPTIMIZERS[name]([("p", p)], state="8bit", eps=1e-12)
    OPTIMIZERS[name]([("p", p)], state="fp32", eps=1e-12)
    OPTIMIZERS[name]([("p", p)], state="8bit", eps=1e-10)


def test_a_count_follows_the_tensor_that_is_in_the_state() -> None:
    counted, raw = Counted("step"), {}
    assert counted.read(raw) == 0
    assert not raw, "a look makes no state"
    assert [counted.one_more(raw) for _ in range(3)] == [1, 2, 3]
    raw["step"].fill_(10)  # a distributed checkpoint is loaded in place
    assert counted.one_more(raw) == 11
    raw["step"] = torch.tensor(40)  # another one puts a new tensor there
    assert (counted.read(raw), counted.one_more(raw), raw["step"].item()) == (40, 41, 41)
    raw["step"] = 7  # as version 0.1.0 had it
    assert counted.read(raw) == 7
    assert raw["step"] == 7
    assert counted.one_more(raw) == 8
    raw["step"] = torch.tensor(3, dtype=torch.int32)
    assert (counted.read(raw), counted.one_more(raw), raw["step"].dtype) == (3, 4, torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert counted.one_more(raw) == 5
    twin = copy.deepcopy(counted), copy.deepcopy(raw)
    assert twin[0].one_more(twin[1]) == 6
    assert counted.read(raw) == 5
