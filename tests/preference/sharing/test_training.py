"""Through the trainer: with `lowmem_share_prompt` it trains as without, whatever the loss and the reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer
from hf_lowmem.preference.sharing.layout import KEYS
from hf_lowmem.preference.sharing.share import SharedForward, backbone_of
from tests.conftest import tiny_llama
from tests.training.test_trainers import losses, pair_data, settings

SHARED: dict[str, Any] = {"lowmem_share_prompt": True}
PACKED = SHARED | {"lowmem_pack_tokens": 64}
# A few steps of SGD, which passes rounding on as it is, from log-probabilities that are sums below 64 (an ulp: 3.8e-6).
ROUNDING = 2e-5


class Seen:
    """Tokens that a model has embedded."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self.add)

    def add(self, module: Any, args: Any, output: Any) -> None:
        self.tokens += output.shape[:-1].numel()


def trainer(tmp_path: Path, tokenizer: Any, **kwargs: Any) -> Any:
    """`kwargs` of the trainer, and fields."""
    own = {k: kwargs.pop(k) for k in ("ref_model", "peft_config", "eval_dataset", "compute_metrics") if k in kwargs}
    data, model = kwargs.pop("train_dataset", None), kwargs.pop("model", None)
    fields = {"max_length": 32, "optim": "sgd", "lowmem_reference": None, "max_steps": 2} | kwargs
    return LowMemDPOTrainer(
        tiny_llama(num_hidden_layers=2) if model is None else model,
        args=settings(LowMemDPOConfig, tmp_path, **fields),
        train_dataset=pair_data() if data is None else data,
        processing_class=tokenizer,
        **own,
    )


def reference() -> Any:
    return tiny_llama(1, num_hidden_layers=2)


# what: (fields, objects made anew for each trainer)
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo, full reference": ({}, {"ref_model": reference}),
    "dpo, precomputed reference": ({"lowmem_reference": "precomputed"}, {"ref_model": reference}),
    "dpo, adapter": ({}, {"peft_config": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)}),
    "dpo, quantized reference": (
        {"lowmem_reference": "quantized"},
        {"model": lambda: tiny_llama(intermediate_size=128)},
    ),
    "ipo and sft": ({"loss_type": ["ipo", "sft"]}, {"ref_model": reference}),
    "ld_alpha": ({"ld_alpha": 0.5}, {"ref_model": reference}),
    "wpo": ({"use_weighting": True}, {"ref_model": reference}),
    "asft": ({"loss_type": "asft"}, {}),
    "dpo and orpo": ({"loss_type": ["sigmoid", "orpo"]}, {"ref_model": reference}),
    "simpo": ({"loss_type": "simpo"}, {}),
    "asft, checkpointing": ({"loss_type": "asft", "gradient_checkpointing": True}, {}),
    "asft, exact tier": ({"loss_type": "asft", "lowmem_activations": "exact"}, {}),
    "asft, workers": ({"loss_type": "asft", "dataloader_num_workers": 1}, {}),
}


@pytest.mark.train
@pytest.mark.parametrize(("way", "sharing"), [*((way, PACKED) for way in WAYS), ("asft", SHARED)], ids=str)
def test_training_is_the_same(tmp_path: Path, tokenizer: Any, way: str, sharing: dict[str, Any]) -> None:
    fields, objects = WAYS[way]
    logs, tokens, weights = [], [], []
    for extra in ({}, sharing):
        made = trainer(tmp_path, tokenizer, **fields, **extra, **{k: make() for k, make in objects.items()})
        seen = Seen(made.model)
        made.train()
        logs.append([{k: v for k, v in row.items() if "loss" in row} for row in made.state.log_history])
        tokens.append(seen.tokens)
        weights.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    assert losses(made), "nothing was trained"
    assert tokens[1] < tokens[0]
    for plain, shared in zip(*logs, strict=True):
        assert plain.keys() == shared.keys()
        assert {k: v for k, v in plain.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in shared.items() if isinstance(v, float)}, abs=ROUNDING, rel=ROUNDING
        )
    torch.testing.assert_close(weights[1], weights[0], atol=ROUNDING, rtol=0)


@pytest.mark.train
def test_the_reference_model_shares_too(tmp_path: Path, tokenizer: Any) -> None:
    counts = []
    for extra in ({}, SHARED):
        ref_model = reference()
        made = trainer(tmp_path, tokenizer, ref_model=ref_model, max_steps=1, **extra)
        seen = Seen(ref_model)
        made.train()
        counts.append(seen.tokens)
    assert 0 < counts[1] < counts[0]


