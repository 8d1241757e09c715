"""The output head's gradient by blocks: TRL's bits, without a gradient that exists whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer import utils as trl_utils

from hf_lowmem import LowMemSFTTrainer
from hf_lowmem.training import head_blocks
from hf_lowmem.training.head import BlockedHead
from hf_lowmem.weights import resting
from tests.conftest import tiny_llama
from tests.training.heads import TILE, in_backward, norms, same, train, without

pytestmark = pytest.mark.train

SLOW = pytest.mark.slow
MORE = [pytest.param(optim, loss, marks=SLOW) for optim, loss in [("adamw", "asft"), ("apollo_mini", "nll")]]


@pytest.mark.parametrize(("optim", "loss"), [("adamw", "nll"), ("apollo_mini", "asft"), ("lion", "nll"), *MORE])
def test_twenty_steps_have_the_bits_of_trls(
    optim: str, loss: str, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = in_backward(optim=optim, loss_type=loss, max_steps=20, learning_rate=1e-3)
    ours = train(tmp_path, **fields)
    assert ours.output_head.facts() == {"block_rows": TILE, "passes_by_rows": 20, "passes_whole": 0, "why": None}
    without(monkeypatch)
    theirs = train(tmp_path, **fields)
    same(ours, theirs)
    assert norms(ours) == pytest.approx(norms(theirs), rel=1e-5)  # another order of sums


@pytest.mark.parametrize("rule", [pytest.param("adam", marks=SLOW), "scale"])
def test_a_head_goes_by_blocks_beside_weights_at_rest(
    rule: str, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = in_backward(optim="apollo_mini", lowmem_weights="int8_sr", max_steps=20, learning_rate=1e-3)
    ours = train(tmp_path, lowmem_embeddings=rule, **fields)
    assert len(resting(ours.model)) == 1 + 7 * len(ours.model.model.layers)
    assert ours.output_head.facts()["passes_by_rows"] == 20
    without(monkeypatch)
    same(ours, train(tmp_path, lowmem_embeddings=rule, **fields))


@pytest.mark.parametrize("store", [pytest.param("keep", marks=SLOW), "bf16_ecc"])
def test_a_block_of_the_whole_vocabulary_has_them_too(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = in_backward(lowmem_weights=store, max_steps=20, learning_rate=1e-3)
    ours = train(tmp_path, **fields)
    assert ours.output_head.facts()["block_rows"] == 128
    without(monkeypatch)
    same(ours, train(tmp_path, **fields))


def test_blocks_within_a_tile_differ_by_the_order_of_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 throughout: the gradient of the hidden states is summed in other parts, a rounding of 2**-24 each."""
    fields = in_backward(lowmem_state="fp32", lowmem_weights="keep", adam_epsilon=1e-3, dtype=torch.float32)
    monkeypatch.setattr(head_blocks, "BLOCK_BYTES", 16 * 64 * 4)
    ours = train(tmp_path, **fields)
    assert ours.output_head.facts() == {"block_rows": 16, "passes_by_rows": 4, "passes_whole": 0, "why": None}
    without(monkeypatch)
    theirs = train(tmp_path, **fields)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [False, True])
def test_without_step_in_backward_blocks_are_written_into_the_gradient(
    rows: bool, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under HuggingFace's optimizer, too, and with tied embeddings."""
    fields: dict[str, Any] = {"optim": "adamw_torch", "max_steps": 20, "learning_rate": 1e-3}
    ours = train(tmp_path, model=tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=rows), **fields)
    assert ours.output_head.facts() == {
        "block_rows": TILE,
        "passes_by_rows": 0,
        "passes_whole": 20,
        "why": "lowmem_step_in_backward is off",
    }
    without(monkeypatch)
    same(ours, train(tmp_path, model=tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=rows), **fields))


@pytest.mark.parametrize("store", [pytest.param("keep", marks=SLOW), "bf16_ecc"])
@pytest.mark.parametrize("rule", ["scale", "adam_mini"])
def test_rules_of_a_row_are_stepped_by_rows(
    rule: str, store: str, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = in_backward(optim="apollo_mini", lowmem_embeddings=rule, lowmem_weights=store, max_steps=8)
    ours = train(tmp_path, **fields)
    assert ours.output_head.facts()["passes_by_rows"] == 8
    without(monkeypatch)
    same(ours, train(tmp_path, **fields))


@pytest.mark.parametrize(
    "loss", ["orpo", *[pytest.param(name, marks=SLOW) for name in ("simpo", "cpo", "dft")], "sigmoid"]
)
def test_every_loss_that_goes_through_the_head(
    loss: str, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = in_backward(optim="apollo_mini", loss_type=loss)
    ours = train(tmp_path, **fields)
    assert ours.output_head.facts()["passes_by_rows"] == 4
    without(monkeypatch)
    same(ours, train(tmp_path, **fields))


@pytest.mark.parametrize("reference", ["precomputed", "full"])
def test_every_reference_model_is_left_alone(
    reference: str, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = in_backward(loss_type=["sigmoid", "asft"], lowmem_reference=reference)
    ours = train(tmp_path, **fields)
    assert ours.output_head.facts()["passes_by_rows"] == 4
    without(monkeypatch)
    same(ours, train(tmp_path, **fields))


def test_prompts_alone_leave_nothing_to_score(tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the positions with a label are scored, as on a GPU, a batch may have none: its gradient is zero."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: True)
    ids = torch.arange(3, 11).tolist()
    rows = [{"input_ids": ids, "labels": ids if i % 4 else [-100] * 7 + [5]} for i in range(16)]
    fields = in_backward(loss_type="nll", per_device_train_batch_size=1, max_length=7, max_steps=8)
    monkeypatch.setattr(LowMemSFTTrainer, "_prepare_dataset", lambda self, dataset, *args: dataset)
    ours = train(tmp_path, data=Dataset.from_list(rows), **fields)
    assert ours.output_head.facts()["passes_by_rows"] == 8
    without(monkeypatch)
    same(ours, train(tmp_path, data=Dataset.from_list(rows), **fields))


class Largest(TorchDispatchMode):
    """The most values of a tensor (of one dtype, where it is given) that an operator has made."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.values, self.dtype = 0, dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor) or self.dtype not in (None, t.dtype):
                continue
            if t.untyped_storage()._cdata not in given:
                self.values = max(self.values, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("stepping", [True, False])
def test_nothing_of_the_size_of_the_weight_is_made(
    stepping: bool, tiles: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = Largest()
    inner = BlockedHead.backward

    def watched(*args: Any) -> Any:
        largest.values = 0  # states are made in the first step, and stay
        with largest:
            return inner(*args)

    monkeypatch.setattr(BlockedHead, "backward", watched)
    model = tiny_llama(dtype=torch.bfloat16, vocab_size=2048)
    fields: dict[str, Any] = in_backward() if stepping else {"optim": "adamw_torch"}
    train(tmp_path, model=model, max_steps=2, **fields)
    assert largest.values == (TILE * 64 if stepping else 2048 * 64)  # the block, or the gradient in bf16
