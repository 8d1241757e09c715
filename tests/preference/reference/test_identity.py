"""Reference log-probabilities that were computed before are read where nothing that decides them has changed, only."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_lowmem.preference.reference import identity
from hf_lowmem.preference.reference.identity import digest_of
from tests.preference.reference.runs import data, first_batch, policy, trainer

ROWS = 5


@pytest.fixture
def computed() -> Iterator[list[int]]:
    """Pairs of which reference log-probabilities are really computed."""
    pairs: list[int] = []
    compute = DPOTrainer.compute_ref_log_probs

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        pairs.append(len(inputs["input_ids"]) // 2)
        return compute(self, model, inputs)

    with mock.patch.object(DPOTrainer, "compute_ref_log_probs", counted):
        yield pairs


def rows_of(folder: Path, rows: int = ROWS, turns: bool = False) -> Path:
    """Pairs in files, of which later runs find what earlier ones have cached."""
    made = data(rows)
    if turns:
        made = made.map(lambda row: {k: [{"role": "user", "content": v}] for k, v in row.items()})
    made.save_to_disk(folder / "pairs")
    return folder / "pairs"


def reference_of(made: Any) -> torch.Tensor:
    """(pairs, 2) log-probabilities, as the trainer's loss reads them."""
    batch = first_batch(made, ROWS)
    if made.reference_logps is not None:
        batch |= made.reference_logps.of(batch["lowmem_pair_keys"], torch.device("cpu"))
    elif made.ref_model is not None:
        return torch.stack(made.compute_ref_log_probs(made.ref_model, batch), 1)
    return torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]], 1)


def other_words() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in reversed(range(124)))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def one_weight_more() -> Any:
    made = policy(1)
    with torch.no_grad():
        made.model.norm.weight[3] += 0.5
    return made


# What changes, and the arguments of `trainer` by which it does. All else stays equal.
CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 5},
    "truncation_mode": {"max_length": 5, "truncation_mode": "keep_end"},
    "ld_alpha": {"ld_alpha": 0.3},
    "the tokenizer": {"tokenizer": other_words()},
    "one weight": {"ref_model": one_weight_more()},
    "the config": {"ref_model": policy(1, rms_norm_eps=0.3)},
    "the model's dtype": {"ref_model": policy(1).to(torch.bfloat16)},
    "autocast": {"bf16": True},
    "the attention": {"ref_model": policy(1, attn_implementation="eager")},
    "the libraries": {"version": "another"},
}


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "iterable"])
def test_no_number_is_stale(streamed: bool, tmp_path: Path, tokenizer: Any, computed: list[int]) -> None:
    """After each other run, and twice: the numbers are those of a full reference; what is equal is read again."""
    folder = rows_of(tmp_path)

    def run(kind: str, **changed: Any) -> tuple[int, torch.Tensor]:
        train: Any = Dataset.load_from_disk(folder)
        train = train.to_iterable_dataset() if streamed else train
        values = {"tokenizer": tokenizer, "max_length": 40, "ref_model": policy(1), "version": None} | changed
        computed.clear()
        version, words = values.pop("version"), values.pop("tokenizer")
        versions: dict[str, Any] = {"return_value": version} if version else {"wraps": identity.version}
        with mock.patch.object(identity, "version", **versions):
            made = trainer(tmp_path, words, train=train, lowmem_reference=kind, max_steps=4, **values)
        return sum(computed), reference_of(made)

    def values_of(change: dict[str, Any]) -> dict[str, Any]:
        return {k: policy_like(v) if k == "ref_model" else v for k, v in change.items()}

    first = run("auto")
    assert (first[0], run("auto")[0]) == (ROWS, 0)
    for name, change in CHANGES.items():
        count, got = run("auto", **values_of(change))
        assert count == ROWS, name
        torch.testing.assert_close(got, run("full", **values_of(change))[1], msg=lambda m, n=name: f"{n}: {m}")
        count, again = run("auto", **values_of(change))
        assert count == 0, name
        assert torch.equal(got, again), name
    assert run("auto")[0] == 0


