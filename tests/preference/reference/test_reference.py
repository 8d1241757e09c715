"""Each way to a reference gives the loss of a full one; what is loaded, kept, freed and read again is counted."""

import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from trl import DPOTrainer

from hf_lowmem import LowMemDPOTrainer
from hf_lowmem.preference.collate import pair_keys
from hf_lowmem.preference.reference.precomputed import ReferenceLogps
from tests.preference.reference.runs import assert_same, data, first_batch, loss_and_gradients, policy, trainer
from tests.training.test_trainers import losses

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # so that the adapter does something


def stream(rows: int = 16) -> IterableDataset:
    return data(rows).to_iterable_dataset()


@pytest.mark.train
@pytest.mark.parametrize("train", [data, stream], ids=["map", "iterable"])
@pytest.mark.parametrize(
    ("reference", "kind"), [("precomputed", "precomputed"), ("auto", "precomputed"), (None, "full")]
)
def test_the_same_loss_as_full(reference: str | None, kind: str, train: Any, tmp_path: Path, tokenizer: Any) -> None:
    runs = []
    for way in ("full", reference):
        made = trainer(
            tmp_path / str(way), tokenizer, ref_model=policy(1), train=train(8), evals=train(4), lowmem_reference=way,
            max_steps=8,
        )  # fmt: skip
        assert made.reference_kind == ("full" if way == "full" else kind)
        assert (made.ref_model is None) == (made.reference_kind == "precomputed")
        first = loss_and_gradients(made)
        before = made.evaluate()
        made.train()
        runs.append((first, before["eval_loss"], losses(made), made.evaluate()["eval_rewards/margins"]))
    assert_same(runs[1][0], runs[0][0], atol=1e-6)
    for got, want in zip(runs[1][1:], runs[0][1:], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)  # eight steps, two epochs: AdamW at 1e-2 spreads rounding


@pytest.mark.parametrize("train", [data, stream], ids=["map", "iterable"])
@pytest.mark.parametrize("given", ["a config", "a PEFT model"])
def test_an_adapter_s_reference(given: str, train: Any, tmp_path: Path, tokenizer: Any) -> None:
    """Without its adapter (or with the adapter that it came with), the policy is its own reference."""
    runs = {}
    for way in (None, "adapter", "auto", "precomputed"):
        torch.manual_seed(3)
        extra: dict[str, Any] = {"peft_config": LORA} if given == "a config" else {}
        model = policy() if extra else get_peft_model(policy(), LORA)
        made = trainer(
            tmp_path / str(way), tokenizer, model=model, train=train(), lowmem_reference=way, max_steps=4, extra=extra
        )
        assert made.reference_kind == ("precomputed" if way == "precomputed" else "adapter")
        assert made.ref_model is None
        with torch.no_grad():
            for name, p in made.model.named_parameters():
                if "lora_B.default" in name:  # away from the reference
                    p.add_(0.1)
        runs[way] = loss_and_gradients(made)
    plain = runs.pop(None)
    assert abs(plain[0].item() - 0.6931) > 1e-3
    for got in runs.values():
        assert_same(got, plain, atol=1e-6)


def test_the_policy_is_its_own_reference_before_training(tmp_path: Path, tokenizer: Any) -> None:
    """Precomputed without a `ref_model`: no second model is ever made, of either kind of dataset."""
    made: list[Any] = []
    init = PreTrainedModel.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        init(self, *args, **kwargs)

    folder = tmp_path / "model"
    policy().save_pretrained(folder)
    for train in (data(), stream()):
        with mock.patch.object(PreTrainedModel, "__init__", counted):
            run = trainer(tmp_path, tokenizer, model=str(folder), train=train, lowmem_reference="precomputed")
        assert [type(m).__name__ for m in made] == ["LlamaForCausalLM", "LlamaModel"]
        loss, _ = loss_and_gradients(run)
        assert loss.item() == pytest.approx(0.693147, abs=1e-5)
        made.clear()


