"""Gradients of several backward passes, added up in int8: unbiased, and the step is that of the decoded sum."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem import make_optimizer
from hf_lowmem.optim import OPTIMIZERS, StepInBackward, accumulator
from hf_lowmem.optim.state import ADDED, WINDOW
from hf_lowmem.weights import int8
from tests.conftest import Mixed
from tests.contracts.test_optimizers import options, same_bits, weights
from tests.weights.test_rest import llama, loss_of

SUMS = "int8_sr"


class Wide(nn.Module):
    """Matrices that are added up in int8, and a vector that keeps its gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 96, dtype=dtype)
        self.second = nn.Linear(96, 64, bias=False, dtype=dtype)
        self.spare = nn.Linear(64, 64, bias=False, dtype=dtype)

    def loss(self, seed: int, spare: bool = True) -> Tensor:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)).to(self.first.weight.dtype)
        y = self.second(self.first(x).tanh())
        return (y + self.spare(x) if spare else y).square().mean()


class Window:
    """An optimizer with step in backward, and which pass is the last."""

    def __init__(self, name: str, model: Any, state: str = "8bit", **kwargs: Any) -> None:
        self.model, self.last = model, True
        self.optimizer = make_optimizer(name, model, state=state, lr=0.01, **options(name), **kwargs)
        self.stepping = StepInBackward(self.optimizer, ready=lambda: self.last, accumulation=SUMS)

    def run(self, losses: Any) -> None:
        for i, loss in enumerate(losses):
            self.last = i == len(losses) - 1
            loss().backward()
        self.optimizer.step()


def sums_of(window: Window) -> dict[str, Tensor]:
    """The decoded sum of each parameter that has one, the gradients of the others that wait."""
    found = {}
    for name, p in window.model.named_parameters():
        raw = dict(window.optimizer.state.get(p, {}))
        if accumulator.is_open(raw):
            spare = nn.Parameter(torch.empty(p.shape))
            accumulator.take(spare, raw)
            assert spare.grad is not None
            found[name] = spare.grad
        elif p.grad is not None:
            found[name] = p.grad.clone()
    return found


