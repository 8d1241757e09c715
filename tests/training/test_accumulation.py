"""Gradient accumulation with step in backward, for every trainer and loop: nearly the run that whole gradients make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from hf_lowmem import LowMemPlugin, LowMemTrainer, LowMemTrainingArguments, make_optimizer
from hf_lowmem.optim import StepInBackward, accumulator
from hf_lowmem.optim.state import ADDED
from hf_lowmem.weights import resting
from tests.conftest import tiny_llama
from tests.contracts.test_optimizers import same_bits
from tests.training.heads import norms, train
from tests.training.test_plugin import batches, loop, scheduled
from tests.training.test_trainers import losses, settings, token_data

PASSES = 3
STEPPING: dict[str, Any] = {"optim": "adamw", "max_grad_norm": 0.0, "gradient_accumulation_steps": PASSES}
WINDOWS = (3, 3, 2, 3)  # of eight batches an epoch
SUMS = {"lowmem_step_in_backward": True, "lowmem_accumulation": "int8_sr"}
CLOSE = 0.15  # of the way that a run has gone; one that drops a pass, or counts one twice, is three times as far off


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients a sum had when one was added."""
    found: list[int] = []
    add = accumulator.add

    def counting(grad: torch.Tensor, slot: Any) -> None:
        add(grad, slot)
        found.append(int(slot.raw[ADDED]))

    monkeypatch.setattr(accumulator, "add", counting)
    return found


