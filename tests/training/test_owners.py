"""What is put on a model belongs to a training, and is gone when that ends, however it ends."""

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowmem import (
    LowMemCallback,
    LowMemDPOConfig,
    LowMemDPOTrainer,
    LowMemPlugin,
    LowMemTrainer,
    LowMemTrainingArguments,
    make_optimizer,
)
from hf_lowmem.activations import OwnedTiers, convert, owners_of
from hf_lowmem.activations.blocks import patches
from hf_lowmem.optim import StepInBackward
from hf_lowmem.preference.sharing import share_prompts
from hf_lowmem.specs import ActivationSpec
from tests.conftest import Mixed, tiny_llama
from tests.contracts.test_optimizers import weights
from tests.training.test_trainer_activations import COMMON
from tests.training.test_trainers import pair_data, token_data

EVERYTHING: dict[str, Any] = {
    "optim": "adamw",
    "lowmem_activations": "fp8",
    "lowmem_step_in_backward": True,
    "max_grad_norm": 0.0,
}


def on_it(model: nn.Module) -> list[str]:
    """What stands on a model that was not there when it was made."""
    found = [f"{name}.forward" for name, m in model.named_modules() if "forward" in vars(m)]
    found += [f"{n}: hook" for n, p in model.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]
    return found + [f"{name}: hooks" for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


class Spy(TrainerCallback):
    """Looks at the model when the first step ends, and then raises what it was given."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.seen: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.seen = self.seen or on_it(kw["model"])
        if self.error is not None:
            raise self.error


def train(folder: Path, model: Any = None, error: Any = None, **fields: Any) -> tuple[Any, Spy]:
    spy = Spy(error)
    args = LowMemTrainingArguments(str(folder), **COMMON | fields)
    own: dict[str, Any] = {"model_init": lambda: tiny_llama(num_hidden_layers=2)} if model is None else {"model": model}
    trainer = LowMemTrainer(args=args, train_dataset=token_data(8), eval_dataset=token_data(4), callbacks=[spy], **own)
    if model is not None:
        assert not on_it(model), "nothing stays that construction has tried"
    if error is None:
        trainer.train()
    else:
        with pytest.raises(type(error)):
            trainer.train()
    return trainer, spy


@pytest.mark.train
@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    "fields",
    [EVERYTHING, {"lowmem_activations": "exact:0,hooks_fp8:1"}],
    ids=["fp8", "mixture"],
)
def test_a_model_is_as_it_was_after_training(error: BaseException | None, fields: Any, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    trainer, spy = train(tmp_path, model, error=error, **fields)
    assert spy.seen
    assert not on_it(model)
    assert trainer.activations is not None
    assert "model.layers" in str(trainer.activations), "the report stays"


@pytest.mark.train
def test_a_trainer_trains_twice_as_on_a_model_of_its_own(tmp_path: Path) -> None:
    """The optimizer goes on, as HuggingFace's does; and between the two the model can be used and judged."""
    runs = []
    for fields in (EVERYTHING, EVERYTHING | {"lowmem_step_in_backward": False}):
        model = tiny_llama(num_hidden_layers=2)
        trainer, spy = train(tmp_path, model, **fields)
        before = trainer.evaluate()["eval_loss"]
        assert not on_it(model)
        assert trainer.predict(token_data(4)).metrics["test_loss"] == pytest.approx(before)
        spy.seen = []
        trainer.train()
        assert any("forward" in what for what in spy.seen)
        assert any("hook" in what for what in spy.seen) == fields["lowmem_step_in_backward"]
        assert not on_it(model)
        runs.append(weights(model))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.train
def test_each_model_of_model_init_is_left_plain(tmp_path: Path) -> None:
    trainer, spy = train(tmp_path, **EVERYTHING)
    first = trainer.model
    trainer.train()  # as hyperparameter searches do
    assert trainer.model is not first
    assert spy.seen
    assert not on_it(first)
    assert not on_it(trainer.model)


@pytest.mark.train
@pytest.mark.parametrize("fields", [{}, {"lowmem_step_in_backward": True, "max_grad_norm": 0.0}], ids=["", "backward"])
def test_states_are_freed_with_the_trainer(fields: Any, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=2)
    trainer, _ = train(tmp_path, model, optim="adamw", lowmem_activations="fp8", **fields)
    optimizer = weakref.ref(trainer.optimizer.optimizer)
    del trainer
    gc.collect()
    assert optimizer() is None


@pytest.mark.train
def test_a_second_training_is_that_of_a_model_that_never_had_a_first(tmp_path: Path) -> None:
    """Another optimizer, and gradients that nobody rounds or frees."""
    model = tiny_llama(num_hidden_layers=2)
    train(tmp_path, model, **EVERYTHING)
    fresh = tiny_llama(num_hidden_layers=2)
    fresh.load_state_dict(model.state_dict())
    norms = []
    for which in (model, fresh):
        args = TrainingArguments(str(tmp_path), optim="sgd", **COMMON)
        trainer = Trainer(which, args, train_dataset=token_data(8))
        trainer.train()
        norms.append([row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row])
    assert all(torch.equal(p, q) for p, q in zip(weights(model), weights(fresh), strict=True))
    assert norms[0] == norms[1]
    assert min(norms[0]) > 0


def kinds(model: nn.Module) -> list[str]:
    return [type(patch).__name__ for patch in patches(model)]


@pytest.mark.train
@pytest.mark.parametrize("error", [None, RuntimeError("no")], ids=repr)
def test_a_conversion_by_hand_is_kept(
    error: BaseException | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(num_hidden_layers=2)
    convert(model, "exact")
    mine = list(patches(model))
    args = LowMemTrainingArguments(str(tmp_path), **COMMON)
    trainer = LowMemTrainer(model, args, train_dataset=token_data(8))  # type: ignore[arg-type]
    trainer.train()
    assert list(patches(model)) == mine, "the trainer has no tiers of its own"
    spy = Spy(error)
    args = LowMemTrainingArguments(str(tmp_path), **COMMON, lowmem_activations="checkpoint_fp8")
    trainer = LowMemTrainer(model, args, train_dataset=token_data(8), callbacks=[spy])  # type: ignore[arg-type]
    assert list(patches(model)) == mine
    if error is None:
        trainer.train()
    else:
        with pytest.raises(RuntimeError):
            trainer.train()
    ours = ["model.layers.0.forward", "model.layers.1.forward", "model.norm.forward"]
    assert spy.seen == ours, "for this training it is put aside"
    assert list(patches(model)) == mine
    assert "converted by hand (exact)" in caplog.text
    assert "LowMemTrainer" in caplog.text


def test_another_owner_takes_over_in_words(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(num_hidden_layers=2)
    convert(model, "exact")
    by_hand = kinds(model)
    first = OwnedTiers(model, ActivationSpec(tiers="fp8"), "the first")
    second = OwnedTiers(model, ActivationSpec(tiers="checkpoint_fp8"), "the second")
    assert "the second: this model still has the tiers of the first" in caplog.text
    assert list(owners_of(model)) == ["the second"]
    first.take_off()
    assert list(owners_of(model)) == ["the second"], "what is not his he does not take"
    second.take_off()
    assert kinds(model) == by_hand
    assert not owners_of(model)


def test_tiers_of_an_owner_that_is_gone_are_nobody_s(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(num_hidden_layers=2)
    OwnedTiers(model, ActivationSpec(tiers="fp8"), "the first")
    gc.collect()
    OwnedTiers(model, ActivationSpec(tiers="exact"), "the second").take_off()
    assert "the tiers of the first" in caplog.text
    assert not on_it(model)


def test_a_copy_of_a_converted_model_belongs_to_nobody() -> None:
    model = tiny_llama(num_hidden_layers=2)
    tiers = OwnedTiers(model, ActivationSpec(tiers="fp8"), "the owner")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(copied) == kinds(model)
        assert not owners_of(copied)
    tiers.take_off()


def test_a_conversion_by_hand_in_the_middle_of_a_training_stays() -> None:
    model = tiny_llama(num_hidden_layers=2)
    convert(model, "exact")
    tiers = OwnedTiers(model, ActivationSpec(tiers="fp8"), "a training")
    convert(model, "checkpoint_fp8")
    tiers.take_off()
    assert kinds(model) == ["_Checkpointed"] * 2


def test_what_cannot_be_taken_off_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(num_hidden_layers=2)
    tiers = OwnedTiers(model, ActivationSpec(tiers="hooks_fp8"), "a training")
    layer = model.model.layers[0]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    tiers.take_off()
    assert "a training: the forward of 1 modules (LlamaDecoderLayer) was replaced" in caplog.text


# The callback of an unmodified Trainer.
def plain_trainer(folder: Path, model: Any, *callbacks: Any) -> Trainer:
    args = TrainingArguments(str(folder), **COMMON)
    return Trainer(model, args, train_dataset=token_data(8), callbacks=list(callbacks))


@pytest.mark.train
@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("late", [False, True], ids=["callbacks=", "add_to"])
def test_the_callback_takes_its_tiers_off(error: BaseException | None, late: bool, tmp_path: Path) -> None:
    model, spy, ours = tiny_llama(num_hidden_layers=2), Spy(error), LowMemCallback("fp8", verbose=False, trim=False)
    trainer = plain_trainer(tmp_path, model, spy, *([] if late else [ours]))
    if late:
        trainer.add_callback(ours)
        ours.add_to(trainer)
    assert not on_it(model)
    for _ in range(2):
        spy.seen = []
        if error is None:
            trainer.train()
        else:
            with pytest.raises(type(error)):
                trainer.train()
        assert spy.seen
        assert not on_it(model)
    assert ours.activations is not None
    copy.deepcopy(ours)


@pytest.mark.train
def test_the_callback_alone_goes_with_its_trainer(tmp_path: Path) -> None:
    """Added late and by no other way, it does not hear of an exception."""
    model = tiny_llama(num_hidden_layers=2)
    trainer = plain_trainer(tmp_path, model, Spy(RuntimeError("no")))
    trainer.add_callback(LowMemCallback("fp8", verbose=False, trim=False))
    with contextlib.suppress(RuntimeError):
        trainer.train()
    del trainer
    gc.collect()
    assert not on_it(model)


def test_the_callback_beside_the_field_is_refused(tmp_path: Path) -> None:
    args = LowMemTrainingArguments(str(tmp_path), **COMMON, lowmem_activations="exact")
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"lowmem_activations='exact' cannot be combined with LowMemCallback.*'fp8'"):
        LowMemTrainer(model, args, train_dataset=token_data(8), callbacks=[LowMemCallback("fp8")])  # type: ignore[arg-type]
    assert not on_it(model)


# Loops of one's own.
def test_the_plugin_removes_what_it_has_put_on() -> None:
    model = tiny_llama(num_hidden_layers=2)
    plugin = LowMemPlugin(optim="adamw", lowmem_activations="fp8", lowmem_step_in_backward=True)
    accelerator = Accelerator(cpu=True)
    model, optimizer = plugin.prepare(accelerator, model)
    assert any("hook" in what for what in on_it(model))
    ids = torch.arange(3, 19)[None]
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    assert all(p.grad is None for p in model.parameters())
    plugin.remove()
    assert not on_it(model)
    assert plugin.activations is not None
    plugin.remove()
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()


@pytest.mark.train
def test_a_trainer_says_whose_tiers_it_keeps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(num_hidden_layers=2)
    plugin = LowMemPlugin(lowmem_activations="fp8")
    plugin.prepare(Accelerator(cpu=True), model, optimizer=torch.optim.SGD(model.parameters()))
    args = LowMemTrainingArguments(str(tmp_path), **COMMON)
    LowMemTrainer(model, args, train_dataset=token_data(8)).train()  # type: ignore[arg-type]
    assert "keeps the tiers that the model has from lowmem_activations='fp8' of LowMemPlugin" in caplog.text
    assert kinds(model)


def stepping(model: Mixed) -> Any:
    return make_optimizer("adamw", model, lr=0.01)


def test_hooks_keep_no_optimizer_alive() -> None:
    model = Mixed()
    optimizer = stepping(model)
    StepInBackward(optimizer)
    gone = weakref.ref(optimizer)
    model.loss().backward()
    assert all(p.grad is None for p in model.parameters()), "attached as long as the optimizer lives"
    del optimizer
    gc.collect()
    assert gone() is None
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    model.loss().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("how", ["removed", "deleted"])
def test_a_second_optimizer_steps_after_the_first(how: str) -> None:
    model = Mixed()
    optimizer = stepping(model)
    first = StepInBackward(optimizer)
    with pytest.raises(ValueError, match="has a hook on its gradient already"):
        StepInBackward(stepping(model))
    model.loss().backward()
    updated = len(optimizer.state)
    if how == "removed":
        first.remove()
    del optimizer, first
    second = stepping(model)
    StepInBackward(second)
    model.loss().backward()
    assert len(second.state) == updated > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_refused_second_one_leaves_the_first_attached() -> None:
    model = Mixed()
    optimizer = stepping(model)
    StepInBackward(optimizer)
    with pytest.raises(ValueError):
        StepInBackward(stepping(model))
    model.loss().backward()
    assert all(p.grad is None for p in model.parameters())


# Shared prompts.
def shared(model: Any) -> bool:
    """TRL's fused head, which it puts on the outermost forward, is not ours."""
    return "model.forward" in on_it(model)


def dpo(folder: Path, tokenizer: Any, model: Any, callbacks: Any = None, **fields: Any) -> Any:
    fields = COMMON | {"loss_type": "asft", "lowmem_share_prompt": True, "gradient_checkpointing": False} | fields
    args = LowMemDPOConfig(str(folder), **fields)
    return LowMemDPOTrainer(
        model,
        args=args,
        train_dataset=pair_data(8),
        eval_dataset=pair_data(4),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def ends(error: BaseException | None, run: Callable[[], Any]) -> None:
    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()


@pytest.mark.train
@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=repr)
def test_shared_prompts_are_for_training_and_evaluation(error: Any, tmp_path: Path, tokenizer: Any) -> None:
    model, spy = tiny_llama(num_hidden_layers=2), Spy(error)
    trainer = dpo(tmp_path, tokenizer, model, [spy])
    for _ in range(2):
        spy.seen = []
        ends(error, trainer.train)
        assert "model.forward" in spy.seen
        assert not shared(model)
        assert trainer.evaluate()["eval_loss"] > 0
        assert not shared(model)


@pytest.mark.train
def test_prompts_that_a_user_shares_stay_shared(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_llama(num_hidden_layers=2)
    share_prompts(model)
    dpo(tmp_path, tokenizer, model).train()
    assert shared(model)