def policy_like(model: Any) -> Any:
    """A copy: a reference is moved and prepared by its trainer."""
    made = type(model)(model.config).to(model.dtype)
    made.load_state_dict(model.state_dict())
    return made


def test_the_template_and_the_adapter_count(tmp_path: Path, tokenizer: Any, computed: list[int]) -> None:
    folder = rows_of(tmp_path, turns=True)

    def run(template: str, alpha: int) -> int:
        words = other_words()
        words.chat_template = template
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
        computed.clear()
        trainer(
            tmp_path, words, model=get_peft_model(policy(), lora), train=Dataset.load_from_disk(folder),
            lowmem_reference="precomputed",
        )  # fmt: skip
        return sum(computed)

    plain = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert run(plain, 8) == ROWS
    assert run(plain, 8) == 0
    assert run(plain, 16) == ROWS
    assert run("w9 " + plain, 8) == ROWS
    assert run(plain, 8) == 0


class Unpicklable(DataCollatorForPreference):
    def __reduce__(self) -> Any:
        raise TypeError("a lock")


@pytest.mark.parametrize("streamed", [False, True], ids=["map", "iterable"])
@pytest.mark.parametrize("what", ["collator", "weights"])
def test_what_cannot_be_hashed_is_never_read(
    what: str, streamed: bool, tmp_path: Path, tokenizer: Any, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rows_of(tmp_path)
    extra = {"data_collator": Unpicklable(0)} if what == "collator" else {}
    if what == "weights":
        monkeypatch.setattr("hf_lowmem.training.dpo.first_digest_of", lambda model: None)
    for seed in (1, 1, 2):
        train: Any = Dataset.load_from_disk(folder)
        computed.clear()
        made = trainer(
            tmp_path, tokenizer, ref_model=policy(seed), train=train.to_iterable_dataset() if streamed else train,
            lowmem_reference="precomputed", extra=extra,
        )  # fmt: skip
        assert sum(computed) == ROWS
        assert made.compute_loss(made.model, first_batch(made, ROWS)).isfinite()
    assert not list(tmp_path.glob("reference_logps_*"))


@pytest.mark.parametrize("damage", [b"", b"not a table", None])
def test_a_damaged_table_is_computed_again(
    damage: bytes | None, tmp_path: Path, tokenizer: Any, computed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> Any:
        computed.clear()
        stream = data(ROWS).to_iterable_dataset()
        return trainer(tmp_path, tokenizer, ref_model=policy(1), train=stream, lowmem_reference="precomputed")

    run()
    path = next(tmp_path.glob("reference_logps_*"))
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    with caplog.at_level(logging.WARNING, "hf_lowmem"):
        run()
    assert sum(computed) == ROWS
    assert str(path) in caplog.text
    run()
    assert sum(computed) == 0


class Strange(torch.Tensor):
    pass


def test_a_digest_sees_names_shapes_dtypes_and_buffers_and_admits_what_it_cannot_see() -> None:
    def made(change: Any = None) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        module.register_buffer("kept_outside_of_the_state", torch.ones(2), persistent=False)
        if change is not None:
            change(module)
        return module

    def swap(m: Any) -> None:
        m[0], m[1] = m[1], m[0]

    def scale(m: Any) -> None:
        m.kept_outside_of_the_state *= 2

    def reshape(m: Any) -> None:
        m[0].bias = nn.Parameter(m[0].bias.detach().view(2, 2))

    base = digest_of(made())
    assert base is not None
    assert base == digest_of(made())
    changed = [digest_of(made(c)) for c in (swap, scale, reshape, lambda m: m.half())]
    assert len({base, *changed}) == 5
    assert None not in changed

    def partition(m: Any) -> None:
        m[0].weight.ds_id = 0

    def sparse(m: Any) -> None:
        m.register_buffer("sparse", torch.eye(3).to_sparse())

    def strange(m: Any) -> None:
        m.register_buffer("strange", torch.ones(2).as_subclass(Strange))

    for hide in (partition, sparse, strange, lambda m: m.to("meta")):
        assert digest_of(made(hide)) is None
