"""Methods of zeroth order in trainers: SFT, DPO, adapters; what they refuse, and runs that go on to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from hf_lowmem import (
    LowMemDPOConfig,
    LowMemDPOTrainer,
    LowMemSFTConfig,
    LowMemSFTTrainer,
    LowMemTrainer,
    LowMemTrainingArguments,
    make_optimizer,
)
from hf_lowmem.optim import ZEROTH
from hf_lowmem.training.wrap import with_lowmem
from hf_lowmem.training.zeroth import SLOPE
from tests.conftest import tiny_llama

PARTS = "share=0.5,block_layers=1"
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)


def texts(rows: int = 16) -> Dataset:
    ids = torch.randint(3, 128, (rows, 12), generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def pairs(rows: int = 8) -> Dataset:
    return Dataset.from_dict(
        {"prompt": ["w1 w2"] * rows, "chosen": [" w3 w4 w5"] * rows, "rejected": [" w6 w7"] * rows}
    )


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "optim": "mezo", "learning_rate": 1e-3, "max_grad_norm": 0.0, "max_steps": 4, "logging_steps": 1,
        "save_strategy": "no", "per_device_train_batch_size": 2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return values | changes


def sft(folder: Path, tokenizer: Any, model: Any = None, peft_config: Any = None, **changes: Any) -> LowMemSFTTrainer:
    args = LowMemSFTConfig(**settings(folder, **{"max_length": 16} | changes))
    model = tiny_llama(num_hidden_layers=2, attention_dropout=0.1) if model is None else model
    return LowMemSFTTrainer(
        model, args=args, train_dataset=texts(), processing_class=tokenizer, peft_config=peft_config
    )


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.train
@pytest.mark.parametrize(("optim", "options"), [("mezo", None), ("zo_adam", None), ("mezo", PARTS)])
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(
    optim: str, options: str | None, tmp_path: Path, tokenizer: Any
) -> None:
    """Under accumulation and dropout; tokens count once for all passes, and the log has a slope for a norm."""
    changes: dict[str, Any] = {
        "optim": optim,
        "optim_args": options,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    whole, resumed = sft(tmp_path, tokenizer, **changes), sft(tmp_path, tokenizer, **changes)
    start = weights(whole)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, q) for p, q in zip(weights(whole), weights(resumed), strict=True))
    assert all(not torch.equal(p, q) for p, q in zip(weights(whole), start, strict=True))
    row = whole.state.log_history[0]
    assert row["num_tokens"] == 2 * 2 * 12
    assert row[SLOPE] > 0
    assert "grad_norm" not in row
    assert all(p.grad is None for p in whole.model.parameters())


@pytest.mark.train
def test_accumulation_of_four_is_one_batch_of_four(tmp_path: Path, tokenizer: Any) -> None:
    """A head sums losses of 4.8 in fp32: each is off by up to 2**-22, a slope by that over the perturbation of 1e-3,
    2.4e-4, and no slope here is below 1."""
    ends = []
    for size, count in ((8, 1), (2, 4)):
        model = tiny_llama(num_hidden_layers=2).double()
        trainer = sft(
            tmp_path, tokenizer, model, per_device_train_batch_size=size, gradient_accumulation_steps=count, max_steps=2
        )
        start = weights(trainer)
        trainer.train()
        ends.append(weights(trainer))
    moved = max(float((p - q).abs().max()) for p, q in zip(ends[0], start, strict=True))  # type: ignore[possibly-undefined]
    apart = max(float((p - q).abs().max()) for p, q in zip(*ends, strict=True))
    assert moved > 1e-4
    assert apart < 1e-3 * moved


@pytest.mark.train
@pytest.mark.parametrize(
    ("loss", "lr", "options"),
    [("sigmoid", 3e-3, None), ("asft", 3e-4, None), ("ipo", 1e-4, None), ("sigmoid", 3e-3, PARTS)],
)
def test_preference_losses_train_and_leave_the_reference_alone(
    loss: str, lr: float, options: str | None, tmp_path: Path, tokenizer: Any
) -> None:
    own: dict[str, Any] = {"max_length": 16, "loss_type": loss, "max_steps": 12, "learning_rate": lr}
    args = LowMemDPOConfig(**settings(tmp_path, optim_args=options, **own))
    trainer = LowMemDPOTrainer(
        tiny_llama(num_hidden_layers=2), args=args, train_dataset=pairs(), processing_class=tokenizer
    )
    reference = getattr(trainer, "ref_model", None)
    before = [] if reference is None else [p.clone() for p in reference.parameters()]
    trainer.train()
    rows = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert rows[-1] < rows[0]
    after = [] if reference is None else list(reference.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


@pytest.mark.train
@pytest.mark.parametrize("preference", [False, True])
def test_adapters_alone_are_perturbed_and_moved(preference: bool, tmp_path: Path, tokenizer: Any) -> None:
    if preference:
        args = LowMemDPOConfig(**settings(tmp_path, max_length=16))
        trainer: Any = LowMemDPOTrainer(
            tiny_llama(), args=args, train_dataset=pairs(), processing_class=tokenizer, peft_config=LORA
        )
    else:
        trainer = sft(tmp_path, tokenizer, peft_config=LORA)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    start = weights(trainer)
    trainer.train()
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    assert all(not torch.equal(p, q) for p, q in zip(weights(trainer), start, strict=True))


@pytest.mark.train
@pytest.mark.parametrize("optim", ZEROTH)
def test_every_method_trains(optim: str, tmp_path: Path, tokenizer: Any) -> None:
    """And in bf16 with random rounding, where a step is far below a weight's last bit."""
    trainer = sft(
        tmp_path, tokenizer, tiny_llama(dtype=torch.bfloat16), optim=optim, lowmem_weights="bf16_sr", max_steps=2,
        learning_rate=1e-5,
    )  # fmt: skip
    start = weights(trainer)
    trainer.train()
    moved = sum(not torch.equal(p, q) for p, q in zip(weights(trainer), start, strict=True))
    assert moved > 0 or optim == "zo_conservative"
    assert trainer.state.global_step == 2