def apart(model: Any, other: Any, start: Any) -> float:
    """Distance of two models, as a part of the way from the start."""
    flat = [torch.cat([p.detach().float().flatten() for p in m.parameters()]) for m in (model, other, start)]
    return ((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm()).item()


@pytest.mark.train
@pytest.mark.parametrize(
    ("loss", "optim"),
    [("nll", "adamw"), ("asft", "adamw"), ("nll", "scale"), ("nll", "galore"), ("nll", "apollo_mini")],
)
def test_a_run_goes_where_whole_gradients_take_it(loss: str, optim: str, counted: list[int], tmp_path: Path) -> None:
    own = {"lowmem_rank": 8, "lowmem_projection": "random"} if optim == "galore" else {}
    fields = STEPPING | own | {"optim": optim, "loss_type": loss, "learning_rate": 1e-3, "dtype": torch.float32}
    plain = train(tmp_path, **fields)
    assert not counted
    ours = train(tmp_path, **fields, **SUMS)
    # Of galore's linear weights the projections are added up, which leaves embedding and head.
    coded = 2 if optim == "galore" else sum(p.numel() >= 4096 for p in ours.model.parameters())
    assert counted == [n for passes in WINDOWS for n in range(1, passes) for _ in range(coded)]
    assert apart(ours.model, plain.model, tiny_llama()) < CLOSE
    if optim != "galore":  # which does not know the norm of a sum that it has projected
        assert norms(ours) == pytest.approx(norms(plain), rel=0.05)
    assert losses(ours) == pytest.approx(losses(plain), rel=0.02)
    assert "accumulated" in ours.output_head.facts()["why"]


@pytest.mark.train
def test_weights_at_rest_are_trained_on_sums(counted: list[int], tmp_path: Path) -> None:
    """Beside whole gradients of weights in bf16: what differs is the rounding of both."""
    fields = STEPPING | {"optim": "apollo_mini", "learning_rate": 1e-3}
    plain = train(tmp_path, **fields, lowmem_weights="bf16_sr")
    ours = train(tmp_path, **fields, **SUMS, lowmem_weights="int8_sr")
    assert len(resting(ours.model)) == 1 + 7 * len(ours.model.model.layers)
    assert len(counted) == 7 * sum(p.numel() >= 4096 for p in ours.model.parameters())
    assert losses(ours) == pytest.approx(losses(plain), rel=0.02)
    assert norms(ours) == pytest.approx(norms(plain), rel=0.1)


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.open = 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.open += sum(accumulator.is_open(raw) for raw in kwargs["optimizer"].state.values())


@pytest.mark.train
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Checkpoints fall between windows: nothing is open in them."""
    common = STEPPING | SUMS | {"lowmem_state": "8bit", "max_steps": 5}

    def run(folder: str, resume: str | None = None, **more: Any) -> tuple[Any, Watch]:
        watch = Watch()
        args = settings(LowMemTrainingArguments, tmp_path / folder, **common, **more)
        trainer = LowMemTrainer(tiny_llama(), args, train_dataset=token_data(30), callbacks=[watch])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, watch

    whole, _ = run("whole")
    _, watch = run("part", save_strategy="steps", save_steps=3)
    assert watch.open == 0
    again, _ = run("part", resume=str(tmp_path / "part" / "checkpoint-3"))
    assert same_bits(whole.model.state_dict(), again.model.state_dict())
    assert same_bits(whole.optimizer.state_dict(), again.optimizer.state_dict())


@pytest.mark.train
def test_a_window_that_an_exception_cuts_off_is_not_in_the_next_training(tmp_path: Path) -> None:
    args = settings(LowMemTrainingArguments, tmp_path, **STEPPING, **SUMS)
    trainer: Any = LowMemTrainer(tiny_llama(), args, train_dataset=token_data())
    inner, passes = trainer.compute_loss, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        passes.append(0)
        if len(passes) == PASSES:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    trainer.compute_loss = fails
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert len(optimizer.state) > 0
    assert not any(accumulator.is_open(raw) for raw in optimizer.state.values())


def test_a_loop_with_the_plugin_is_the_loop_by_hand() -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PASSES)
    plugin = LowMemPlugin(optim="lion", lowmem_state="8bit", learning_rate=1e-3, **SUMS)
    loader = torch.utils.data.DataLoader(batches()[:20], batch_size=4)  # type: ignore[arg-type]
    model, optimizer, data, scheduler = plugin.prepare(accelerator, tiny_llama().train(), loader, scheduler=scheduled)
    loop(accelerator, model, optimizer, data, scheduler)
    plugin.remove()
    AcceleratorState._reset_state(reset_partial_state=False)

    by_hand: Any = tiny_llama().train()
    ours = make_optimizer("lion", by_hand, lr=1e-3, state="8bit", seed=42)
    steps, micro = scheduled(ours), 0
    ends = (PASSES, 5)  # the last window of an epoch is short
    StepInBackward(ours, ready=lambda: micro in ends, accumulation="int8_sr")
    for batch in loader:
        micro += 1
        (by_hand(**batch).loss / PASSES).backward()
        if micro in ends:
            ours.step()
            ours.zero_grad()
            steps.step()
    assert same_bits(list(model.parameters()), list(by_hand.parameters()))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lowmem_accumulation": "int8"}, ("lowmem_accumulation='int8'", "int8_sr")),
        ({"lowmem_accumulation": 8}, ("lowmem_accumulation=8",)),
        ({"lowmem_accumulation": "int8_sr", "optim": "sgd"}, ("lowmem_accumulation='int8_sr'", "no effect", "adamw")),
        ({"lowmem_step_in_backward": True}, ("gradient_accumulation_steps=3", "lowmem_accumulation='int8_sr'")),
        ({**SUMS, "max_grad_norm": 1.0}, ("max_grad_norm=1.0", "max_grad_norm=0")),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        settings(LowMemTrainingArguments, tmp_path, **STEPPING | fields)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.train
@pytest.mark.parametrize("optim", ["adamw", "galore"])
def test_a_window_that_ran_out_of_memory_is_not_part_of_the_next_attempt(optim: str, tmp_path: Path) -> None:
    own: dict[str, Any] = {"lowmem_rank": 8, "lowmem_projection": "random"} if optim == "galore" else SUMS
    fields = STEPPING | {"lowmem_step_in_backward": True, "optim": optim, "max_steps": 1, "logging_steps": 1} | own
    found = []
    for fails in (False, True):
        size = {"auto_find_batch_size": True, "per_device_train_batch_size": 4 if fails else 3}
        args = settings(LowMemTrainingArguments, tmp_path / str(fails), **fields, **size)
        trainer = LowMemTrainer(tiny_llama(dtype=torch.float32), args=args, train_dataset=token_data(36))
        compute, calls = trainer.compute_loss, []

        def failing(
            *given: Any, compute: Any = compute, calls: list[int] = calls, fails: bool = fails, **more: Any
        ) -> Any:
            calls.append(0)
            if fails and len(calls) == PASSES:
                raise RuntimeError("CUDA out of memory.")
            return compute(*given, **more)

        trainer.compute_loss = failing
        trainer.train()
        assert len(calls) == (2 * PASSES if fails else PASSES)  # the second attempt has three sequences a pass
        found.append([p.detach() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *found))
