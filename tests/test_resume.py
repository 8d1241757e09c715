"""Save at step 6, resume to 12: the same bits as a run that was never interrupted, in every trainer.

tests/contracts holds each method with each codec to the same promise; here are the ways of a checkpoint through
transformers, trl and accelerate. The whole product is marked slow.
"""

import itertools
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
from tests.test_trainers import pair_data, token_data

TRAINERS: dict[str, tuple[Any, Any]] = {
    "Trainer": (LowMemTrainer, LowMemTrainingArguments),
    "SFTTrainer": (LowMemSFTTrainer, LowMemSFTConfig),
    "DPOTrainer": (LowMemDPOTrainer, LowMemDPOConfig),
}


def make(kind: str, folder: Path, dtype: torch.dtype, tokenizer: Any, **kwargs: Any) -> Any:
    trainer_class, config = TRAINERS[kind]
    args = config(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=12, save_steps=6,
        logging_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=5e-3,
        warmup_steps=2, weight_decay=0.1, gradient_checkpointing=False, **kwargs,
    )  # fmt: skip
    # Two layers and dropout, so that the order of states and the random numbers of the host must come back as well.
    model = tiny_llama(dtype=dtype, num_hidden_layers=2, attention_dropout=0.1)
    data = pair_data(40) if kind == "DPOTrainer" else token_data(40)
    extra = {} if kind == "Trainer" else {"processing_class": tokenizer}
    return trainer_class(model, args=args, train_dataset=data, **extra)


BF16 = torch.bfloat16
# (trainer, method, codec, dtype, weight store)
CASES = [
    *(("Trainer", name, "8bit", dtype, "keep") for name in OPTIMIZERS for dtype in (torch.float32, BF16)),
    *(("Trainer", "adamw", codec, torch.float32, "keep") for codec in CODECS),
    *(("SFTTrainer", name, "8bit", BF16, "bf16_sr") for name in OPTIMIZERS),
    *(("DPOTrainer", name, "8bit", BF16, "bf16_ecc") for name in OPTIMIZERS),
]
REST = [
    case
    for kind, name, codec in itertools.product(TRAINERS, OPTIMIZERS, [*CODECS, "8bit"])
    for dtype, stores in ((torch.float32, ("keep",)), (BF16, ("keep", "bf16_sr", "bf16_ecc")))
    for case in [(kind, name, codec, dtype, store) for store in stores]
    if case not in CASES
]


@pytest.mark.parametrize(
    ("kind", "optim", "codec", "dtype", "store"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in REST)]
)
def test_resume_is_uninterrupted(
    kind: str, optim: str, codec: str, dtype: torch.dtype, store: str, tmp_path: Path, tokenizer: Any
) -> None:
    settings: dict[str, Any] = {"optim": optim, "lowmem_state": codec, "lowmem_weights": store}
    defaults = OPTIMIZERS[optim].DEFAULTS
    if "update_gap" in defaults:
        settings["lowmem_update_gap"] = 4  # a refresh on either side of the save
    if defaults.get("rank", 0) > 8:
        settings["lowmem_rank"] = 8
    if kind == "DPOTrainer":
        settings |= {"loss_type": "asft", "disable_dropout": False}
    whole = make(kind, tmp_path, dtype, tokenizer, **settings)
    whole.train()
    assert whole.state.global_step == 12

    resumed = make(kind, tmp_path, dtype, tokenizer, **settings)
    start = [p.detach().clone() for p in resumed.model.parameters()]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 12
    pairs = list(zip(whole.model.parameters(), resumed.model.parameters(), start, strict=True))
    assert all(p.dtype == dtype for p, _, _ in pairs)
    assert all(torch.equal(p, q) for p, q, _ in pairs)
    assert not any(torch.equal(p, s) for p, _, s in pairs if p.ndim == 2)
    states = [t.optimizer.optimizer.state_dict() for t in (whole, resumed)]
    assert same_bits(*states)
    assert all(s["step"] == 12 for s in states[1]["state"].values())
    history = [
        {k: v for k, v in row.items() if k in ("loss", "grad_norm", "learning_rate")}
        for t in (whole, resumed)
        for row in t.state.log_history
        if "loss" in row
    ]
    assert history[: len(history) // 2] == history[len(history) // 2 :]


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(["fp32", "int8"])))
def test_resuming_with_another_codec_is_refused(a: str, b: str, tmp_path: Path, tokenizer: Any) -> None:
    make("Trainer", tmp_path, torch.float32, tokenizer, optim="adamw", lowmem_state=a).train()
    other = make("Trainer", tmp_path, torch.float32, tokenizer, optim="adamw", lowmem_state=b)
    with pytest.raises(ValueError, match=f"made with state='{a}', this optimizer has state='{b}'"):
        other.train(resume_from_checkpoint=True)


def test_the_saved_optimizer_is_tensors_and_plain_numbers(tmp_path: Path, tokenizer: Any) -> None:
    """The optimizer's part of a checkpoint holds tensors and plain numbers alone."""
    trainer = make("Trainer", tmp_path, torch.bfloat16, tokenizer, optim="apollo_mini", lowmem_state="fp8_expand")
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    kinds = {type(v) for state in saved["state"].values() for v in state.values()}
    assert kinds == {int, torch.Tensor}
    assert {v.dtype for s in saved["state"].values() for k, v in s.items() if k.endswith("codes")} == {torch.uint8}