@pytest.mark.parametrize("stream", [False, True])
def test_the_reference_shares_while_it_is_precomputed(tmp_path: Path, tokenizer: Any, stream: bool) -> None:
    counts = []
    for i, extra in enumerate(({}, SHARED)):
        data: Any = pair_data(8)
        model = tiny_llama(num_hidden_layers=2)
        seen = Seen(model)
        trainer(
            tmp_path / str(i), tokenizer, model=model, lowmem_reference="precomputed", **extra,
            train_dataset=data.to_iterable_dataset() if stream else data,
        )  # fmt: skip
        trial = 36 + 22 if extra else 0
        counts.append(seen.tokens - trial)
    assert 0 < counts[1] < counts[0]


def test_evaluation_is_the_same(tmp_path: Path, tokenizer: Any) -> None:
    found = []
    for extra in ({}, PACKED):
        shapes = []

        def metrics(prediction: Any, shapes: list[Any] = shapes) -> dict[str, float]:
            logits, ids = prediction.predictions, prediction.label_ids
            shapes.append(logits.shape)
            return {"right": float((logits[:, :-1].argmax(-1) == ids[:, 1:])[:, :3].mean())}

        made = trainer(
            tmp_path, tokenizer, **extra, ref_model=reference(), eval_dataset=pair_data(6), compute_metrics=metrics,
            per_device_eval_batch_size=2,
        )  # fmt: skip
        found.append({k: v for k, v in made.evaluate().items() if "second" not in k and "runtime" not in k})
        found[-1]["shapes"] = shapes
    plain, shared = found
    assert plain.pop("shapes") == shared.pop("shapes") != []
    assert plain == pytest.approx(shared, abs=ROUNDING, rel=ROUNDING)


@pytest.mark.train
def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path, tokenizer: Any) -> None:
    weights = []
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        made = trainer(
            tmp_path, tokenizer, **PACKED, loss_type="asft", max_steps=1, per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps, max_grad_norm=0.0, learning_rate=1.0,
        )  # fmt: skip
        made.train()
        weights.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(weights[2], weights[0], atol=ROUNDING, rtol=0)


def test_batches_are_the_same_pairs_and_bring_the_layout(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, **SHARED, loss_type="asft", pad_to_multiple_of=8)
    batch = made.data_collator([made.train_dataset[i] for i in range(3)])
    assert set(KEYS) < set(batch)
    assert next(iter(batch)) == "input_ids", "the batch size is read from the first entry"
    assert batch[KEYS[0]].shape[0] == 3
    assert batch[KEYS[0]].shape[1] % 8 == 0


@pytest.mark.train
def test_a_dataset_whose_completions_are_one_token(tmp_path: Path, tokenizer: Any) -> None:
    data = Dataset.from_dict({"prompt": ["w1 w2 "] * 4, "chosen": ["w3"] * 4, "rejected": ["w4"] * 4})
    made = trainer(tmp_path, tokenizer, **SHARED, loss_type="asft", max_steps=1, train_dataset=data)
    made.train()
    assert losses(made)[0] > 0


def test_nothing_is_patched_unless_asked(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, loss_type="asft")
    assert "forward" not in vars(backbone_of(made.model))
    assert not set(KEYS) & set(made.data_collator([made.train_dataset[0]]))
    made = trainer(tmp_path, tokenizer, loss_type="asft", **SHARED)
    assert isinstance(vars(backbone_of(made.model))["forward"], SharedForward)


@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_a_model_that_is_not_exact_is_refused(tmp_path: Path, tokenizer: Any, whose: str) -> None:
    models = {"model": tiny_llama(), "ref_model": tiny_llama(1)}
    models["model" if whose == "policy" else "ref_model"].config.attention_chunk_size = 16
    with pytest.raises(ValueError, match=r"lowmem_share_prompt=True with LlamaModel.*attention_chunk_size=16"):
        trainer(tmp_path, tokenizer, **SHARED, **models)
    for model in models.values():
        assert "forward" not in vars(backbone_of(model)), "nothing is patched before everything is checked"


@pytest.mark.train
def test_a_saved_model_is_a_plain_one(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, loss_type="asft", **SHARED, max_steps=1)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    again = type(made.model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made.model.parameters(), strict=True))
