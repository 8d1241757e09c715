"""Measuring changes nothing: results are bit-equal, errors stay errors, other hooks stay in force, none is left."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from hf_lowmem.memory import measure_saved
from tests.memory.models import llama, llama_step, mlp, mlp_step


def gradients(model: nn.Module, step: Callable[[], Tensor], measured: bool) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    if measured:
        with measure_saved(model) as saved:
            loss = step()
            loss.backward()
        assert saved.peak > 0
    else:
        loss = step()
        loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def checkpointed_llama() -> nn.Module:
    model = llama(attention_dropout=0.1)
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize(
    ("make", "step"),
    [(mlp, mlp_step), (lambda: llama(attention_dropout=0.1), llama_step), (checkpointed_llama, llama_step)],
    ids=["mlp", "llama", "checkpointed llama"],
)
def test_gradients_are_bit_equal(make, step):
    model = make()
    loss, grads = gradients(model, step(model), measured=False)
    measured_loss, measured_grads = gradients(model, step(model), measured=True)
    assert torch.equal(loss, measured_loss)
    assert len(grads) == len(measured_grads) > 0
    assert all(torch.equal(a, b) for a, b in zip(grads, measured_grads, strict=True))


def test_double_backward_is_bit_equal():
    x, w = torch.randn(5, requires_grad=True), nn.Parameter(torch.randn(5))

    def second() -> Tensor:
        y = (torch.tanh(x * w) * w).sum()
        (first,) = torch.autograd.grad(y, w, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    plain = second()
    with measure_saved():
        assert torch.equal(second(), plain)


def test_nothing_is_copied():
    x = torch.randn(10, requires_grad=True)
    with measure_saved():
        y = (x * 1).sin()
        saved = y.grad_fn._saved_self  # type: ignore[union-attr]
        z = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert saved.grad_fn is z
    again = y.grad_fn._saved_self  # type: ignore[union-attr]
    assert again.data_ptr() == saved.data_ptr()


def test_saving_an_output_makes_no_reference_cycle():
    gc.collect()
    gc.disable()
    try:
        with measure_saved() as saved:
            y = torch.randn(10, requires_grad=True).exp()
            assert saved.total == 40
            del y
            assert saved.total == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("leaf", [True, False])
def test_in_place_change_is_still_an_error(leaf):
    x = torch.ones(3, requires_grad=True)
    with measure_saved():
        kept = torch.ones(3) if leaf else x.exp()
        y = (kept * x).sum()
        kept.detach().add_(1)
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation.*is at version 1; expected version 0"
        ):
            y.backward()


def test_in_place_operations_that_are_allowed():
    x = torch.randn(10, requires_grad=True)

    def step() -> Tensor:
        return torch.autograd.grad((x * 2).tanh_().sum(), x)[0]

    plain = step()
    with measure_saved() as saved:
        assert torch.equal(step(), plain)
    assert saved.peak == 40


def test_backward_after_the_context():
    model = mlp().eval()
    loss, plain = gradients(model, mlp_step(model), measured=False)
    model.zero_grad()
    with measure_saved(model):
        loss = mlp_step(model)()
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True) if p.grad is not None)


def test_retained_graph_and_its_second_backward():
    x = torch.randn(10, requires_grad=True)
    with measure_saved() as saved:
        y = x.exp().sum()
        y.backward(retain_graph=True)
        assert saved.total == 40
        y.backward()
        assert saved.total == 0
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach().exp())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_custom_function():
    x = torch.randn(10, requires_grad=True)
    with measure_saved() as saved:
        y = Square.apply(x)
        assert saved.total == 40
        y.sum().backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach())


def halve(t: Tensor) -> tuple[Tensor, torch.dtype]:
    return t.detach().to(torch.bfloat16), t.dtype


def restore(packed: tuple[Tensor, torch.dtype]) -> Tensor:
    return packed[0].to(packed[1])


@pytest.mark.parametrize("inside", [True, False])
def test_other_hooks_stay_in_force_and_what_they_keep_is_counted(inside):
    x = torch.randn(1000, requires_grad=True)

    def kept_by(pack_outside: bool) -> tuple[int, Tensor]:
        if pack_outside:
            with saved_tensors_hooks(halve, restore), measure_saved() as saved:
                y = x.sin()
        else:
            with measure_saved() as saved, saved_tensors_hooks(halve, restore):
                y = x.sin()
        total = saved.total
        return total, torch.autograd.grad(y.sum(), x)[0]

    total, grad = kept_by(not inside)
    assert total == 2000
    with saved_tensors_hooks(halve, restore):
        expected = torch.autograd.grad(x.sin().sum(), x)[0]
    assert torch.equal(grad, expected)


def test_save_on_cpu_inside():
    x = torch.randn(1000, requires_grad=True)
    with measure_saved() as saved, save_on_cpu():
        y = x.exp()
    assert saved.total == 4000
    del y


def test_hooks_that_keep_no_tensor_in_the_graph_count_nothing():
    x, shelf = torch.randn(1000, requires_grad=True), []

    def shelve(t: Tensor) -> int:
        shelf.append(t.detach())
        return len(shelf) - 1

    with measure_saved() as saved, saved_tensors_hooks(shelve, lambda i: shelf[i]):
        x.sin().sum().backward()
    assert saved.peak == 0
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().cos())


def test_measuring_inside_measuring():
    x = torch.randn(10, requires_grad=True)
    with measure_saved() as outer:
        a = x.exp()
        with measure_saved() as inner, saved_tensors_hooks(halve, restore):
            b = x.exp()
        with measure_saved() as plain:
            c = x.exp()
        torch.stack([a, b, c]).sum().backward()
    assert (inner.total, plain.total) == (20, 40)
    assert outer.peak == 40 + 20 + 40
    assert outer.total == 0


def test_exception_removes_every_hook():
    enter = saved_tensors_hooks.__enter__

    class Boom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("boom")

    model = nn.Sequential(nn.Linear(8, 8), Boom())
    with pytest.raises(KeyError, match="boom"), measure_saved(model) as saved:
        model(torch.randn(3, 8))
    assert saved.peak == 3 * 8 * 4
    assert saved_tensors_hooks.__enter__ is enter
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # pyright: ignore
    hooks = nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
