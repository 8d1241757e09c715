"""In a step of ours nothing of the size tokens × vocabulary lives but the fused head's tile: every tensor is seen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from trl.trainer import utils as trl_utils

from hf_lowmem.preference.losses import PREFERENCE_LOSSES
from tests.conftest import tiny_llama
from tests.preference.reference.runs import trainer
from tests.preference.reference.test_oracles import ORPOTrainer, batch_of, oracle

VOCABULARY, HIDDEN = 4 * trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, 8
BATCH = {"prompt": 4, "chosen": [12, 12], "rejected": [12, 12]}
ROWS, WIDTH = 4, 16


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation's result had, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.elements:
                self.elements, self.operation = leaf.numel(), str(func)
        return result


def model() -> Any:
    return tiny_llama(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1
    )


# The head's tile, on a device without Triton over every position but the last, and its weight with its gradient.
TILE = ROWS * (WIDTH - 1) * trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
ALLOWED = max(TILE, VOCABULARY * HIDDEN)
LOGITS = ROWS * WIDTH * VOCABULARY


@pytest.mark.parametrize("types", [*PREFERENCE_LOSSES, ["asft", "orpo", "simpo", "cpo", "sft"]], ids=str)
def test_no_logits_are_built(types: Any, tmp_path: Path, tokenizer: Any) -> None:
    assert 3 * ALLOWED < LOGITS, "else the logits would hide behind the tile"
    made = trainer(tmp_path, tokenizer, types, model=model())
    batch = batch_of(**BATCH)
    with Largest() as largest:
        made.compute_loss(made.model, batch).backward()
    assert 0 < largest.elements <= ALLOWED, largest.operation


def test_the_trace_sees_logits() -> None:
    """TRL's ORPO builds them, so the test above can fail."""
    with Largest() as largest:
        oracle(ORPOTrainer, model(), batch_of(**BATCH), beta=0.1)
    assert largest.elements >= LOGITS
