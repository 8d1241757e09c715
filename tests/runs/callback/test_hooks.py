"""Which forward passes count, and that nothing goes on measuring whatever happens."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lowmem.memory import measure_saved, parameter_bytes
from hf_lowmem.training.callbacks import LowMemCallback
from tests.runs.callback.runs import (
    measuring,
    nothing_is_left,
    samplers,
    trainer_of,
)


class Boom(Trainer):
    where = "backward"
    times = 1

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.where == "forward" and self.times:
            self.times -= 1
            hook = model.model.norm.register_forward_hook(lambda *_: boom())
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                hook.remove()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.where == "backward" and self.times:
            self.times -= 1
            loss.register_hook(lambda grad: boom())  # type: ignore[union-attr]
        return loss


def boom() -> None:
    raise RuntimeError("CUDA out of memory. (pretended)")


@pytest.mark.train
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_exceptions_leave_nothing_measuring_and_the_next_training_measures(tmp_path, where):
    callback, expected = LowMemCallback(verbose=False), LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback, cls=Boom)
    trainer.where = where  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="pretended"):
        trainer.train()
    assert not measuring()
    assert ("saved" in callback.report) == (where == "backward")
    assert len(samplers()) == 1
    trainer.train()
    trainer_of(tmp_path, expected).train()
    assert callback.report["saved"] == expected.report["saved"]
    assert nothing_is_left(trainer.model)


@pytest.mark.train
def test_an_interrupted_forward_pass_measures_until_the_next_training(tmp_path):
    # torch runs `always_call` hooks after an Exception only, and KeyboardInterrupt is none.
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    callback, expected = LowMemCallback(verbose=False), LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback)
    hook = trainer.model.model.norm.register_forward_hook(interrupt)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hook.remove()
    assert measuring()
    trainer.train()
    trainer_of(tmp_path, expected).train()
    assert callback.report["saved"] == expected.report["saved"]
    assert nothing_is_left(trainer.model)


@pytest.mark.train
def test_auto_find_batch_size_reports_the_batch_size_it_found(tmp_path):
    callback, expected = LowMemCallback(verbose=False), LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback, cls=Boom, auto_find_batch_size=True)
    trainer.train()
    assert trainer._train_batch_size == 1
    trainer_of(tmp_path, expected, per_device_train_batch_size=1).train()
    assert callback.report["saved"] == expected.report["saved"]
    assert nothing_is_left(trainer.model)


@pytest.mark.train
def test_two_callbacks(tmp_path):
    a, b = LowMemCallback(verbose=False), LowMemCallback(every=1, verbose=False)
    trainer = trainer_of(tmp_path, a, b)
    trainer.train()
    assert a.report["saved"] == b.report["saved"] > 0
    assert a.report["saved_by_module"] == b.report["saved_by_module"]
    assert nothing_is_left(trainer.model)


@pytest.mark.train
def test_the_first_batch_is_not_kept_alive(tmp_path):
    batches: list[weakref.ref] = []
    alive: list[int] = []

    class Remembering(Trainer):
        def get_batch_samples(self, *args, **kwargs):
            samples, items = super().get_batch_samples(*args, **kwargs)
            batches.append(weakref.ref(samples[0]["input_ids"]))
            return samples, items

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            alive.append(sum(ref() is not None for ref in batches))

    trainer_of(tmp_path, LowMemCallback(verbose=False), Watch(), cls=Remembering, max_steps=4).train()
    assert alive == [1, 1, 1, 1]


class Recursive(nn.Module):
    """Calls itself, once under no_grad and once not, before it does its work."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: torch.Tensor, depth: int = 1) -> torch.Tensor:
        if depth:
            with torch.no_grad():
                self(x, depth - 1)
            x = x + self(x, depth - 1)
        return self.work(x)


@pytest.fixture
def by_hand(tmp_path):
    """Sends the events of one step without any trainer around."""
    trainer = trainer_of(tmp_path)
    args, state, control = trainer.args, copy.deepcopy(trainer.state), trainer.control

    def step(callback: LowMemCallback, model: nn.Module, forward: Any) -> dict[str, Any]:
        callback.on_step_begin(args, state, control, model=model)
        forward()
        state.global_step += 1
        callback.on_step_end(args, state, control, model=model)
        assert nothing_is_left(model)
        return callback.report

    return step


X = torch.linspace(-1, 1, 24).view(3, 8)


def test_a_forward_pass_within_one_is_part_of_it(by_hand):
    model = Recursive()
    with measure_saved(model) as saved:
        y = model(X)
    report = by_hand(LowMemCallback(), model, lambda: model(X))
    assert report["saved"] == saved.total == 4 * 4 * 3 * 8  # twice the linear's input and tanh's output
    assert report["saved_by_module"] == saved.by_module_now == {"work.0": 2 * 96, "work.1": 2 * 96}
    del y


def test_what_the_model_saves_itself_is_its_own(by_hand):
    class Squared(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).square()

    model = Squared(8, 8)
    assert by_hand(LowMemCallback(), model, lambda: model(X))["saved_by_module"] == {"Squared": 2 * 96}


@pytest.mark.parametrize("kind", ["no_grad", "inference_mode", "eval", "copy", "compiled"])
def test_other_forward_passes_do_not_count(by_hand, kind):
    model = Recursive()

    def forward() -> None:
        if kind in ("no_grad", "inference_mode"):
            with getattr(torch, kind)():
                model(X)
        elif kind == "eval":
            model.eval()(X)
        elif kind == "copy":  # it has the hooks, as a replica of DataParallel has
            copied = copy.deepcopy(model)
            assert copied._forward_hooks
            copied(X)
        else:
            torch.compile(model, backend="eager")(X)

    report = by_hand(LowMemCallback(), model, forward)
    assert report["weights"] == parameter_bytes(model)
    assert "saved" not in report


def test_a_pre_hook_that_raises_before_ours(by_hand):
    model = Recursive()

    def forward() -> None:
        handle = model.register_forward_pre_hook(lambda *_: boom(), prepend=True)
        with pytest.raises(RuntimeError, match="pretended"):
            model(X)
        handle.remove()
        model(X)

    assert by_hand(LowMemCallback(), model, forward)["saved"] == 4 * 4 * 3 * 8
