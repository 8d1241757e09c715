"""Streamed tiers in every trainer: the same training, by chunks, with hooks, in pairs and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig

from hf_lowmem import LowMemSFTConfig
from hf_lowmem.specs import STREAMED
from tests.conftest import tiny_llama
from tests.contracts.test_optimizers import same_bits, weights
from tests.preference.sharing.test_training import PACKED, ROUNDING, WAYS, trainer
from tests.training.test_trainer_activations import losses, make

STREAM: dict[str, Any] = {"lowmem_activations": "stream", "lowmem_stream_chunk": 5}


@pytest.mark.train
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Trainer", {}),
        ("SFTTrainer", {"packing": True, "max_length": 64}),
        ("DPOTrainer", {"loss_type": "asft"}),
        ("DPOTrainer", {"loss_type": "sigmoid", "lowmem_reference": "precomputed"}),
        ("DPOTrainer", {"loss_type": "orpo", "lowmem_share_prompt": True}),
        ("DPOTrainer", {"loss_type": "sigmoid", "lowmem_activations": "stream/2"}),
    ],
)
def test_it_is_the_same_training(kind: str, settings: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    """Beside a plain run without checkpointing; by plain steps along the gradient, which carry its error as it is."""
    runs = []
    for tiers in ({"gradient_checkpointing": False, "lowmem_activations": None}, STREAM | settings):
        trainer = make(kind, tmp_path, tokenizer, optim="sgd", **settings | tiers)
        trainer.train()
        runs.append(trainer)
    plain, ours = runs
    assert {layer.tier for layer in ours.activations.layers} == {"stream"}
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5)
    for p, q in zip(weights(ours.model), weights(plain.model), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [{}, PACKED], ids=["plain", "shared"])
@pytest.mark.parametrize("way", [w for w in (*WAYS, "cpo", "orpo") if not w.startswith("asft, ")])
def test_it_is_the_same_for_every_loss_and_reference(
    way: str, sharing: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    """With a pair's prompt twice, and once; LoRA is in the way whose reference is the model without its adapter."""
    fields, objects = WAYS.get(way, ({"loss_type": way}, {}))
    runs = []
    for extra in ({"gradient_checkpointing": False}, sharing | STREAM):
        made = trainer(tmp_path, tokenizer, **fields, **extra, **{k: make() for k, make in objects.items()})
        made.train()
        runs.append((losses(made), torch.cat([p.detach().flatten() for p in made.model.parameters()])))
    (plain, before), (ours, after) = runs
    assert plain
    assert ours == pytest.approx(plain, abs=ROUNDING, rel=ROUNDING)
    torch.testing.assert_close(after, before, atol=ROUNDING, rtol=0)


@pytest.mark.train
@pytest.mark.parametrize("tier", [*STREAMED, "stream_fp8/2"])
def test_a_step_in_backward_is_the_step_after_it(tier: str, tmp_path: Path, tokenizer: Any) -> None:
    runs = []
    for steps in (False, True):
        settings = {"optim": "adamw", "lowmem_state": "8bit", "max_grad_norm": 0.0, "lowmem_step_in_backward": steps}
        trainer = make("Trainer", tmp_path, tokenizer, **settings, **STREAM | {"lowmem_activations": tier})
        trainer.train()
        runs.append((weights(trainer.model), losses(trainer)))
    assert same_bits(*runs)


@pytest.mark.train
@pytest.mark.parametrize("tiers", ["stream_fp8:0,fp8:1", "stream_fp8/2"])
def test_a_resumed_run_has_the_same_bits(tiers: str, tmp_path: Path, tokenizer: Any) -> None:
    """With random rounding, whose seeds are of the step, and a dropout, whose masks are drawn chunk by chunk."""
    settings: dict[str, Any] = {
        "optim": "apollo_mini",
        "lowmem_state": "8bit",
        "lowmem_activations": tiers,
        "lowmem_stream_chunk": 7,
        "lowmem_activations_stochastic": True,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    model: dict[str, Any] = {"num_hidden_layers": 2, "attention_dropout": 0.1}
    whole = make("Trainer", tmp_path, tokenizer, model=tiny_llama(**model), **settings)
    whole.train()
    resumed = make("Trainer", tmp_path, tokenizer, model=tiny_llama(**model), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_bits(weights(whole.model), weights(resumed.model))


def test_no_warning_that_it_keeps_more_than_checkpointing(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make("SFTTrainer", tmp_path, tokenizer, **STREAM)
    assert "takes the place of the activation checkpointing" not in caplog.text


def test_rows_that_other_processes_have_parts_of_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    trainer = make("SFTTrainer", tmp_path, tokenizer, **STREAM)
    trainer.args.parallelism_config = ParallelismConfig(cp_size=2)
    with pytest.raises(ValueError, match=r"parallelism_config=.*'cp_size': 2.*cannot be combined with .*'stream'.*Set"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"lowmem_stream_chunk": 256}, ValueError, "lowmem_stream_chunk=256 has no effect without lowmem_activations"),
        ({"lowmem_stream_chunk": 256, "lowmem_activations": "exact"}, ValueError, "no effect with .*'exact'"),
        ({"lowmem_stream_chunk": 1.5, "lowmem_activations": "stream"}, TypeError, "lowmem_stream_chunk=1.5: expected"),
        (STREAM | {"gradient_checkpointing": True}, ValueError, "gradient_checkpointing=True cannot be combined"),
    ],
)
def test_bad_settings_are_errors_at_construction(values: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        LowMemSFTConfig("unused", use_cpu=True, bf16=False, **values)
