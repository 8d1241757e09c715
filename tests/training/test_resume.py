"""Save at step 3, resume to 6: the same bits as a run that was never interrupted, in every trainer.

tests/contracts holds each method with each codec to the same promise; here are the ways of a checkpoint through
transformers, trl and accelerate. What is marked slow has every two of trainer, method, codec and store together.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowmem import (
    LowMemDPOConfig,
    LowMemDPOTrainer,
    LowMemSFTConfig,
    LowMemSFTTrainer,
    LowMemTrainer,
    LowMemTrainingArguments,
)
from hf_lowmem.codecs import CODECS
from hf_lowmem.optim import OPTIMIZERS
from tests.conftest import tiny_llama
from tests.contracts.test_optimizers import same_bits
from tests.training.test_trainers import pair_data, token_data

TRAINERS: dict[str, tuple[Any, Any]] = {
    "Trainer": (LowMemTrainer, LowMemTrainingArguments),
    "SFTTrainer": (LowMemSFTTrainer, LowMemSFTConfig),
    "DPOTrainer": (LowMemDPOTrainer, LowMemDPOConfig),
}


def make(kind: str, folder: Path, dtype: torch.dtype, tokenizer: Any, **kwargs: Any) -> Any:
    trainer_class, config = TRAINERS[kind]
    args = config(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=6, save_steps=3,
        logging_steps=1, per_device_train_batch_size=2, learning_rate=5e-3, warmup_steps=2, weight_decay=0.1,
        gradient_checkpointing=False, **{"gradient_accumulation_steps": 2, **kwargs},
    )  # fmt: skip
    # Two layers and dropout, so that the order of states and the random numbers of the host must come back as well.
    model = tiny_llama(dtype=dtype, num_hidden_layers=2, attention_dropout=0.1)
    data = pair_data(16) if kind == "DPOTrainer" else token_data(16)  # an epoch is four steps
    extra = {} if kind == "Trainer" else {"processing_class": tokenizer}
    return trainer_class(model, args=args, train_dataset=data, **extra)


def check_step_in_backward(folder: Path, tokenizer: Any, fields: dict[str, Any]) -> None:
    """A training with a step in backward ends in the weights of one without."""
    fields = fields | {"optim": "adamw", "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}
    found = []
    for stepping in (False, True):
        own = fields | {"lowmem_step_in_backward": stepping}
        trainer = make("Trainer", folder / str(stepping), torch.float32, tokenizer, **own)
        trainer.train()
        found.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *found))


BF16 = torch.bfloat16
# Dtype of the weights, and how they are stored.
STORES = ((torch.float32, "keep"), (BF16, "keep"), (BF16, "bf16_sr"), (BF16, "bf16_ecc"))
FACTORS = (list(TRAINERS), list(OPTIMIZERS), [*CODECS, "8bit"], STORES)
Case = tuple[str, str, str, torch.dtype, str]


def covering(factors: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Rows in which any two values of two factors meet, in nearly as few rows as the two largest factors have pairs.

    Greedy: a row begins with a pair that has not met, and takes of each other factor the value that meets most anew.
    """
    pairs = itertools.combinations(range(len(factors)), 2)
    open_pairs = {(i, a, j, b) for i, j in pairs for a in range(len(factors[i])) for b in range(len(factors[j]))}
    rows = []
    while open_pairs:
        i, a, j, b = min(open_pairs)
        row = {i: a, j: b}
        for k in (k for k in range(len(factors)) if k not in row):
            met = [sum((*sorted([(k, v), q])[0], *sorted([(k, v), q])[1]) in open_pairs for q in row.items())
                   for v in range(len(factors[k]))]  # fmt: skip
            row[k] = met.index(max(met))
        open_pairs -= {(x, row[x], y, row[y]) for x, y in itertools.combinations(sorted(row), 2)}
        rows.append(tuple(factor[row[k]] for k, factor in enumerate(factors)))
    return rows


