"""What every optimizer promises: no exception by name. With every codec, where a codec could break the promise."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lowmem.codecs import CODECS, PAIRS, codec_pair
from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, make_optimizer, slot
from hf_lowmem.optim.slot import SMALLEST_COMPRESSED
from hf_lowmem.optim.state import COUNTS, number
from tests.conftest import Mixed

TABLE = list(itertools.product(OPTIMIZERS, [*CODECS, *PAIRS]))
whole_table = pytest.mark.parametrize(("name", "codec"), TABLE, ids=["-".join(t) for t in TABLE])
# What is settled before a codec is asked, or after, is tried without one and with the recommended pair.
BOTH = list(itertools.product(OPTIMIZERS, ("fp32", "8bit")))
two_codecs = pytest.mark.parametrize(("name", "codec"), BOTH)


def options(name: str) -> dict[str, Any]:
    """Settings at which a method has something to do on the small model."""
    defaults = OPTIMIZERS[name].DEFAULTS
    return {k: v for k, v in {"rank": 4, "update_gap": 3}.items() if defaults.get(k, 0) > v}


def decayed(name: str, p: torch.Tensor, lr: float, weight_decay: float) -> torch.Tensor:
    """What decay alone makes of a parameter: the same fraction is taken off each weight, LAMB's by its trust ratio."""
    if name != "lamb":
        return p * (1 - lr * weight_decay)
    dims = (-2, -1) if p.ndim == 3 else None
    norm = p.double().norm(dim=dims, keepdim=dims is not None)
    return (p * (1 - lr * norm.clamp(max=10) / norm)).to(p.dtype)


def make(name: str, codec: str, model: nn.Module, **kwargs: Any) -> LowMemOptimizer:
    settings: dict[str, Any] = {"lr": 0.01} | options(name) | kwargs
    return make_optimizer(name, model, state=codec, **settings)


