"""`lowmem_weights="int8_sr"` in trainers and loops: resumed to the bit, evaluated, compared with the best, refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTConfig, LowMemSFTTrainer, LowMemTrainingArguments
from hf_lowmem.training.plugin import LowMemPlugin
from hf_lowmem.weights import SIDE_FILE, resting
from tests.conftest import tiny_llama
from tests.training.test_resume import make
from tests.training.test_trainers import pair_data, token_data

BF16 = torch.bfloat16
INT8: dict[str, Any] = {"lowmem_weights": "int8_sr", "lowmem_step_in_backward": True, "max_grad_norm": 0}
CASES = [
    (
        "Trainer",
        {
            "optim": "adamw",
            "lowmem_state": "8bit",
            "gradient_accumulation_steps": 1,
            "lowmem_matmul": "fp8_row",
            "lowmem_matmul_least": 0,
        },
    ),
    (
        "SFTTrainer",
        {
            "optim": "galore",
            "lowmem_rank": 8,
            "lowmem_update_gap": 2,
            "lowmem_activations": "fp8",
            "lowmem_embeddings": "scale",
        },
    ),
    (
        "DPOTrainer",
        {
            "optim": "apollo_mini",
            "lowmem_activations": "checkpoint_fp8",
            "gradient_accumulation_steps": 1,
            "lowmem_embeddings": "adam_mini",
        },
    ),
]


@pytest.mark.train
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_resume_is_uninterrupted(kind: str, settings: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    """Codes and scales at the end are those of a run that was not interrupted; with accumulation, too."""

    def trainer() -> Any:
        return make(kind, tmp_path, BF16, tokenizer, **INT8 | settings)

    whole = trainer()
    whole.train()
    assert len(resting(whole.model)) == 15
    assert (tmp_path / "checkpoint-3" / SIDE_FILE).is_file()
    resumed = trainer()
    assert not resting(resumed.model)  # until it is trained
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    a, b = resting(whole.model), resting(resumed.model)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].codes, b[n].codes) and torch.equal(a[n].scale, b[n].scale) for n in a)
    finished, again = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(v, again[n]) for n, v in finished.items())
    # A second training of the same trainer goes on from the same place.
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    c = resting(resumed.model)
    assert all(torch.equal(a[n].codes, c[n].codes) and torch.equal(a[n].scale, c[n].scale) for n in a)
    # The files are those of a plain model.
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", dtype=BF16)
    assert all(torch.equal(v, finished[n]) for n, v in plain.state_dict().items())


@pytest.mark.train
def test_evaluated_generated_with_and_the_best_is_had_back(tmp_path: Path, tokenizer: Any) -> None:
    settings: dict[str, Any] = INT8 | {
        "optim": "adamw", "max_steps": 4, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "use_cpu": True,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.5, "bf16": False,
        "report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": 2, "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip
    args = LowMemSFTConfig(str(tmp_path), **settings)
    model = tiny_llama(dtype=BF16, num_hidden_layers=2)
    data = token_data(8)
    trainer = LowMemSFTTrainer(model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    trainer.train()
    best: Any = AutoModelForCausalLM.from_pretrained(str(trainer.state.best_model_checkpoint), dtype=BF16)
    kept = model.state_dict()
    assert all(torch.equal(v, kept[n]) for n, v in best.state_dict().items())
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    trainer.save_model(str(tmp_path / "end"))
    assert (tmp_path / "end" / SIDE_FILE).is_file()


@pytest.mark.train
@pytest.mark.parametrize("reference", ["full", "precomputed", "quantized"])
def test_dpo_beside_its_references(reference: str, tmp_path: Path, tokenizer: Any) -> None:
    """A reference is made of the policy's values before they go to rest, and keeps its own."""
    tiny_llama(dtype=BF16, num_hidden_layers=2, intermediate_size=128).save_pretrained(tmp_path / "model")
    found = {}
    for weights in ("keep", "int8_sr"):
        settings: dict[str, Any] = INT8 | {"lowmem_weights": weights, "loss_type": "sigmoid"}
        args = LowMemDPOConfig(
            str(tmp_path / weights), use_cpu=True, bf16=False, report_to="none", max_steps=2, optim="adamw",
            learning_rate=1e-4, per_device_train_batch_size=2, gradient_checkpointing=False, disable_tqdm=True,
            model_init_kwargs={"dtype": "bfloat16"}, lowmem_reference=reference, logging_steps=1,
            **settings,
        )  # fmt: skip
        trainer = LowMemDPOTrainer(
            str(tmp_path / "model"), args=args, train_dataset=pair_data(8), processing_class=tokenizer
        )
        trainer.train()
        found[weights] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert bool(resting(trainer.model)) == (weights == "int8_sr")
    # The first step's margin is that of the rounding to int8, and of no weight that was read as NaN or nothing.
    assert found["int8_sr"] == pytest.approx(found["keep"], abs=0.03)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.train
