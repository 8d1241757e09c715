"""Both ends of a long sequence: no copy of all tokens in fp32, TRL's bits and metrics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig
from trl.trainer import utils as trl_utils

from hf_lowmem import LowMemSFTConfig
from hf_lowmem.activations import ends
from hf_lowmem.planner import plan
from hf_lowmem.training import head, head_blocks
from tests.conftest import tiny_llama
from tests.training.heads import in_backward, train, without
from tests.training.test_head import Largest
from tests.training.test_trainers import settings

pytestmark = pytest.mark.train

TOKENS, HIDDEN, VOCABULARY = 120, 16, 96


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence is a long one: beside tiles of 8 tokens and of 32 entries of the vocabulary."""
    monkeypatch.setattr(head_blocks, "SUM_BYTES", 0)
    monkeypatch.setattr(head_blocks.chunked_logprob, "TOKEN_CHUNK_SIZE", 8)
    monkeypatch.setattr(ends, "TILE", 5)


def gradients(function: Any, dtype: torch.dtype, frozen: bool, bias: bool) -> tuple[list[Tensor], int]:
    """Gradients of a head's inputs, and the values of the largest fp32 tensor that its backward pass makes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HIDDEN), True), ((VOCABULARY, HIDDEN), not frozen), ((VOCABULARY,), True)
    hidden, weight, last = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(wanted) for shape, wanted in shapes
    )
    targets = torch.arange(TOKENS) * 7 % VOCABULARY
    settings = targets, 0.9, 32, 2.0, 1.1, ("entropy",)
    logps, entropy, *_ = function.apply(hidden, weight, last if bias else None, *settings)
    inputs = [t for t in (hidden, weight, *([last] if bias else [])) if t.requires_grad]
    with Largest(torch.float32) as largest:
        found = torch.autograd.grad((logps * targets).sum() + entropy.sum(), inputs)
    return list(found), largest.values


class Unstepped:
    """A trainer of nothing."""

    model = torch.nn.Module()
    stepping = None


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> head.BlockedHead:
    trainer: Any = Unstepped()
    made = head.BlockedHead(trainer)
    monkeypatch.setattr(head, "_standing", [made])
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("frozen", "bias"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_heads_gradients_have_trls_bits(
    blocks: int, frozen: bool, bias: bool, dtype: torch.dtype, long: None, standing: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(head, "rows_of_block", lambda weight, tile, unit=1: VOCABULARY // blocks)
    theirs, before = gradients(head.TheirFunction, dtype, frozen, bias)
    ours, after = gradients(head.HeadFunction, dtype, frozen, bias)
    assert all(map(torch.equal, ours, theirs))
    assert len(ours) == len(theirs) == 3 - frozen - (not bias)
    assert before == TOKENS * HIDDEN
    assert after < before or dtype == torch.float32


FIELDS: dict[str, dict[str, Any]] = {
    "sft": {"optim": "adamw_torch"},
    "in_backward": in_backward(),
    "dft": {"optim": "adamw_torch", "loss_type": "dft"},
    "dpo": {"optim": "adamw_torch", "loss_type": "sigmoid"},
    "tied": {"optim": "adamw_torch"},
    "lora": {"optim": "adamw_torch"},
}


@pytest.mark.parametrize("compact", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("case", FIELDS)
def test_a_training_of_long_sequences_has_trls_losses_and_metrics(
    case: str, compact: bool, long: None, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that are not trained on and padding among them; `compact`: only positions with a label are scored, as on
    a GPU. In the first step all numbers are TRL's, to the bit."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact)

    def rows() -> list[dict[str, Any]]:
        model = tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=case == "tied")
        lora: dict[str, Any] = {"peft_config": LoraConfig(target_modules="all-linear")} if case == "lora" else {}
        made = train(tmp_path, model=model, lowmem_activations="checkpoint_fp8", **FIELDS[case], **lora)
        ours.append(made)
        return [
            {k: v for k, v in row.items() if "second" not in k and k != "train_runtime"}
            for row in made.state.log_history
        ]

    ours: list[Any] = []
    found = rows()
    without(monkeypatch)
    monkeypatch.setattr(ends, "TILE", 2**20)
    expected = rows()
    assert {k: v for k, v in found[0].items() if k != "grad_norm"} == {
        k: v for k, v in expected[0].items() if k != "grad_norm"
    }
    # Of the norm's weight alone another order of sums; bf16 weights then differ by a rounding.
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=2.0**-8)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2.0**-6)
    if case == "lora":  # whose head and norm are frozen
        assert found == expected


def test_a_plan_has_no_fp32_copy_of_all_tokens_at_the_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes beside weights, states and layers, in tokens x hidden x 2: 4 in place of 12 when backward begins."""
    tokens, hidden = 131_072, 128
    model: dict[str, Any] = {"vocab_size": 256, "hidden_size": hidden, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(**model, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    args = settings(LowMemSFTConfig, tmp_path, max_length=tokens, per_device_train_batch_size=1, optim="adamw")
    args = args.lowmem_replace(lowmem_activations="checkpoint_fp8")
    found = []
    for tile, sums in ((ends.TILE, 0), (2**30, 2**40)):
        monkeypatch.setattr(ends, "TILE", tile)
        monkeypatch.setattr(head_blocks, "SUM_BYTES", sums)
        points = [p for p in plan(config, args, dtype="bfloat16").timeline if p.step == 2 and "layers" not in p.module]
        parts = [p.parts.get("activations", 0) + p.parts["temporaries"] for p in points if p.phase == "backward"]
        found.append(max(parts) / (tokens * hidden * 2))
    assert found[0] < 5.2
    assert found[1] > 11
