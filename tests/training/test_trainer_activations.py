"""`lowmem_activations` in every trainer: the same training from less, and never without a word no effect."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_lowmem import LowMemCallback, LowMemSFTConfig, LowMemTrainer, LowMemTrainingArguments
from hf_lowmem.activations import convert, undo
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.specs import TIERS
from tests.conftest import tiny_llama
from tests.contracts.test_optimizers import same_bits, weights
from tests.training.test_resume import TRAINERS
from tests.training.test_trainers import pair_data, token_data

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
}


def make(kind: str, folder: Path, tokenizer: Any, model: Any = None, callbacks: Any = None, **kwargs: Any) -> Any:
    trainer_class, config = TRAINERS[kind]
    args = config(str(folder), **COMMON | kwargs)
    data = pair_data(40) if kind == "DPOTrainer" else token_data(40, length=48)
    extra = {} if kind == "Trainer" else {"processing_class": tokenizer}
    model = model or tiny_llama(num_hidden_layers=2)
    return trainer_class(model, args=args, train_dataset=data, callbacks=callbacks, **extra)


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.train
@pytest.mark.parametrize("kind", TRAINERS)
def test_exact_is_the_same_training(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    """Bit for bit, beside a plain run without checkpointing; and it keeps less."""
    settings: dict[str, Any] = {"loss_type": "asft"} if kind == "DPOTrainer" else {}
    reports, runs = [], []
    for tier in (None, "exact"):
        callback = LowMemCallback(verbose=False)
        tiers: dict[str, Any] = {"gradient_checkpointing": False} if tier is None else {"lowmem_activations": tier}
        trainer = make(kind, tmp_path, tokenizer, callbacks=[callback], **settings, **tiers)
        trainer.train()
        reports.append(callback.report["saved"])
        runs.append((weights(trainer.model), losses(trainer)))
    assert same_bits(*runs)
    assert reports[1] < 0.8 * reports[0]


@pytest.mark.train
@pytest.mark.parametrize("tier", [t for t in TIERS if t != "exact"])
def test_every_tier_trains_and_keeps_less(tier: str, tmp_path: Path, tokenizer: Any) -> None:
    plain, lossy = LowMemCallback(verbose=False), LowMemCallback(verbose=False)
    make("Trainer", tmp_path, tokenizer, callbacks=[plain]).train()
    trainer = make("Trainer", tmp_path, tokenizer, callbacks=[lossy], lowmem_activations=tier)
    trainer.train()
    assert trainer.activations is not None
    assert all(layer.tier == tier for layer in trainer.activations.layers)
    assert lossy.report["saved"] < 0.75 * plain.report["saved"]


def test_checkpointing_is_off_unless_it_was_asked_for() -> None:
    common: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "bf16": False}
    assert LowMemSFTConfig(**common).gradient_checkpointing is True
    assert LowMemSFTConfig(**common, lowmem_activations="fp8").gradient_checkpointing is False
    assert LowMemSFTConfig(**common, gradient_checkpointing=False).gradient_checkpointing is False
    plain, ours = TrainingArguments(**common), LowMemTrainingArguments(**common)
    assert ours.gradient_checkpointing == plain.gradient_checkpointing
    again = LowMemSFTConfig(**LowMemSFTConfig(**common, lowmem_activations="fp8").to_dict() | common)
    assert again.lowmem_activations == "fp8"
    assert again.gradient_checkpointing is False


@pytest.mark.train
@pytest.mark.parametrize("name", ["adamw", "soap", "apollo", "natural_galore"])  # one of each kind of state
def test_it_stacks_with_optimizers_and_resumes_to_the_same_bits(name: str, tmp_path: Path, tokenizer: Any) -> None:
    settings: dict[str, Any] = {
        "optim": name,
        "lowmem_state": "8bit",
        "lowmem_activations": "exact:0,fp8:1,fp8_recompute:2,checkpoint_fp8:3,hooks_fp8:4",
        "lowmem_activations_stochastic": True,
        "lowmem_step_in_backward": True,
        "max_grad_norm": 0.0,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    if OPTIMIZERS[name].DEFAULTS.get("rank", 0) > 8:
        settings["lowmem_rank"] = 8
    model = {"model": tiny_llama(num_hidden_layers=5, attention_dropout=0.1)}
    start = {k: v.clone() for k, v in model["model"].state_dict().items()}
    whole = make("Trainer", tmp_path, tokenizer, **model, **settings)
    whole.train()
    fresh = tiny_llama(num_hidden_layers=5, attention_dropout=0.1)
    fresh.load_state_dict(start)
    resumed = make("Trainer", tmp_path, tokenizer, model=fresh, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, q) for p, q in zip(weights(whole.model), weights(resumed.model), strict=True))


@pytest.mark.train
def test_what_is_saved_is_the_plain_model(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    trainer = make("SFTTrainer", tmp_path, tokenizer, lowmem_activations="fp8")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == tiny_llama(num_hidden_layers=2).state_dict().keys()
    ids = torch.arange(4, 36)[None]
    loaded.eval()
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@pytest.mark.train
def test_a_model_of_model_init_is_converted(tmp_path: Path) -> None:
    made: list[Any] = []

    def model_init() -> Any:
        made.append(tiny_llama())
        return made[-1]

    args = LowMemTrainingArguments(str(tmp_path), **COMMON, lowmem_activations="fp8")
    callback = LowMemCallback(verbose=False)
    trainer = LowMemTrainer(args=args, model_init=model_init, train_dataset=token_data(8), callbacks=[callback])
    trainer.train()
    plain = LowMemCallback(verbose=False)
    args = LowMemTrainingArguments(str(tmp_path), **COMMON)
    LowMemTrainer(tiny_llama(), args, train_dataset=token_data(8), callbacks=[plain]).train()
    assert callback.report["saved"] < 0.75 * plain.report["saved"]


@pytest.mark.train
@pytest.mark.parametrize("late", [False, True])
def test_the_callback_does_it_for_a_plain_trainer(late: bool, tmp_path: Path) -> None:
    plain, ours = LowMemCallback(verbose=False), LowMemCallback("fp8", verbose=False)
    args = TrainingArguments(str(tmp_path), **COMMON)
    Trainer(tiny_llama(), args, train_dataset=token_data(8), callbacks=[plain]).train()
    trainer = Trainer(tiny_llama(), args, train_dataset=token_data(8), callbacks=None if late else [ours])
    if late:
        trainer.add_callback(ours)
    trainer.train()
    assert ours.activations is not None
    assert ours.report["saved"] < 0.75 * plain.report["saved"]


def test_the_callback_refuses_what_would_leave_it_without_effect(tmp_path: Path, tokenizer: Any) -> None:
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(
        ValueError, match=r"gradient_checkpointing=True cannot be combined .*Set gradient_checkpointing"
    ):
        SFTTrainer(
            tiny_llama(),
            args=args,
            train_dataset=token_data(8),
            processing_class=tokenizer,
            callbacks=[LowMemCallback("fp8")],
        )


def test_a_model_that_checkpoints_by_itself_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="activation checkpointing is on"):
        make("Trainer", tmp_path, tokenizer, model=model, lowmem_activations="fp8")


def test_evaluation_is_that_of_the_plain_model(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_llama()
    trainer = make("Trainer", tmp_path, tokenizer, model=model, lowmem_activations="fp8")
    converted = trainer.evaluate(token_data(8))["eval_loss"]
    undo(model)
    assert trainer.evaluate(token_data(8))["eval_loss"] == converted
    convert(model, "fp8")


@pytest.mark.train
def test_auto_find_batch_size_goes_on_with_the_converted_model(tmp_path: Path) -> None:
    """Out of memory at the first batch size: the loop is entered again, with the same tiers and a new optimizer."""
    sizes: list[int] = []

    class Short(LowMemTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
            return super().training_step(model, inputs, *args, **kwargs)

    tiers: dict[str, Any] = {"lowmem_activations": "fp8", "auto_find_batch_size": True, "optim": "adamw"}
    tiers |= {"lowmem_step_in_backward": True, "max_grad_norm": 0.0, "per_device_train_batch_size": 4}
    callback = LowMemCallback(verbose=False)
    model = tiny_llama()
    before = weights(model)
    args = LowMemTrainingArguments(str(tmp_path), **COMMON | tiers)
    Short(model, args, train_dataset=token_data(40), callbacks=[callback]).train()
    assert sizes[0] == 4
    assert sizes[1] < 4
    assert callback.report["saved"] > 0
    assert not any(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