@pytest.mark.train
@pytest.mark.parametrize("train", [data, stream], ids=["map", "iterable"])
def test_a_passed_reference_is_freed(train: Any, tmp_path: Path, tokenizer: Any) -> None:
    alive = weakref.ref(passed := policy(1))
    made = trainer(tmp_path, tokenizer, ref_model=passed, train=train(), lowmem_reference="precomputed")
    del passed
    gc.collect()
    assert alive() is None
    with pytest.raises(ValueError, match=r"freed before training.*Pass it to the trainer as eval_dataset"):
        made.evaluate(train(3))
    made.train()
    with pytest.raises(ValueError, match="Provide this dataset as `eval_dataset` at initialization"):  # TRL's word
        made.evaluate(train(3))
    kept = weakref.ref(passed := policy(1))
    made = trainer(tmp_path, tokenizer, ref_model=passed, train=train(), lowmem_reference="full")
    del passed
    gc.collect()
    assert kept() is not None, "with `full` it must live, so the check above can fail"


def test_the_table_is_read_again(tmp_path: Path, tokenizer: Any) -> None:
    """A restart computes nothing; another reference, or another ld_alpha, does not read it; new rows are added."""
    calls: list[int] = []
    compute = DPOTrainer.compute_ref_log_probs

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        calls.append(len(inputs["input_ids"]) // 2)
        return compute(self, model, inputs)

    def run(seed: int = 1, rows: int = 8, **fields: Any) -> tuple[int, Any]:
        calls.clear()
        made = trainer(
            tmp_path, tokenizer, ref_model=policy(seed), train=stream(rows), lowmem_reference="precomputed", **fields
        )
        return sum(calls), made

    with mock.patch.object(DPOTrainer, "compute_ref_log_probs", counted):
        first, made = run()
        again, restarted = run()
        assert (first, again) == (8, 0)
        assert torch.equal(made.reference_logps.values, restarted.reference_logps.values)
        assert_same(loss_and_gradients(restarted), loss_and_gradients(made), atol=0)
        assert run(rows=12, max_steps=6)[0] == 4
        assert run(seed=2)[0] == 8
        assert run(ld_alpha=0.5)[0] == 8
    assert len(list(tmp_path.glob("reference_logps_*.safetensors"))) == 3


@pytest.mark.train
def test_only_what_training_reads_is_computed(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(
        tmp_path, tokenizer, ref_model=policy(1), train=stream(16), lowmem_reference="precomputed", max_steps=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert len(made.reference_logps.keys) == 2 * 2 * 2
    made.train()
    assert len(losses(made)) == 2


def test_a_stream_that_changes_is_noticed(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, ref_model=policy(1), train=stream(4), lowmem_reference="precomputed")
    rows = [dict(row) for row in made.train_dataset]
    rows[0]["chosen_ids"] = [*rows[0]["chosen_ids"], 5]
    batch = made._prepare_inputs(made.data_collator(rows))
    with pytest.raises(ValueError, match=r"gives a pair in training that it did not give"):
        made.compute_loss(made.model, batch)


@pytest.mark.train
def test_a_dataset_that_comes_later(tmp_path: Path, tokenizer: Any) -> None:
    """Before training the policy is still the reference; after it TRL says what to do."""
    made = trainer(tmp_path, tokenizer, train=stream(8), lowmem_reference="precomputed")
    for late in (stream(3), data(3)):
        assert made.evaluate(late)["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    made.train()
    with pytest.raises(ValueError, match="Provide this dataset as `eval_dataset` at initialization"):
        made.evaluate(data(5))


def test_keys_see_what_a_pair_is_and_nothing_else() -> None:
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 7, 0], [1, 2, 8, 0]])
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]])
    mask = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": real, "completion_mask": mask}
    keys = pair_keys(batch)
    assert len(set(keys)) == 2
    wider = {k: torch.nn.functional.pad(v, (0, 3), value=9 * (k == "input_ids")) for k, v in batch.items()}
    assert pair_keys(wider) == keys
    assert pair_keys({k: v[[1, 0, 3, 2]] for k, v in batch.items()}) == keys[::-1]
    swapped = {k: v[[2, 3, 0, 1]] for k, v in batch.items()}
    assert not set(pair_keys(swapped)) & set(keys)
    for name, row, column, value in (("input_ids", 0, 2, 6), ("input_ids", 2, 0, 9), ("completion_mask", 2, 1, 1)):
        changed = {k: v.clone() for k, v in batch.items()}
        changed[name][row, column] = value
        assert pair_keys(changed)[0] != keys[0]
        assert pair_keys(changed)[1] == keys[1]


