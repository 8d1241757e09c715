"""A config with our fields in trainers that know none of them: all of it is applied, or refused in words."""

import inspect
import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import LlamaForSequenceClassification, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from trl import DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_lowmem import (
    LowMemDPOConfig,
    LowMemDPOTrainer,
    LowMemPlugin,
    LowMemSFTConfig,
    LowMemSFTTrainer,
    LowMemTrainer,
    LowMemTrainerMixin,
    LowMemTrainingArguments,
    with_lowmem,
)
from hf_lowmem.optim import AdamW
from tests.conftest import tiny_llama
from tests.training.test_trainers import COMMON, pair_data, token_data, weights

ASKED: dict[str, Any] = {"optim": "adamw", "lowmem_state": "int8", "lowmem_activations": "exact"}


class Own(SFTTrainer):
    """Somebody's trainer."""

    seen = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        return super().training_step(*args, **kwargs)


def classifier() -> Any:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, 0
    return LlamaForSequenceClassification(config)


def settings(config: Any, folder: Path, **fields: Any) -> Any:
    # With checkpointing as each class has it: a tier switches it off where it was left open.
    common = {k: v for k, v in COMMON.items() if k != "gradient_checkpointing"} | {"max_steps": 2}
    return config(str(folder), **common | ASKED | fields)


# (trainer, config, model, data, the class that it is then)
TRAINERS: dict[str, tuple[Any, Any, Any, Any, Any]] = {
    "Trainer": (Trainer, LowMemTrainingArguments, tiny_llama, token_data, LowMemTrainer),
    "Seq2SeqTrainer": (
        Seq2SeqTrainer, with_lowmem(Seq2SeqTrainingArguments), tiny_llama, token_data, LowMemTrainerMixin,
    ),
    "SFTTrainer": (SFTTrainer, LowMemSFTConfig, tiny_llama, token_data, LowMemSFTTrainer),
    "a trainer of one's own": (Own, LowMemSFTConfig, tiny_llama, token_data, LowMemSFTTrainer),
    "DPOTrainer": (DPOTrainer, LowMemDPOConfig, tiny_llama, pair_data, LowMemDPOTrainer),
    "RewardTrainer": (RewardTrainer, with_lowmem(RewardConfig), classifier, pair_data, LowMemTrainerMixin),
}  # fmt: skip


@pytest.mark.train
@pytest.mark.parametrize("name", list(TRAINERS))
def test_a_trainer_of_others_applies_every_field(name: str, tmp_path: Path, tokenizer: Any) -> None:
    trainer_class, config, model, data, ours = TRAINERS[name]
    extra = {} if config in (LowMemTrainingArguments, with_lowmem(Seq2SeqTrainingArguments)) else {
        "processing_class": tokenizer
    }  # fmt: skip
    loss = {"loss_type": ["asft"]} if config is LowMemDPOConfig else {}  # which TRL's own trainer does not know
    args = settings(config, tmp_path, lowmem_step_in_backward=True, max_grad_norm=0.0, **loss)
    trainer = trainer_class(model(), args=args, train_dataset=data(), **extra)
    assert isinstance(trainer, ours)
    assert isinstance(trainer, trainer_class)
    freed: list[bool] = []
    step = trainer.training_step

    def watched(*rest: Any, **kwargs: Any) -> Any:
        loss = step(*rest, **kwargs)
        freed.append(all(p.grad is None for p in trainer.model.parameters()))
        return loss

    trainer.training_step = watched
    before = weights(trainer.model)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is AdamW
    assert {group["state"] for group in trainer.optimizer.param_groups} == {"int8"}
    assert trainer.activations is not None
    assert freed == [True, True]
    assert not args.gradient_checkpointing
    assert any(not torch.equal(p, q) for p, q in zip(before, weights(trainer.model), strict=True))
    if trainer_class is Own:
        assert trainer.seen == 2


@pytest.mark.train
def test_it_trains_as_ours_to_the_bit(tmp_path: Path, tokenizer: Any) -> None:
    found = []
    for trainer_class in (SFTTrainer, LowMemSFTTrainer):
        args = settings(LowMemSFTConfig, tmp_path)
        trainer = trainer_class(tiny_llama(), args=args, train_dataset=token_data(), processing_class=tokenizer)
        trainer.train()
        found.append(weights(trainer.model))
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_plain_arguments_leave_a_trainer_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    args = SFTConfig(str(tmp_path), **COMMON)
    assert (
        type(SFTTrainer(tiny_llama(), args=args, train_dataset=token_data(), processing_class=tokenizer)) is SFTTrainer
    )
    assert list(inspect.signature(Trainer).parameters) == list(inspect.signature(Trainer.__init__).parameters)[1:]