def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    plugin = LowMemPlugin(optim="adamw", lowmem_weights="int8_sr", lowmem_step_in_backward=True, learning_rate=1e-2)
    accelerator = Accelerator(cpu=True)
    model, optimizer = plugin.prepare(accelerator, tiny_llama(dtype=BF16, num_hidden_layers=2).train())
    assert len(resting(model)) == 15
    ids = torch.arange(3, 51).view(2, 24)
    losses = []
    for _ in range(6):
        loss = loss_of(model, ids)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.save_state(str(tmp_path / "state"))
    saved = {n: (w.codes.clone(), w.scale.clone()) for n, w in resting(model).items()}
    loss_of(model, ids).backward()
    optimizer.step()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(
        torch.equal(w.codes, saved[n][0]) and torch.equal(w.scale, saved[n][1]) for n, w in resting(model).items()
    )
    plugin.remove()
    assert losses[-1] < losses[0] - 0.1
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    assert (tmp_path / SIDE_FILE).is_file()


def test_a_preset_leaves_the_store_that_is_set(tmp_path: Path, tokenizer: Any) -> None:
    args = LowMemSFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", lowmem="smallest", lowmem_weights="int8_sr"
    )
    trainer = LowMemSFTTrainer(
        tiny_llama(dtype=BF16), args=args, train_dataset=token_data(4), processing_class=tokenizer
    )
    trainer.create_optimizer()
    plugin = LowMemPlugin(lowmem="smallest", lowmem_weights="int8_sr")
    loop = tiny_llama(dtype=BF16)
    plugin.make_optimizer(loop)
    assert args.lowmem_weights == plugin.lowmem_weights == "int8_sr"
    assert resting(trainer.model).keys() == resting(loop).keys() != set()


def test_a_reference_that_is_mixed_with_the_policy_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    args = LowMemDPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", optim="adamw", gradient_checkpointing=False,
        sync_ref_model=True, **INT8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"sync_ref_model=True cannot be combined with lowmem_weights='int8_sr'"):
        LowMemDPOTrainer(
            tiny_llama(dtype=BF16), tiny_llama(dtype=BF16), args=args, train_dataset=pair_data(4),
            processing_class=tokenizer,
        )  # fmt: skip


def test_refused_before_anything_is_loaded() -> None:
    common: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "report_to": "none", "optim": "adamw"}
    with pytest.raises(
        ValueError, match=r"lowmem_weights='int8_sr' needs lowmem_step_in_backward=True.*max_grad_norm=0"
    ):
        LowMemTrainingArguments(**common, lowmem_weights="int8_sr")
    with pytest.raises(ValueError, match=r"lowmem_weights='int8' is not available.*'int8_sr'"):
        LowMemTrainingArguments(**common, lowmem_weights="int8")


@pytest.mark.parametrize(
    ("dtype", "lora", "message"),
    [
        (torch.float32, False, r"lowmem_weights='int8_sr' has no effect.*float32 weights"),
        (BF16, True, r"lowmem_weights='int8_sr' cannot be combined with adapters"),
    ],
)
def test_refused_when_the_trainer_is_made(dtype: torch.dtype, lora: bool, message: str, tokenizer: Any) -> None:
    args = LowMemSFTConfig(
        "unused", use_cpu=True, bf16=False, report_to="none", optim="adamw", gradient_checkpointing=False, **INT8
    )
    adapters: Any = LoraConfig(r=4, target_modules="all-linear") if lora else None
    with pytest.raises(ValueError, match=message):
        LowMemSFTTrainer(
            tiny_llama(dtype=dtype), args=args, train_dataset=token_data(4), processing_class=tokenizer,
            peft_config=adapters,
        )  # fmt: skip