@pytest.mark.train
def test_a_window_that_an_exception_cuts_off_is_forgotten(tmp_path: Path, tokenizer: Any) -> None:
    trainer = sft(tmp_path, tokenizer, gradient_accumulation_steps=2, max_steps=1)
    optimizer: Any = trainer.create_optimizer()
    optimizer.probe(lambda: 1.0)
    trainer._forget_window()
    assert optimizer._window is None


@pytest.mark.train
def test_a_trainer_that_makes_backward_passes_is_refused(tmp_path: Path) -> None:
    ids = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(1))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True)
    model = tiny_llama()
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, args, train_dataset=data, optimizers=(make_optimizer("mezo", model), None))
    with pytest.raises(RuntimeError, match="a backward pass has left gradients"):
        trainer.train()


def test_a_trainer_that_makes_its_own_batches_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    args: Any = with_lowmem(GRPOConfig)(**settings(tmp_path, num_generations=2))  # type: ignore[call-arg]
    prompts = Dataset.from_dict({"prompt": ["w1 w2"] * 4})
    with pytest.raises(ValueError, match="makes its batches while it trains"):
        GRPOTrainer(
            tiny_llama(), reward_funcs=lambda completions, **_: [0.0], args=args, train_dataset=prompts,
            processing_class=tokenizer,
        )  # fmt: skip


NEEDLESS = {
    "max_grad_norm": (1.0, "no gradient whose norm"),
    "gradient_checkpointing": (True, "nothing is kept"),
    "activation_offloading": (True, "nothing is kept"),
    "lowmem_activations": ("fp8", "nothing is kept"),
    "lowmem_step_in_backward": (True, "no backward pass"),
    "lowmem_accumulation": ("int8_sr", "has no effect with optim='mezo'"),
    "lowmem_weights": ("int8_sr", "at rest has no values"),
    "lowmem_state": ("8bit", "which keeps no state"),
    "lowmem_rank": (4, "has no effect with optim='mezo'"),
    "adam_beta1": (0.5, "has no effect with optim='mezo'"),
    "torch_compile": (True, "compiled pass"),
    "lowmem": ("auto", "what is searched"),
    "optim_args": ("radius=2", "not an option of optim='mezo'"),
}


@pytest.mark.parametrize("field", NEEDLESS)
def test_what_belongs_to_backward_passes_is_refused(field: str, tmp_path: Path) -> None:
    value, said = NEEDLESS[field]
    with pytest.raises(ValueError) as caught:
        LowMemSFTConfig(**settings(tmp_path, **{field: value}))
    assert said in str(caught.value), str(caught.value)


def test_checkpointing_that_was_left_open_is_off(tmp_path: Path) -> None:
    assert LowMemSFTConfig(**settings(tmp_path)).gradient_checkpointing is False
    assert LowMemSFTConfig(**settings(tmp_path, optim="adamw")).gradient_checkpointing is True


@pytest.mark.train
def test_a_plain_trainer_of_ours_trains(tmp_path: Path) -> None:
    ids = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(1))
    args = LowMemTrainingArguments(**settings(tmp_path, optim_args="perturbation=1e-2,probes=2"))
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    trainer = LowMemTrainer(tiny_llama(), args, train_dataset=data)
    trainer.train()
    assert len(trainer.optimizer.optimizer.slopes) == 2