def test_an_optimizer_of_somebodys_own_trainer_is_passed_over_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Makes(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("not called")

    with caplog.at_level(logging.WARNING):
        trainer = Makes(tiny_llama(), settings(LowMemTrainingArguments, tmp_path))
    assert "Makes.create_optimizer is not called with an optim of hf_lowmem" in caplog.text
    assert isinstance(trainer.create_optimizer(), AdamW)


@pytest.fixture
def accelerator() -> Any:
    AcceleratorState._reset_state(reset_partial_state=False)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=False)


class TestPlugin:
    def backward(self, accelerator: Any, model: Any) -> None:
        accelerator.backward(model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4).long()).loss)

    @pytest.mark.parametrize(
        "fields", [{"optim": "adamw"}, {"lowmem_activations": "fp8"}], ids=["optimizer", "activations"]
    )
    def test_one_that_was_not_prepared_is_found_at_the_first_step(
        self, fields: dict[str, Any], accelerator: Any
    ) -> None:
        model = accelerator.prepare(tiny_llama())
        plugin = LowMemPlugin(**fields)
        said = "optim='adamw'" if "optim" in fields else "lowmem_activations='fp8'"
        with pytest.raises(ValueError, match=rf"LowMemPlugin with {said} was made and not prepared.*plugin\.prepare"):
            self.backward(accelerator, model)
        del plugin
        self.backward(accelerator, model)

    def test_one_that_was_prepared_or_asks_for_nothing_trains(self, accelerator: Any) -> None:
        nothing, plugin = LowMemPlugin(), LowMemPlugin(optim="adamw")
        model, _ = plugin.prepare(accelerator, tiny_llama())
        self.backward(accelerator, model)
        by_hand = LowMemPlugin(optim="adamw")
        by_hand.make_optimizer(model)
        self.backward(accelerator, model)
        assert nothing.optim != plugin.optim

    def test_clipping_of_gradients_that_are_gone_is_refused(self, accelerator: Any) -> None:
        model, _ = LowMemPlugin(optim="adamw", lowmem_step_in_backward=True).prepare(accelerator, tiny_llama())
        for clip in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
            with pytest.raises(ValueError, match=r"clipping gradients cannot be combined .*Do not clip"):
                clip(model.parameters(), 1.0)

    def test_a_compiled_model_is_refused_with_step_in_backward(self, accelerator: Any) -> None:
        plugin = LowMemPlugin(optim="adamw", lowmem_step_in_backward=True)
        with pytest.raises(ValueError, match=r"torch\.compile\(LlamaForCausalLM\) cannot be combined"):
            plugin.prepare(accelerator, cast(torch.nn.Module, torch.compile(tiny_llama())))

    @pytest.mark.parametrize(
        "fields", [{"learning_rate": 0.5}, {"weight_decay": 0.1}, {"adam_beta2": 0.5}, {"optim_args": "a=1"}], ids=str
    )
    def test_settings_of_an_optimizer_that_is_passed_are_refused(self, fields: dict[str, Any]) -> None:
        (name,) = fields
        with pytest.raises(ValueError, match=rf"{name}=.* has no effect with optim='adamw_torch_fused'"):
            LowMemPlugin(lowmem_activations="exact", **fields)


@pytest.mark.train
@pytest.mark.parametrize("name", ["optimizer", "optimizer_cls_and_kwargs"])
def test_an_optimizer_that_is_assigned_to_a_trainer_is_refused(name: str, tmp_path: Path) -> None:
    trainer = Trainer(tiny_llama(), settings(LowMemTrainingArguments, tmp_path), train_dataset=token_data())
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    setattr(trainer, name, other if name == "optimizer" else (torch.optim.SGD, {"lr": 0.1}))
    with pytest.raises(ValueError, match=rf"{name.removesuffix('r')}.*cannot be combined with optim='adamw'"):
        trainer.train()


def test_a_compiled_model_in_a_trainer_is_refused_with_step_in_backward(tmp_path: Path) -> None:
    args = settings(LowMemTrainingArguments, tmp_path, lowmem_step_in_backward=True, max_grad_norm=0.0)
    args.lowmem_activations = None
    model: Any = torch.compile(tiny_llama())
    with pytest.raises(ValueError, match=r"torch\.compile\(LlamaForCausalLM\) cannot be combined"):
        LowMemTrainer(model, args, train_dataset=token_data())
