"""The norm test: its ratio against gradients that were kept, the growth of a run's windows, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_lowmem import LowMemTrainer, LowMemTrainingArguments
from hf_lowmem.training.batch_growth import NormTestCallback
from tests.conftest import tiny_llama
from tests.training.test_trainers import token_data

CONSTANT: dict[str, Any] = {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "max_grad_norm": 0.1}


def trainer_of(folder: Path, rows: int, *callbacks: TrainerCallback, **fields: Any) -> LowMemTrainer:
    args = LowMemTrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=1, **{"gradient_accumulation_steps": 2, **CONSTANT, **fields},
    )  # fmt: skip
    return LowMemTrainer(tiny_llama(), args, train_dataset=token_data(rows), callbacks=list(callbacks))


class Kept(TrainerCallback):
    """Every micro-batch's gradient of a step, kept, as no run would."""

    def __init__(self) -> None:
        self.sums: list[list[torch.Tensor]] = [[]]

    def look(self, model: Any) -> None:
        grads = [p.grad.detach().flatten().double() for p in model.parameters() if p.grad is not None]
        self.sums[-1].append(torch.cat(grads))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sums.append([])


@pytest.mark.train
def test_the_ratio_is_that_of_kept_gradients(tmp_path: Path) -> None:
    kept, test = Kept(), NormTestCallback(eta=1e9)
    trainer = trainer_of(
        tmp_path, 8, kept, test, gradient_accumulation_steps=4, num_train_epochs=1, max_grad_norm=0, optim="adamw"
    )
    trainer.train()
    assert [(step, micro) for step, micro, _ in test.tests] == [(1, 4), (2, 4)]
    for sums, (_, _, ratio) in zip(kept.sums, test.tests, strict=False):
        estimates = [4 * (after - before) for before, after in zip([0 * sums[0], *sums], sums, strict=False)]
        mean = torch.stack(estimates).mean(0)
        variance = sum(float((e - mean).square().sum()) for e in estimates) / 3 / 4
        assert ratio == pytest.approx((variance / float(mean.square().sum())) ** 0.5, rel=1e-3)


@pytest.mark.train
def test_a_noisy_gradient_doubles_the_batch_up_to_its_bound(tmp_path: Path) -> None:
    test = NormTestCallback(eta=1e-6, max_accumulation=8)
    trainer = trainer_of(tmp_path, 24, test, num_train_epochs=2, optim="adamw")
    trainer.train()
    # It may double where the epoch's micro-batches so far are a multiple: after 4 and after 8.
    assert [micro for _, micro, _ in test.tests] == [2, 2, 4, 8, 8, 8, 8, 8]
    assert trainer.state.global_step == 8
    assert trainer.args.gradient_accumulation_steps == 2
    assert not any(p._backward_hooks for p in trainer.model.parameters())


@pytest.mark.train
def test_a_step_of_a_grown_window_is_the_step_of_that_batch(tmp_path: Path) -> None:
    """All weights as after a run whose accumulation was 4 from the start, once the learning rate is there."""
    grown = NormTestCallback(eta=1e-6, max_accumulation=4)
    one = trainer_of(tmp_path / "1", 8, grown, num_train_epochs=1, optim="sgd", learning_rate=0.0, max_grad_norm=0)

    class Start(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.gradient_accumulation_steps == 4:
                kwargs["optimizer"].param_groups[0]["lr"] = kwargs["optimizer"].param_groups[1]["lr"] = 0.1

    one.add_callback(Start())
    one.train()
    two = trainer_of(
        tmp_path / "2", 8, Start(), num_train_epochs=1, optim="sgd", learning_rate=0.0, gradient_accumulation_steps=4,
        max_grad_norm=0,
    )  # fmt: skip
    two.train()
    assert [micro for _, micro, _ in grown.tests] == [2, 2, 4]
    assert not torch.equal(next(one.model.parameters()), next(tiny_llama().parameters()))
    assert all(map(torch.equal, one.model.parameters(), two.model.parameters()))


def test_bounds_that_cannot_be_are_refused() -> None:
    cases: list[dict[str, Any]] = [{"eta": 0}, {"eta": float("nan")}, {"eta": 0.5, "max_accumulation": 1}]
    for wrong in cases:
        with pytest.raises(ValueError, match=r"eta|max_accumulation"):
            NormTestCallback(**wrong)


@pytest.mark.train
@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1.*Set it to 2"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine'.*'constant'"),
        (
            {
                "lowmem_schedule": "power",
                "lr_scheduler_type": "linear",
                "lr_scheduler_kwargs": {"tokens_per_step": 64, "a": 0.01},
            },
            "linear",
        ),
        (
            {"optim": "galore", "lowmem_rank": 4, "lowmem_step_in_backward": True, "max_grad_norm": 0},
            "step_in_backward",
        ),
        ({"optim": "mezo", "max_grad_norm": 0}, "optim='mezo'"),
    ],
)
def test_what_hides_gradients_or_counts_steps_is_refused(fields: dict[str, Any], what: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 4, NormTestCallback(eta=0.5), max_steps=2, **fields)
    with pytest.raises(ValueError, match=rf"NormTestCallback cannot be combined with .*{what}"):
        trainer.train()