# Each method in two trainers, in turn with each store; each codec with one method.
CASES: list[Case] = [
    *(
        (list(TRAINERS)[(i + n) % 3], name, "8bit", *STORES[(i + 3 * n) % 4])
        for n in (0, 1)
        for i, name in enumerate(OPTIMIZERS)
    ),
    *(("Trainer", "adamw", codec, torch.float32, "keep") for codec in CODECS),
]
REST: list[Case] = [case for *most, store in covering(FACTORS) if (case := (*most, *store)) not in CASES]


@pytest.mark.train
@pytest.mark.parametrize(
    ("kind", "optim", "codec", "dtype", "store"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in REST)]
)
def test_resume_is_uninterrupted(
    kind: str, optim: str, codec: str, dtype: torch.dtype, store: str, tmp_path: Path, tokenizer: Any
) -> None:
    settings: dict[str, Any] = {"optim": optim, "lowmem_state": codec, "lowmem_weights": store}
    defaults = OPTIMIZERS[optim].DEFAULTS
    if "update_gap" in defaults:
        settings["lowmem_update_gap"] = 2  # a refresh on either side of the save
    if defaults.get("rank", 0) > 8:
        settings["lowmem_rank"] = 8
    if kind == "DPOTrainer":
        settings |= {"loss_type": "asft", "disable_dropout": False}
    whole = make(kind, tmp_path, dtype, tokenizer, **settings)
    whole.train()
    assert whole.state.global_step == 6

    resumed = make(kind, tmp_path, dtype, tokenizer, **settings)
    start = [p.detach().clone() for p in resumed.model.parameters()]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    pairs = list(zip(whole.model.parameters(), resumed.model.parameters(), start, strict=True))
    assert all(p.dtype == dtype for p, _, _ in pairs)
    assert all(torch.equal(p, q) for p, q, _ in pairs)
    assert not any(torch.equal(p, s) for p, _, s in pairs if p.ndim == 2)
    states = [t.optimizer.optimizer.state_dict() for t in (whole, resumed)]
    assert same_bits(*states)
    assert all(s["step"] == 6 for s in states[1]["state"].values())
    history = [
        {k: v for k, v in row.items() if k in ("loss", "grad_norm", "learning_rate")}
        for t in (whole, resumed)
        for row in t.state.log_history
        if "loss" in row
    ]
    assert history[: len(history) // 2] == history[len(history) // 2 :]


def test_every_two_values_meet() -> None:
    rows = covering(FACTORS)
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(FACTORS[i], FACTORS[j]))
    assert len(rows) <= 1.3 * len(OPTIMIZERS) * (len(CODECS) + 1)
    assert {(kind, dtype, store) for kind, _, _, dtype, store in CASES} == {
        (kind, *store) for kind, store in itertools.product(TRAINERS, STORES)
    }


@pytest.mark.train
@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(["fp32", "int8"])))
def test_resuming_with_another_codec_is_refused(a: str, b: str, tmp_path: Path, tokenizer: Any) -> None:
    make("Trainer", tmp_path, torch.float32, tokenizer, optim="adamw", lowmem_state=a).train()
    other = make("Trainer", tmp_path, torch.float32, tokenizer, optim="adamw", lowmem_state=b)
    with pytest.raises(ValueError, match=f"made with state='{a}', this optimizer has state='{b}'"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.train
def test_the_saved_optimizer_is_tensors(tmp_path: Path, tokenizer: Any) -> None:
    """The optimizer's part of a checkpoint holds tensors alone."""
    trainer = make("Trainer", tmp_path, torch.bfloat16, tokenizer, optim="apollo_mini", lowmem_state="fp8_expand")
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    kinds = {type(v) for state in saved["state"].values() for v in state.values()}
    assert kinds == {torch.Tensor}
    assert {v.dtype for s in saved["state"].values() for k, v in s.items() if k.endswith("codes")} == {torch.uint8}