def train(model: Mixed, optimizer: LowMemOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.loss(step % 3).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad and p.numel()]


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_bits(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@whole_table
def test_first_step_moves_every_weight_and_no_other(name: str, codec: str, mixed: Mixed) -> None:
    optimizer = make(name, codec, mixed)
    before = weights(mixed)
    train(mixed, optimizer, range(1))
    for (label, p), old in zip(mixed.named_parameters(), before, strict=True):
        if p.requires_grad and p.numel():
            assert not torch.equal(p, old), label
            assert p.isfinite().all(), label
        else:
            assert torch.equal(p, old), label


@pytest.mark.train
@whole_table
def test_descends(name: str, codec: str, mixed: Mixed) -> None:
    """At a rate with which each of them goes far: a length for Lion, a fraction for LAMB."""
    optimizer = make(name, codec, mixed, lr=0.8)
    first = mixed.loss().item()
    for _ in range(24):
        optimizer.zero_grad()
        mixed.loss().backward()
        optimizer.step()
    assert mixed.loss().item() < 0.5 * first


@two_codecs
def test_zero_gradients_move_weights_only_by_decay(name: str, codec: str, mixed: Mixed) -> None:
    optimizer = make(name, codec, mixed, lr=0.1, weight_decay=0.5)
    before = weights(mixed)
    for _ in range(2):
        for p in mixed.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    for (label, p), old in zip(mixed.named_parameters(), before, strict=True):
        decays = p.requires_grad and p.ndim >= 2
        expected = decayed(name, decayed(name, old, 0.1, 0.5), 0.1, 0.5) if decays else old
        # Three roundings of fp32; LAMB's norms are sums of squares of thousands of values.
        torch.testing.assert_close(p.detach(), expected, rtol=3e-6 if name == "lamb" else 3e-7, atol=0, msg=label)


@two_codecs
def test_step_is_a_loop_over_step_param(name: str, codec: str) -> None:
    one, other = Mixed(), Mixed()
    whole, single = make(name, codec, one), make(name, codec, other)
    for step in range(4):
        one.zero_grad()
        other.zero_grad()
        one.loss(step).backward()
        other.loss(step).backward()
        whole.step()
        for group in reversed(single.param_groups):  # the order is free
            for p in reversed(group["params"]):
                if p.grad is not None:
                    single.step_param(p, group)
    assert all(torch.equal(p, q) for p, q in zip(weights(one), weights(other), strict=True))


@whole_table
def test_state_bytes_are_the_codec_s_promise(name: str, codec: str, mixed: Mixed) -> None:
    optimizer = make(name, codec, mixed)
    train(mixed, optimizer, range(2))
    promised = sum(
        optimizer.state_bytes(p, group) for group in optimizer.param_groups for p in group["params"] if p.numel()
    )
    assert optimizer_bytes(optimizer) == promised
    for group in optimizer.param_groups:
        for p in group["params"]:
            small = p.numel() < SMALLEST_COMPRESSED
            pair = codec_pair("fp32" if small else codec)
            shapes = {k: s.shape for k, s in optimizer.slot(p, group).states.items() if s.decl.coded}
            stored = sum(
                v.nbytes
                for k, v in optimizer.state[p].items()
                if isinstance(v, torch.Tensor) and k.split(".")[0] in shapes
            )
            expected = sum(
                pair[0 if optimizer.STATES[k].signed else 1].nbytes(shape.numel(), signed=optimizer.STATES[k].signed)
                for k, shape in shapes.items()
            )
            assert stored == expected * bool(p.numel())


def check_that_a_resumed_run_is_uninterrupted(name: str, codec: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Through a file that is loaded with weights_only; the dtypes of the states, for whoever compares them.

    It is written in the middle of a projection's time, with one refresh before it and one after.
    """
    model = Mixed().to(dtype)
    optimizer = make(name, codec, model)
    train(model, optimizer, range(5))
    for state in optimizer.state.values():
        assert all(type(v) is torch.Tensor for v in state.values())
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, range(5, 9))

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again = Mixed().to(dtype)
    again.load_state_dict(saved["model"])
    resumed = make(name, codec, again)
    resumed.load_state_dict(saved["optimizer"])
    assert same_bits(resumed.state_dict(), saved["optimizer"]), "the load keeps every dtype and every bit"
    train(again, resumed, range(5, 9))
    assert all(torch.equal(p, q) for p, q in zip(weights(model), weights(again), strict=True))
    assert same_bits(resumed.state_dict(), optimizer.state_dict())
    assert all(p.dtype == dtype for p in again.parameters())
    return [{k: getattr(v, "dtype", type(v)) for k, v in s.items()} for s in resumed.state.values()]


@pytest.mark.train
@whole_table
def test_save_load_continue_is_uninterrupted(name: str, codec: str) -> None:
    """And states have the codec's dtypes, not the weights'."""
    wide, narrow = (check_that_a_resumed_run_is_uninterrupted(name, codec, t) for t in (torch.float32, torch.bfloat16))
    assert wide == narrow


@two_codecs
def test_save_load_continue_is_uninterrupted_with_fp16_weights(name: str, codec: str) -> None:
    check_that_a_resumed_run_is_uninterrupted(name, codec, torch.float16)


@two_codecs
def test_a_loaded_state_is_a_copy(name: str, codec: str) -> None:
    model = Mixed()
    optimizer = make(name, codec, model)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    again = Mixed()
    resumed = make(name, codec, again)
    resumed.load_state_dict(saved)
    train(again, resumed, range(2))
    assert same_bits(saved, kept)


@two_codecs
@pytest.mark.parametrize("when", [0, 3])
def test_bad_gradients_do_not_poison(name: str, codec: str, when: int, mixed: Mixed) -> None:
    """Each parameter's step is left out by itself, so the kinds of bad values are spread over them."""
    optimizer = make(name, codec, mixed)
    train(mixed, optimizer, range(when))
    before = weights(mixed)
    mixed.zero_grad()
    state = {p: copy.deepcopy(optimizer.state[p]) for p in trainable(mixed)}
    mixed.loss().backward()
    for p, bad in zip(trainable(mixed), itertools.cycle([float("nan"), float("inf"), -float("inf"), 3e38])):
        assert p.grad is not None
        p.grad[(-1,) * p.ndim] = bad
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(weights(mixed), before, strict=True)), "the step is left out"
    for p in trainable(mixed):
        for key, value in state[p].items():
            if key not in COUNTS:
                assert torch.equal(value, optimizer.state[p][key])
    train(mixed, optimizer, range(5))
    for p, old in zip(mixed.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert torch.equal(p, old) != (p.requires_grad and p.numel() > 0), "and training goes on"


@two_codecs
@pytest.mark.parametrize("when", [0, 3])
def test_the_path_without_a_host_sync_is_the_same(
    name: str, codec: str, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an asynchronous device a bad gradient is undone by selection; run that path here."""
    results = []
    for asynchronous in (False, True):
        model = Mixed()
        optimizer = make(name, codec, model)
        if asynchronous:
            monkeypatch.setattr(slot, "reads_are_free", lambda device: False)
        train(model, optimizer, range(when))
        optimizer.zero_grad()
        model.loss().backward()
        assert model.odd.grad is not None
        model.odd.grad[3, 3] = float("nan")
        optimizer.step()
        train(model, optimizer, range(3))
        values = [optimizer.state[p] for p in trainable(model) if p is not model.odd]
        results.append((weights(model), values))
    assert same_bits(*results)


# A codec is given tensors, whoever's they are: AdamW's two, a signed and an unsigned one, are both of its ways.
@pytest.mark.parametrize(
    ("name", "codec"), [*BOTH, *(case for case in TABLE if case[0] == "adamw" and case not in BOTH)]
)
def test_no_step_asks_the_device_for_a_number(name: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no numbers: `.item()`, `bool(tensor)` or a branch on one raises, refresh or not."""
    monkeypatch.setattr(slot, "reads_are_free", lambda device: False)
    for unsigned in (True, False):  # constant tables are real tensors, made once
        for part in codec_pair(codec):
            part.init(torch.zeros(4), signed=unsigned)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Sequential(nn.Linear(96, 48), nn.Linear(48, 80))
        optimizer = make(name, codec, model)
        for _ in range(4):  # until the second refresh
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert all(number(state["step"]) == 4 for state in optimizer.state.values())


@two_codecs
def test_learning_rate_of_a_schedule_is_obeyed(name: str, codec: str, mixed: Mixed) -> None:
    optimizer = make(name, codec, mixed, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.0, 0.5][step])
    moved = []
    for _ in range(3):
        before = weights(mixed)
        train(mixed, optimizer, range(1))
        moved.append(not all(torch.equal(p, q) for p, q in zip(weights(mixed), before, strict=True)))
        if len(moved) < 3:
            schedule.step()
    assert moved == [True, False, True]


@two_codecs
def test_betas_eps_and_weight_decay_have_their_effect(name: str, codec: str) -> None:
    results = []
    for kwargs in ({}, {"betas": (0.5, 0.999)}, {"betas": (0.9, 0.7)}, {"eps": 0.5}, {"weight_decay": 0.3}):
        if not kwargs.keys() <= {"weight_decay", *OPTIMIZERS[name].DEFAULTS}:
            continue
        model = Mixed()
        optimizer = make(name, codec, model, **kwargs)
        train(model, optimizer, range(4))
        results.append(what_moments_move(optimizer, model))
    for a, b in itertools.combinations(results, 2):
        assert (a - b).abs().max() > 1e-4


def what_moments_move(optimizer: LowMemOptimizer, model: Mixed) -> torch.Tensor:
    """A linear weight, if it has the moments that the method keeps; else every weight: some rules keep none of it."""
    group = next(g for g in optimizer.param_groups if any(p is model.linear.weight for p in g["params"]))
    moments = {"exp_avg", "exp_avg_sq"} & optimizer.STATES.keys()
    if moments <= optimizer.slot(model.linear.weight, group).states.keys():
        return model.linear.weight.detach().clone()
    return torch.cat([p.flatten() for p in weights(model)])


@two_codecs
def test_tied_parameters_are_updated_once(name: str, codec: str) -> None:
    tied, plain = Mixed(), Mixed()
    tied.register_parameter("again", tied.odd)
    results = []
    for model in (tied, plain):
        optimizer = make(name, codec, model)
        for step in range(3):
            optimizer.zero_grad()
            (model.odd * torch.arange(67.0) * (step + 1)).sum().backward()
            optimizer.step()
        results.append(model.odd.detach())
    assert torch.equal(*results)


@two_codecs
def test_a_parameter_without_a_gradient_is_left_alone(name: str, codec: str, mixed: Mixed) -> None:
    optimizer = make(name, codec, mixed, weight_decay=0.5)
    before = mixed.wide.weight.detach().clone()
    mixed.linear.weight.sum().backward()
    optimizer.step()
    assert torch.equal(mixed.wide.weight, before)
    assert mixed.wide.weight not in optimizer.state


@two_codecs
def test_deepcopy_and_pickle(name: str, codec: str, mixed: Mixed) -> None:
    optimizer = make(name, codec, mixed)
    train(mixed, optimizer, range(2))
    model_copy, copied = copy.deepcopy((mixed, optimizer))
    loaded_model, loaded = pickle.loads(pickle.dumps((mixed, optimizer)))
    for model, other in ((mixed, optimizer), (model_copy, copied), (loaded_model, loaded)):
        train(model, other, range(2, 5))
    for model in (model_copy, loaded_model):
        assert all(torch.equal(p, q) for p, q in zip(weights(mixed), weights(model), strict=True))


@two_codecs
def test_a_closure_is_called_with_gradients_on(name: str, codec: str, mixed: Mixed) -> None:
    optimizer = make(name, codec, mixed)

    def closure() -> float:
        optimizer.zero_grad()
        loss = mixed.loss()
        loss.backward()
        return loss.item()

    before = weights(mixed)
    assert optimizer.step(closure) > 0
    assert not torch.equal(before[1], weights(mixed)[1])


@two_codecs
def test_bare_parameters_and_groups_will_do(name: str, codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.Parameter(torch.randn(80, 60, generator=generator)) for _ in range(2))
    groups = [{"params": [a], "lr": 0.0}, {"params": [b], "weight_decay": 0.1}]
    optimizer = OPTIMIZERS[name](groups, lr=0.1, state=codec, **options(name))
    start = a.detach().clone(), b.detach().clone()
    (a.sum() + (b**2).sum()).backward()
    optimizer.step()
    assert torch.equal(a, start[0])
    assert not torch.equal(b, start[1])


@two_codecs
def test_sparse_gradients_are_refused(name: str, codec: str) -> None:
    embedding = nn.Embedding(100, 50, sparse=True)
    optimizer = OPTIMIZERS[name](embedding.parameters(), state=codec, **options(name))
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()


@two_codecs
def test_a_checkpoint_of_another_kind_is_refused(name: str, codec: str) -> None:
    model = Mixed()
    optimizer = make(name, codec, model)
    train(model, optimizer, range(1))
    other_name = next(n for n in OPTIMIZERS if n != name)
    other_codec = next(c for c in CODECS if codec_pair(c) != codec_pair(codec))
    for other, what in (
        (make(other_name, codec, Mixed()), "method"),
        (make(name, other_codec, Mixed()), "state"),
        (make(name, codec, Mixed(), seed=7), "seed"),
    ):
        with pytest.raises(ValueError, match=f"made with {what}="):
            other.load_state_dict(optimizer.state_dict())


@two_codecs
def test_a_checkpoint_of_torch_is_refused_by_what_it_lacks(name: str, codec: str, mixed: Mixed) -> None:
    optimizer = make(name, codec, mixed)
    theirs = torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups])
    mixed.loss().backward()
    theirs.step()
    with pytest.raises(ValueError, match=r"made without hf_lowmem.s optimizers.*Train on with that run.s own optim"):
        optimizer.load_state_dict(theirs.state_dict())
