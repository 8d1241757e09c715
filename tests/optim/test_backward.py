"""Step in backward: the same bits as a step of its own, and no gradient that outlives its update."""

import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_lowmem import LowMemTrainer, LowMemTrainingArguments, make_optimizer
from hf_lowmem.optim import OPTIMIZERS, StepInBackward, slot
from tests.conftest import Mixed, tiny_llama
from tests.contracts.test_optimizers import options, same_bits, weights

CODECS = ("fp32", "8bit")
ACCUMULATING = [name for name, cls in OPTIMIZERS.items() if cls.ACCUMULATES]


def build(name: str, model: nn.Module, state: str = "8bit", **kwargs: Any) -> Any:
    return make_optimizer(name, model, state=state, lr=0.01, **options(name), **kwargs)


@pytest.mark.parametrize("state", CODECS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_the_step_itself(name: str, state: str) -> None:
    results = []
    for stepping in (False, True):
        model = Mixed()
        optimizer = build(name, model, state, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        attached = StepInBackward(optimizer) if stepping else None
        for step in range(7):
            model.loss(step % 3).backward()
            if attached:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        results.append((weights(model), optimizer.state_dict()))
    assert same_bits(*results)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_peak_of_gradients_is_one_parameter(name: str) -> None:
    model = tiny_llama(num_hidden_layers=3)
    optimizer = build(name, model)
    StepInBackward(optimizer)
    alive: list[list[torch.Tensor]] = []
    inner = optimizer.step_param

    def watch(p: torch.Tensor, group: dict[str, Any], **kwargs: Any) -> None:
        alive.append([q.grad for q in model.parameters() if q.grad is not None])
        inner(p, group, **kwargs)

    optimizer.step_param = watch
    ids = torch.arange(2, 34)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert [len(grads) for grads in alive] == [1] * len(list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_tied_weights_are_updated_once() -> None:
    results = []
    for stepping in (False, True):
        model = tiny_llama(tie_word_embeddings=True)
        optimizer = build("adamw", model)
        if stepping:
            StepInBackward(optimizer)
        for step in range(3):
            ids = torch.arange(2 + step, 34 + step)[None]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((weights(model), optimizer.state_dict()))
    assert same_bits(*results)


@pytest.mark.parametrize("name", ACCUMULATING)
def test_a_window_adds_up_projections(name: str) -> None:
    """Three backward passes are one of the summed loss, up to the order of fp32 sums, while the basis is the same."""
    runs = []
    for stepping in (False, True):
        model = Mixed()
        optimizer = build(name, model, "fp32")
        for step in range(2):  # the basis is made here, in the same way in both runs
            model.loss(step).backward()
            optimizer.step()
            optimizer.zero_grad()
        last = False
        if stepping:
            StepInBackward(optimizer, ready=lambda: last)  # noqa: B023 - the variable, not its value
        for micro in range(3):
            last = micro == 2
            (model.loss(micro) / 3).backward()
            kept = {n for n, p in model.named_parameters() if p.grad is not None}
            if stepping:
                assert "linear.weight" not in kept, "a projected gradient is freed in every pass"
                assert ("vector" in kept) != last, "any other is kept until its window ends"
        optimizer.step()
        optimizer.zero_grad()
        runs.append(model)
    for (label, p), q in zip(runs[0].named_parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=label)


@pytest.mark.parametrize("name", ACCUMULATING)
def test_a_window_that_begins_with_a_refresh_takes_its_first_gradient(name: str) -> None:
    model = Mixed()
    optimizer = build(name, model, "fp32")
    last = False
    StepInBackward(optimizer, ready=lambda: last)
    for micro in range(2):
        last = micro == 1
        model.loss(micro).backward()
        basis = optimizer.state[model.linear.weight]["basis"].clone()
        if micro == 0:
            first = basis
    assert torch.equal(first, basis)
    alone = Mixed()
    other = build(name, alone, "fp32")
    alone.loss(0).backward()
    other.step()
    assert torch.equal(other.state[alone.linear.weight]["basis"], first)


@pytest.mark.parametrize("name", ACCUMULATING)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_bad_gradient_inside_a_window_spoils_only_that_window(
    name: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mixed()
    optimizer = build(name, model)
    if asynchronous:
        monkeypatch.setattr(slot, "reads_are_free", lambda device: False)
    last = True
    StepInBackward(optimizer, ready=lambda: last)
    model.loss(0).backward()
    before = model.linear.weight.detach().clone()
    last = False
    (model.linear.weight * float("nan")).sum().backward()
    last = True
    model.loss(1).backward()
    assert torch.equal(model.linear.weight, before)
    model.loss(2).backward()
    assert model.linear.weight.isfinite().all()
    assert not torch.equal(model.linear.weight, before)


def test_the_norm_is_that_of_all_gradients() -> None:
    model, plain = Mixed(), Mixed()
    optimizer = build("adamw", model)
    attached = StepInBackward(optimizer)
    assert attached.grad_norm() is None
    model.loss().backward()
    optimizer.step()
    plain.loss().backward()
    want = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    assert attached.grad_norm() == pytest.approx(want.item(), rel=1e-6)  # another order of fp32 sums


def test_removed_it_is_a_plain_optimizer_again() -> None:
    model = Mixed()
    optimizer = build("adamw", model)
    StepInBackward(optimizer).remove()
    before = weights(model)
    model.loss().backward()
    assert all(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))
    assert model.linear.weight.grad is not None
    optimizer.step()
    assert not torch.equal(model.linear.weight, before[0])


def settings(tmp_path: Any, **kwargs: Any) -> LowMemTrainingArguments:
    common: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 6,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "lowmem_rank": 4,
        "lowmem_update_gap": 2,
        "lowmem_state": "8bit",
        "disable_tqdm": True,
    }
    return LowMemTrainingArguments(**(common | kwargs))


DATA = [{"input_ids": torch.arange(i, i + 16), "labels": torch.arange(i, i + 16)} for i in range(24)]


def run(args: LowMemTrainingArguments, resume: str | None = None) -> tuple[Any, list[float]]:
    trainer = LowMemTrainer(tiny_llama(), args, train_dataset=DATA)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


@pytest.mark.train
@pytest.mark.parametrize("name", ["apollo", "galore"])
def test_in_a_trainer_it_is_the_same_run(name: str, tmp_path: Any) -> None:
    """Same weights, same schedule, same logged norms."""
    plain, norms = run(settings(tmp_path, optim=name))
    stepping, others = run(settings(tmp_path, optim=name, lowmem_step_in_backward=True))
    assert all(torch.equal(p, q) for p, q in zip(weights(plain.model), weights(stepping.model), strict=True))
    assert others == pytest.approx(norms, rel=1e-5)  # another order of fp32 sums
    assert len(set(norms)) == 6


@pytest.mark.train
def test_in_a_trainer_a_killed_run_resumes_to_the_same_bits(tmp_path: Any) -> None:
    common = {"optim": "galore", "lowmem_step_in_backward": True, "gradient_accumulation_steps": 2, "max_steps": 8}
    whole, _ = run(settings(tmp_path / "whole", **common))
    run(settings(tmp_path / "part", **common, save_strategy="steps", save_steps=5))
    again, _ = run(settings(tmp_path / "part", **common), resume=str(tmp_path / "part" / "checkpoint-5"))
    assert all(torch.equal(p, q) for p, q in zip(weights(whole.model), weights(again.model), strict=True))


@pytest.mark.train
def test_in_a_trainer_accumulation_is_that_of_whole_gradients(tmp_path: Any) -> None:
    """Up to fp32's rounding of sums while the basis is one and the same: with `random` it comes from a seed."""
    common = {
        "optim": "galore",
        "lowmem_projection": "random",
        "gradient_accumulation_steps": 3,
        "lowmem_state": "fp32",
    }
    plain, _ = run(settings(tmp_path, **common))
    stepping, _ = run(settings(tmp_path, **common, lowmem_step_in_backward=True))
    for p, q in zip(weights(plain.model), weights(stepping.model), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_its_state_is_the_plain_optimizer_s() -> None:
    model = Mixed()
    optimizer = build("galore", model)
    StepInBackward(optimizer)
    model.loss().backward()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    plain = Mixed()
    other = build("galore", plain)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same_bits(other.state_dict(), optimizer.state_dict())


class Shared(nn.Module):
    """One layer that runs three times, each inside of a checkpoint."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.reentrant = nn.Linear(8, 8), reentrant

    def loss(self) -> torch.Tensor:
        x = torch.linspace(-1, 1, 32).view(4, 8).requires_grad_()
        for _ in range(3):
            x = checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=self.reentrant)
        return x.square().sum()


def test_a_second_update_within_a_step_is_told_once() -> None:
    """Each is an update by a part of the gradient: two of Adam's steps, where their sum would make one."""
    for model, passes, told in ((Shared(True), 1, 1), (Shared(False), 1, 0), (Shared(False), 2, 1)):
        optimizer = build("adamw", model)
        attached = StepInBackward(optimizer)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                for _ in range(passes):
                    model.loss().backward()
                optimizer.step()
        assert len([w for w in said if "not the update of their sum" in str(w.message)]) == told
        attached.remove()


def test_a_step_that_was_cut_off_is_no_first_update() -> None:
    model = Shared(False)
    attached = StepInBackward(build("adamw", model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model.loss().backward()
            attached.forget()
