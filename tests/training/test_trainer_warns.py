"""A tier that keeps more than the checkpointing it switches off says so, with both numbers; there is no false alarm."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem.activations import kept_beside_inputs, rehearsal
from hf_lowmem.memory import measure_saved
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import build
from tests.conftest import tiny_llama
from tests.training.test_trainer_activations import make

SAID = re.compile(r"keeps more: ([\d,]+) bytes a token in all layers, where checkpointing keeps ([\d,]+)")


def numbers(caplog: pytest.LogCaptureFixture) -> list[tuple[int, int]]:
    found = SAID.findall(caplog.text)
    return [(int(kept.replace(",", "")), int(inputs.replace(",", ""))) for kept, inputs in found]


@pytest.mark.parametrize(
    ("kind", "tiers"),
    [
        ("SFTTrainer", "fp8"),
        ("SFTTrainer", "exact"),
        ("SFTTrainer", "hooks_fp8"),
        ("SFTTrainer", "fp8:0"),  # the other layer was checkpointed, too
        ("DPOTrainer", "fp8_recompute"),
    ],
)
def test_trl_s_checkpointing_is_compared(
    kind: str, tiers: str, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"loss_type": "asft"} if kind == "DPOTrainer" else {}
    trainer = make(kind, tmp_path, tokenizer, lowmem_activations=tiers, **settings)
    ((kept, inputs),) = numbers(caplog)
    hidden = trainer.model.config.hidden_size
    assert inputs == 2 * hidden * 4, "two layers' inputs in fp32"
    assert kept > inputs
    assert "lowmem_activations='checkpoint_fp8'" in caplog.text
    assert len(numbers(caplog)) == 1


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("SFTTrainer", {"lowmem_activations": "checkpoint_fp8"}),
        ("SFTTrainer", {"lowmem_activations": "fp8", "gradient_checkpointing": False}),  # he had none
        ("Trainer", {"lowmem_activations": "fp8"}),  # transformers' default is none
        ("SFTTrainer", {}),
    ],
)
def test_there_is_no_false_alarm(
    kind: str, fields: dict[str, Any], tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make(kind, tmp_path, tokenizer, **fields)
    assert "keeps more" not in caplog.text


def test_a_mixture_that_keeps_less_is_no_alarm(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(num_hidden_layers=16)
    tiers = "fp8_recompute:0,checkpoint_fp8:1-"
    make("SFTTrainer", tmp_path, tokenizer, model=model, lowmem_activations=tiers)
    assert "keeps more" not in caplog.text


def test_what_cannot_be_counted_is_said_without_numbers(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(num_hidden_layers=2)
    forward = model.forward

    def only_embeddings(input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            raise TypeError("this model wants labels")
        return forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    model.forward = only_embeddings
    make("SFTTrainer", tmp_path, tokenizer, model=model, lowmem_activations="fp8")
    assert "more than each layer's input (not counted: TypeError)" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("tier", ["exact", "fp8", "checkpoint_fp8"])
def test_the_numbers_are_those_of_a_step(family: str, tier: str) -> None:
    """Of all layers together, beside what they really keep in a forward pass of the whole model."""
    model = build(family)
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with rehearsal(model, ActivationSpec(tiers=tier)) as report:
        kept, inputs = kept_beside_inputs(model, report)
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in model.modules()] == modes
        ids = torch.arange(64)[None] % 96
        with measure_saved(model) as saved:
            out = model(input_ids=ids, use_cache=False)
            inside = {n: size for n, size in saved.by_module_now.items() if re.search(r"\.(layers|h)\.\d", n)}
    assert out.logits.requires_grad
    assert inputs == 2 * 64 * 4
    assert sum(inside.values()) / 64 == pytest.approx(kept, rel=0.12)


def test_the_table_of_the_readme(tmp_path: Path) -> None:
    """In units of a layer's input: 11.4, 5.9, 3.2 and 0.51 for a layer of Llama-2-7B's shape."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=96, num_attention_heads=2, **sizes, dtype=torch.bfloat16)
    model: Any = LlamaForCausalLM._from_config(config)
    assert model.dtype == torch.bfloat16
    for tier, expected in (("exact", 11.4), ("fp8", 5.9), ("fp8_recompute", 3.2), ("checkpoint_fp8", 0.51)):
        with rehearsal(model, ActivationSpec(tiers=tier)) as report:
            kept, inputs = kept_beside_inputs(model, report)
        assert kept / inputs == pytest.approx(expected, rel=0.1)
