"""`lowmem_offload="weights"` in trainers: the same training bit for bit, through saving, evaluation and the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.optim.zeroth import host_layers_of
from hf_lowmem.planner import plan
from tests.conftest import tiny_llama
from tests.planner.real import arguments, small_config
from tests.training.test_zeroth import LORA, pairs, settings, sft, texts, weights

HOSTED = {"lowmem_offload": "weights"}


def both(make: Any) -> list[Any]:
    """Trainers without and with it, trained."""
    made: list[Any] = []
    for hosted in ({}, HOSTED):  # one after the other: a trainer seeds torch's random numbers when it is made
        made.append(make(**hosted))
        made[-1].train()
    assert host_layers_of(made[0].model) is None
    assert host_layers_of(made[1].model) is not None
    return made


def losses(trainer: Any) -> list[Any]:
    wanted = ("loss", "eval_loss", "num_tokens", "lowmem/slope")
    return [{name: row[name] for name in wanted if name in row} for row in trainer.state.log_history]


def same(made: list[Any]) -> None:
    plain, hosted = made
    assert losses(plain) == losses(hosted)
    assert all(torch.equal(p, q) for p, q in zip(weights(plain), weights(hosted), strict=True))


@pytest.mark.train
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "optim": "fzoo", "learning_rate": 1e-6}])
def test_a_training_is_the_same_bit_for_bit(changes: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    """With a rate that falls, and dropout."""
    same(both(lambda **hosted: sft(tmp_path, tokenizer, lr_scheduler_type="linear", **changes, **hosted)))


@pytest.mark.train
def test_a_layer_comes_once_a_micro_batch_and_once_at_the_end(tmp_path: Path, tokenizer: Any) -> None:
    """The report of the first step looks at all weights, which is one trip more."""
    visits = []
    for steps in (3, 6):
        trainer = sft(tmp_path, tokenizer, max_steps=steps, **HOSTED)
        trainer.train()
        store = host_layers_of(trainer.model)
        assert store is not None
        visits.append(store.visits)
        assert not any(block.updates for block in store.blocks)
    assert visits[1] - visits[0] == 3 * 2
    assert visits[0] <= 2 * (3 + 2)


@pytest.mark.train
def test_what_is_saved_and_evaluated_has_all_updates(tmp_path: Path, tokenizer: Any) -> None:
    """And a run goes on from its checkpoint to the bit, with layers in host memory or without."""
    changes: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "max_length": 16,
    }  # fmt: skip

    def make(folder: str, **hosted: Any) -> LowMemSFTTrainer:
        args = LowMemSFTConfig(**settings(tmp_path / folder, **changes, **hosted))
        return LowMemSFTTrainer(
            tiny_llama(num_hidden_layers=2), args=args, train_dataset=texts(), eval_dataset=texts(4),
            processing_class=tokenizer,
        )  # fmt: skip

    made = both(lambda **hosted: make("hosted" if hosted else "plain", **hosted))
    same(made)
    files = [load_file(tmp_path / folder / "checkpoint-2" / "model.safetensors") for folder in ("plain", "hosted")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    for hosted in ({}, HOSTED):
        resumed = make("hosted", **hosted)
        resumed.train(resume_from_checkpoint=str(tmp_path / "hosted" / "checkpoint-2"))
        assert all(torch.equal(p, q) for p, q in zip(weights(made[1]), weights(resumed), strict=True))


@pytest.mark.train
def test_adapters_and_what_they_stand_on_wait_together(tmp_path: Path, tokenizer: Any) -> None:
    made = both(lambda **hosted: sft(tmp_path, tokenizer, tiny_llama(), LORA, **hosted))
    same(made)
    store = host_layers_of(made[1].model)
    assert store is not None
    assert any(not p.requires_grad for p in store.blocks[0].parameters())


@pytest.mark.train
@pytest.mark.parametrize("peft_config", [None, LORA])
def test_preference_losses_are_the_same(peft_config: Any, tmp_path: Path, tokenizer: Any) -> None:
    """With adapters the reference is the same model, whose layers come a second time."""

    def make(**hosted: Any) -> LowMemDPOTrainer:
        args = LowMemDPOConfig(**settings(tmp_path, max_length=16, **hosted))
        return LowMemDPOTrainer(
            tiny_llama(num_hidden_layers=2), args=args, train_dataset=pairs(), processing_class=tokenizer,
            peft_config=peft_config,
        )  # fmt: skip

    same(both(make))


@pytest.mark.train
def test_a_plan_counts_two_layers_on_the_device_and_all_on_the_host() -> None:
    """Layers of the same kind, two more of them: as much on the device, two more on the host."""
    fields: dict[str, Any] = {"optim": "mezo", "max_grad_norm": 0, "lowmem_weights": "bf16_sr"}
    few, many = (
        plan(small_config(num_hidden_layers=layers), arguments(**fields, **HOSTED), dtype="bfloat16")
        for layers in (3, 5)
    )
    assert few.peak_bytes == many.peak_bytes
    assert 3 * many.host_bytes == 5 * few.host_bytes
    plain = plan(small_config(), arguments(**fields), dtype="bfloat16")
    assert few.parts["weights"] == plain.parts["weights"] - few.host_bytes


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a first-order method": ({"optim": "adamw"}, "a backward pass needs each layer's weights again"),
    "HuggingFace's": ({"optim": "adamw_torch"}, "a backward pass needs each layer's weights again"),
    "states": ({"optim": "zo_adam"}, "its states would stay on the device"),
    "corrections": ({"lowmem_weights": "bf16_ecc"}, "the 8 bits beside each weight"),
    "tiers": ({"lowmem_activations": "checkpoint_fp8"}, "nothing is kept for a backward pass"),
    "a typing error": ({"lowmem_offload": "weight"}, "Did you mean 'weights'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(case: str, tmp_path: Path) -> None:
    changes, said = WRONG[case]
    with pytest.raises(ValueError) as caught:
        LowMemSFTConfig(**settings(tmp_path, **{**HOSTED, **changes}))
    assert said in str(caught.value), str(caught.value)