@pytest.mark.train
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_window_makes_the_step_of_the_decoded_sum(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, two windows in a row; what adds up projections still does."""
    model = Wide(dtype)
    window = Window(name, model)
    exact = OPTIMIZERS[name].ACCUMULATES
    twin = Wide(dtype)
    plain = make_optimizer(name, twin, state="8bit", lr=0.01, **options(name))
    for step in range(2):
        window.last = False
        for micro in range(2):
            model.loss(10 * step + micro).backward()
        sums = sums_of(window)
        free = {n for n, p in model.named_parameters() if p.grad is None}
        assert free == {"first.weight", "second.weight", "spare.weight"}
        assert (sums.keys() == {"first.bias"}) == exact
        twin.loss(10 * step + 2).backward()
        if exact:
            return
        for n, p in twin.named_parameters():
            assert p.grad is not None
            p.grad = (sums[n].float() + p.grad.float()).to(dtype)
        plain.step()
        plain.zero_grad()
        window.last = True
        model.loss(10 * step + 2).backward()
        window.optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        assert same_bits(weights(model), weights(twin))


def test_a_window_of_one_pass_is_no_accumulation() -> None:
    found = []
    for sums in (None, SUMS):
        model = Wide()
        optimizer = make_optimizer("adamw", model, state="8bit", lr=0.01)
        StepInBackward(optimizer, ready=(lambda: True) if sums else None, accumulation=sums)
        for step in range(3):
            model.loss(step).backward()
            optimizer.step()
        found.append((weights(model), optimizer.state_dict()))
    assert same_bits(*found)


def one(values: int = 8192) -> tuple[Any, nn.Parameter, Any]:
    """A parameter, its optimizer and the slot of its state."""
    p = nn.Parameter(torch.zeros(values))
    optimizer = OPTIMIZERS["lion"]([("p", p)])
    slot = optimizer.slot(p, optimizer.param_groups[0])
    slot.open(optimizer.state[p])
    return optimizer, p, slot


def added(grads: list[Tensor], seed: int = 0) -> Tensor:
    p = nn.Parameter(torch.zeros(grads[0].shape))
    optimizer = OPTIMIZERS["lion"]([("p", p)], seed=seed)
    slot = optimizer.slot(p, optimizer.param_groups[0])
    slot.open(optimizer.state[p])
    for grad in grads:
        accumulator.add(grad, slot)
    accumulator.take(p, optimizer.state[p])
    assert p.grad is not None
    return p.grad


def test_the_mean_of_many_sums_is_the_sum() -> None:
    """Within five standard errors: of the whole along each of three gradients of very different size, the second of
    which rounding to the nearest would lose beside the first; and of each value, by the most that it can vary."""
    torch.manual_seed(0)
    grads = torch.stack([torch.randn(4096) * size for size in (1.0, 1e-3, 0.3)]).double()
    draws = torch.stack([added(list(grads.float()), seed) for seed in range(200)]).double() - grads.sum(0)
    along = draws @ grads.T
    assert (along.mean(0).abs() <= 5 * along.std(0) / 200**0.5).all()
    step = grads.sum(0).abs().view(-1, 128).amax(1).repeat_interleave(128) * 1.5 / 127  # of a code, at most
    assert (draws.mean(0).abs() <= 5 * step * (3 / 4 / 200) ** 0.5).all()


def test_the_error_is_the_one_that_is_stated() -> None:
    """0.9 % of a value's standard deviation a rounding; k passes round k - 1 times here k times, none being last."""
    torch.manual_seed(0)
    for passes in (1, 4, 16):
        grads = [torch.randn(1 << 15) for _ in range(passes)]
        truth = torch.stack(grads).sum(0)
        relative = ((added(grads) - truth).norm() / truth.norm()).item()
        assert relative == pytest.approx(0.009 * ((passes + 1) / 2) ** 0.5, rel=0.1)


@pytest.mark.parametrize("first", [torch.randn(4096), torch.zeros(4096), torch.full((4096,), -3e-30)])
def test_gradients_of_zero_add_nothing(first: Tensor) -> None:
    optimizer, p, slot = one(4096)
    accumulator.add(first, slot)
    raw = optimizer.state[p]
    before = [raw[name].clone() for name in (accumulator.CODES, accumulator.SCALE)]
    for _ in range(50):
        accumulator.add(torch.zeros(4096), slot)
    after = [raw[name] for name in (accumulator.CODES, accumulator.SCALE)]
    assert all(map(torch.equal, before, after))
    assert raw[ADDED] == 51


def test_what_is_added_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    grads = [torch.randn(64, 128) for _ in range(3)]
    whole = added(grads)
    monkeypatch.setattr("hf_lowmem.kernels.spans.CPU_SPAN_PER_THREAD", 1024)
    assert torch.equal(added(grads), whole)
    turned = [g.T.contiguous().T for g in grads]
    assert torch.equal(added(turned), whole)


def test_it_takes_a_byte_a_parameter() -> None:
    window = Window("adamw", Wide())
    window.last = False
    window.model.loss(0).backward()
    for p in window.model.parameters():
        raw = window.optimizer.state.get(p, {})
        held = sum(t.nbytes for k, t in raw.items() if k in (accumulator.CODES, accumulator.SCALE))
        assert held == (accumulator.nbytes(p.numel()) or 0)
        assert held == (0 if p.ndim == 1 else p.numel() * 33 // 32)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", ["adamw", "apollo", "galore"])
def test_a_run_saved_inside_a_window_resumes_to_the_same_bits(name: str, steps: int) -> None:
    """Also inside of the first, before there is a moment."""
    found = []
    for resumed in (False, True):
        window = Window(name, Wide())
        for step in range(steps):
            window.run([lambda s=step, m=m: window.model.loss(7 * s + m) for m in range(3)])  # noqa: B023
        window.last = False
        for micro in range(2):
            window.model.loss(100 + micro).backward()
        if resumed:
            buffer = io.BytesIO()
            torch.save((window.model.state_dict(), window.optimizer.state_dict()), buffer)
            kept = {n: p.grad for n, p in window.model.named_parameters()}  # of vectors: nobody saves gradients
            buffer.seek(0)
            weights_, state = torch.load(buffer, weights_only=True)
            window = Window(name, Wide())
            window.model.load_state_dict(weights_)
            window.optimizer.load_state_dict(state)
            for n, p in window.model.named_parameters():
                p.grad = kept[n]
        window.last = False
        window.model.loss(102).backward()
        window.last = True
        window.model.loss(103).backward()
        window.optimizer.step()
        found.append((weights(window.model), window.optimizer.state_dict()))
    assert same_bits(*found)


def test_after_a_step_nothing_is_left() -> None:
    window = Window("adamw", Wide())
    window.run([lambda s=s: window.model.loss(s) for s in range(3)])
    assert all("step" in raw for raw in window.optimizer.state.values())
    names = {name.split(".")[0] for raw in window.optimizer.state.values() for name in raw}
    assert names == {"step", "key", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_what_the_last_pass_does_not_reach_is_stepped_all_the_same(name: str) -> None:
    """As an expert that saw tokens in the first pass alone."""
    window = Window(name, Wide(), state="fp32")
    before = window.model.spare.weight.detach().clone()
    window.last = False
    window.model.loss(0).backward()
    window.last = True
    window.model.loss(1, spare=False).backward()
    assert torch.equal(window.model.spare.weight, before)
    window.optimizer.step()
    assert not torch.equal(window.model.spare.weight, before)
    assert window.model.spare.weight.grad is None
    for raw in window.optimizer.state.values():
        assert ADDED not in raw
        assert WINDOW not in raw


@pytest.mark.parametrize("name", ["adamw", "galore"])
@pytest.mark.parametrize("by", ["optimizer", "model", "zeros", "wrapper"])
def test_zero_grad_drops_what_was_added_up(name: str, by: str) -> None:
    """The optimizer's or the model's, to None or to zeros: sums in int8, and galore's of projections."""
    found = []
    for dropped in (False, True):
        window = Window(name, Wide(), state="fp32", **({"projection": "random"} if name == "galore" else {}))
        if dropped:
            window.last = False
            window.model.loss(99).backward()
            if by == "optimizer":
                window.optimizer.zero_grad()
            else:
                model = nn.Sequential(window.model) if by == "wrapper" else window.model
                model.zero_grad(set_to_none=by != "zeros")
            assert not any(accumulator.is_open(raw) or WINDOW in raw for raw in window.optimizer.state.values())
        window.run([lambda s=s, w=window: w.model.loss(s) for s in range(2)])
        found.append(weights(window.model))
    assert same_bits(*found)


def test_zero_grad_of_another_model_or_a_part_leaves_the_sums() -> None:
    window = Window("adamw", Wide())
    window.last = False
    window.model.loss(0).backward()
    Wide().zero_grad()
    window.model.second.zero_grad()
    opened = [n for n, p in window.model.named_parameters() if accumulator.is_open(window.optimizer.state.get(p))]
    assert opened == ["first.weight", "spare.weight"]


def test_a_bad_gradient_spoils_only_its_window() -> None:
    window = Window("adamw", Wide())
    before = weights(copy.deepcopy(window.model))
    window.run(
        [lambda: window.model.loss(0) * float("inf"), lambda: window.model.loss(1), lambda: window.model.loss(2)]
    )
    assert same_bits(weights(window.model), before)
    assert window.optimizer.skipped().steps == 1
    window.run([lambda: window.model.loss(3), lambda: window.model.loss(4)])
    assert all(p.isfinite().all() for p in weights(window.model))
    assert not same_bits(weights(window.model), before)
    assert window.optimizer.skipped().in_a_row == 0


def test_the_norm_is_that_of_the_sum() -> None:
    window, plain = Window("adamw", Wide()), Wide()
    window.run([lambda s=s: window.model.loss(s) for s in range(4)])
    for s in range(4):
        plain.loss(s).backward()
    want = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    assert window.stepping.grad_norm() == pytest.approx(want.item(), rel=0.01)


@pytest.mark.parametrize("name", ["adamw", "apollo_mini"])
def test_weights_at_rest_take_the_step_of_the_sum(name: str) -> None:
    model, twin = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    window = Window(name, model, weights="int8_sr")
    plain = make_optimizer(name, twin, state="8bit", lr=0.01, weights="int8_sr", **options(name))
    window.last = False
    loss_of(model).backward()
    sums = sums_of(window)
    window.last = True
    loss_of(model).backward()
    window.optimizer.step()
    loss_of(twin).backward()
    groups = {id(p): group for group in plain.param_groups for p in group["params"]}
    for n, p in twin.named_parameters():
        p.grad = (sums[n].float() + p.grad.float()).bfloat16()
        plain.step_param(p, groups[id(p)])
        p.grad = None
    assert same_bits(dict(model.state_dict()), dict(twin.state_dict()))


def test_an_output_head_comes_whole_within_a_window() -> None:
    window = Window("adamw", Wide())
    head = window.model.second.weight
    assert window.stepping.whole_now(head) is None
    window.last = False
    assert window.stepping.whole_now(head) is not None
    window.model.loss(0).backward()
    window.last = True
    assert "accumulated" in str(window.stepping.whole_now(head))
    window.model.loss(1).backward()
    assert window.stepping.whole_now(head) is None


def test_a_sum_that_nobody_takes_is_an_error() -> None:
    window = Window("adamw", Wide())
    window.last = False
    window.model.loss(0).backward()
    window.stepping.remove()
    with pytest.raises(RuntimeError, match=r"not ended.*StepInBackward.*zero_grad"):
        window.optimizer.step()
    StepInBackward(window.optimizer)  # takes what is there
    before = window.model.first.weight.detach().clone()
    window.optimizer.step()
    assert not torch.equal(window.model.first.weight, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"accumulation": "int8_sr"}, "no effect without `ready`"),
        ({"accumulation": "int8", "ready": lambda: True}, "int8_sr"),
        ({"ready": lambda: True}, "accumulation='int8_sr'"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any], words: str) -> None:
    optimizer = make_optimizer("adamw", Wide())
    with pytest.raises(ValueError, match=words):
        StepInBackward(optimizer, **arguments)


def test_shards_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make_optimizer("adamw", Wide())
    monkeypatch.setattr("hf_lowmem.optim.backward.is_sharded", lambda p: True)
    with pytest.raises(ValueError, match=r"accumulation='int8_sr' cannot be combined with FSDP2.*last backward pass"):
        StepInBackward(optimizer, ready=lambda: True, accumulation=SUMS)
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in optimizer.param_groups[0]["params"])


def test_parameters_of_odd_sizes_keep_their_gradients() -> None:
    assert [accumulator.nbytes(n) for n in (4095, 4096 + 16, 4096, 4096 + 32)] == [None, None, 4224, 4128 + 4 * 129]
    window = Window("adamw", Mixed())
    window.last = False
    window.model.loss().backward()
    assert {n for n, p in window.model.named_parameters() if p.grad is not None}
    assert int8.group_of(torch.Size([4128])) == 32