def test_the_table_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.safetensors"
    table = ReferenceLogps(path)
    assert table.find([4])[1].tolist() == [False]
    rows = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2, 6], [1, 2, 7], [1, 2, 8]])
    ones = torch.ones_like(rows)
    batch = {"input_ids": rows, "attention_mask": ones, "completion_mask": ones}
    value = torch.tensor([-1.5, -2.5, -3.5])
    assert table.add([batch, batch], lambda _: (value, value - 1)) == 1
    assert table.keys.tolist() == sorted(pair_keys(batch))
    got = table.of(pair_keys(batch)[::-1], torch.device("cpu"))
    assert got["ref_chosen_logps"].tolist() == [-3.5, -2.5, -1.5]
    assert got["ref_rejected_logps"].tolist() == [-4.5, -3.5, -2.5]
    table.save()
    assert [p.name for p in path.parent.iterdir()] == ["table.safetensors"]


STREAMED: dict[str, Any] = {"lowmem_reference": "precomputed", "train": stream}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lowmem_reference": "adapter"}, r"lowmem_reference='adapter', but the model has no adapter"),
        ({"lowmem_reference": "adapter", "ref_model": 1}, r"lowmem_reference='adapter', but ref_model was passed"),
        ({"lowmem_reference": "full", "lora": 1}, r"lowmem_reference='full' beside an adapter"),
        ({"lowmem_reference": "quantized", "lora": 1}, r"lowmem_reference='quantized' beside an adapter"),
        (STREAMED | {"dataloader_drop_last": True}, r"dataloader_drop_last=True"),
        (STREAMED | {"precompute_ref_batch_size": 4}, r"precompute_ref_batch_size=4"),
    ],
    ids=lambda v: str(v) if isinstance(v, str) else None,
)  # fmt: skip
def test_is_refused(fields: dict[str, Any], says: str, tmp_path: Path, tokenizer: Any) -> None:
    fields = dict(fields)
    if fields.pop("ref_model", None):
        fields["ref_model"] = policy(1)
    if fields.pop("lora", None):
        fields["extra"] = {"peft_config": LORA}
    if "train" in fields:
        fields["train"] = fields["train"]()
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, tokenizer, **fields)


@pytest.mark.train
def test_auto_is_full_where_the_reference_moves(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(
        tmp_path, tokenizer, ref_model=policy(1), lowmem_reference="auto", sync_ref_model=True, ref_model_sync_steps=2
    )
    assert made.reference_kind == "full"
    start = [p.clone() for p in made.ref_model.parameters()]
    made.train()
    assert any(not torch.equal(p, q) for p, q in zip(start, made.ref_model.parameters(), strict=True))


def test_auto_asks_nothing_where_nothing_is_needed(tmp_path: Path, tokenizer: Any) -> None:
    for way in ("auto", "none"):
        assert trainer(tmp_path, tokenizer, "orpo", lowmem_reference=way).reference_kind == "none"


def test_the_arguments_are_given_back_as_they_were(tmp_path: Path, tokenizer: Any) -> None:
    """TRL reads its own losses and its own beta from them while it is constructed, and nothing of that stays."""
    made = trainer(
        tmp_path, tokenizer, ["asft", "sigmoid"], loss_weights=[0.5, 1.0], ref_model=policy(1), lowmem_reference="auto"
    )
    args = made.args
    assert (args.loss_type, args.loss_weights, args.beta) == (["asft", "sigmoid"], [0.5, 1.0], None)
    assert args.precompute_ref_log_probs is False
    with pytest.raises(ValueError, match="cannot be the same object"):  # also when TRL raises
        LowMemDPOTrainer(m := policy(), m, args, train_dataset=data(), processing_class=tokenizer)
    assert args.loss_type == ["asft", "sigmoid"]
    assert first_batch(made)["input_ids"].shape[0] == 12
