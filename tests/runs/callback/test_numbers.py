"""The numbers are direct measurements, and training is the same."""

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_lowmem.memory import parameter_bytes
from hf_lowmem.training.callbacks import LowMemCallback
from tests.conftest import tiny_llama
from tests.runs.callback.runs import (
    BATCH,
    TOKENS,
    curve,
    data,
    directly,
    llama,
    nothing_is_left,
    records,
    samplers,
    trainer_of,
)

pytestmark = pytest.mark.train


def test_numbers_are_the_direct_measurements(tmp_path):
    callback = LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    model = llama()
    n, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    report = callback.report
    assert report["weights"] == report["trainable"] == report["gradients"] == parameter_bytes(model) == 4 * n
    assert report["optimizer"] == 8 * n + 4 * tensors
    assert (report["saved"], report["saved_by_module"], report["saved"]) == directly(trainer_of(tmp_path))
    assert report["saved_step"] == 1
    assert report["peak_source"] == "process RSS, sampled"
    assert report["peak"] >= report["peak_added"] >= 0
    assert report["peak"] > report["weights"]
    assert nothing_is_left(trainer.model)
    for thread in samplers():
        thread.join(10)
    assert not samplers()


def test_training_is_bit_equal(tmp_path):
    plain = trainer_of(tmp_path)
    plain.train()
    measured = trainer_of(tmp_path, LowMemCallback(every=1, verbose=False))
    measured.train()
    assert len(curve(plain)) == 3
    assert curve(plain) == curve(measured)
    pairs = zip(plain.model.parameters(), measured.model.parameters(), strict=True)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_only_the_trained_parameters_have_states_and_gradients(tmp_path):
    callback = LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback)
    trainer.model.model.embed_tokens.requires_grad_(False)  # type: ignore[union-attr]
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
    n = sum(p.numel() for p in trained)
    assert callback.report["gradients"] == callback.report["trainable"] == 4 * n < callback.report["weights"]
    assert callback.report["optimizer"] == 8 * n + 4 * len(trained)


def test_gradient_accumulation_reports_one_micro_batch(tmp_path):
    whole, parts = LowMemCallback(verbose=False), LowMemCallback(verbose=False)
    trainer_of(tmp_path, whole).train()
    trainer = trainer_of(tmp_path, parts, gradient_accumulation_steps=3)
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            seen.append(parts.report["saved"])

    trainer.add_callback(Watch())
    trainer.train()
    assert set(seen) == {parts.report["saved"]} == {whole.report["saved"]}
    assert parts.report["gradients"] == whole.report["gradients"]
    assert nothing_is_left(trainer.model)


@pytest.mark.parametrize("lengths", [[8, 2, 4], [2, 8, 4], [2, 4, 8]])
def test_of_unequal_micro_batches_the_largest_is_reported(tmp_path, lengths):
    rows = [{name: row[:n] for name, row in data()[0].items()} for n in lengths]
    callback, longest = LowMemCallback(verbose=False), LowMemCallback(verbose=False)
    one = {"per_device_train_batch_size": 1, "max_steps": 1, "train_sampling_strategy": "sequential"}
    trainer = trainer_of(tmp_path, callback, rows=rows, gradient_accumulation_steps=3, **one)
    trainer.train()
    trainer_of(tmp_path, longest, rows=data(1), **one).train()
    assert callback.report["saved"] == longest.report["saved"]
    assert callback.report["saved_by_module"] == longest.report["saved_by_module"]


def test_evaluation_during_training_does_not_count(tmp_path):
    """Of four times the batch, before the first step and after each, and within a measured step."""
    plain, callback = LowMemCallback(verbose=False), LowMemCallback(every=1, verbose=False)

    class Evaluate(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            trainer.evaluate()

    trainer_of(tmp_path, plain).train()
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    evaluation |= {"per_device_eval_batch_size": 4 * BATCH}
    trainer = trainer_of(tmp_path, callback, Evaluate(), gradient_accumulation_steps=2, **evaluation)
    trainer.train()
    assert any("eval_loss" in r for r in trainer.state.log_history)
    assert {r["lowmem/saved_gib"] * 2**30 for r in records(trainer)} == {plain.report["saved"]}
    assert nothing_is_left(trainer.model)


def test_lora(tmp_path):
    from peft import LoraConfig, get_peft_model

    def lora() -> Any:
        return get_peft_model(llama(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"]))

    callback = LowMemCallback(verbose=False)
    trainer = trainer_of(tmp_path, callback, model=lora())
    trainer.train()
    report = callback.report
    expected = directly(trainer_of(tmp_path, model=lora()))
    assert (report["saved"], report["saved_by_module"], report["saved"]) == expected
    assert any(name.endswith("q_proj.lora_A.default") for name in report["saved_by_module"])
    n = sum(p.numel() for p in lora().parameters() if p.requires_grad)
    assert report["trainable"] == report["gradients"] == 4 * n < report["weights"]
    assert nothing_is_left(trainer.model)
    assert nothing_is_left(trainer.model.get_base_model())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trls_sft_and_its_fused_head(tmp_path, tokenizer, checkpointing):
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    def sft(*callbacks: TrainerCallback) -> Any:
        settings: dict[str, Any] = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        settings |= {"per_device_train_batch_size": BATCH, "max_steps": 2, "logging_steps": 1, "bf16": False}
        args = SFTConfig(str(tmp_path), max_length=TOKENS, gradient_checkpointing=checkpointing, **settings)
        rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data(8)])
        return SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks))

    callback = LowMemCallback(verbose=False)
    trainer = sft(callback)
    trainer.train()
    saved, by_module, whole = directly(sft(), use_cache=False, fused_lm_head=True)
    assert (callback.report["saved"], callback.report["saved_by_module"]) == (saved, by_module)
    # What TRL's loss saves outside, and what only its metrics needed of the forward pass: a few values per token.
    assert abs(whole - saved) <= 2 * BATCH * TOKENS * 4
    assert nothing_is_left(trainer.model)
    plain = sft()
    plain.train()
    assert curve(trainer) == curve(plain)


def test_checkpointed_training_saves_less_and_is_bit_equal(tmp_path):
    plain, less = LowMemCallback(verbose=False), LowMemCallback(verbose=False)
    trainer_of(tmp_path, plain).train()
    trainer = trainer_of(tmp_path, less, gradient_checkpointing=True)
    trainer.train()
    reference = trainer_of(tmp_path, gradient_checkpointing=True)
    reference.train()
    assert curve(trainer) == curve(reference)
    assert (less.report["saved"], less.report["saved_by_module"]) == directly(reference)[:2]
    assert 0 < less.report["saved"] < plain.report["saved"]
