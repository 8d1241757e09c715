"""Three ways in: our trainers, an unmodified Trainer, a loop of one's own; and what reaches the optimizer by each."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer

from hf_lowmem import (
    LowMemCallback,
    LowMemDPOConfig,
    LowMemDPOTrainer,
    LowMemSFTConfig,
    LowMemSFTTrainer,
    LowMemTrainer,
    LowMemTrainerMixin,
    LowMemTrainingArguments,
    make_optimizer,
    with_lowmem,
)
from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.optim.lowrank.apollo import ApolloMini
from hf_lowmem.optim.slot import SMALLEST_COMPRESSED
from hf_lowmem.preference.losses import PairLogps, asft
from tests.conftest import tiny_llama

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}


def token_data(rows: int = 16, length: int = 12) -> Dataset:
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def pair_data(rows: int = 16) -> Dataset:
    def words(*numbers: int) -> str:
        return " ".join(f"w{n % 124}" for n in numbers)

    return Dataset.from_dict(
        {
            "prompt": [words(i, i + 1, i + 2) + " " for i in range(rows)],
            "chosen": [words(*range(i + 3, i + 6 + i % 3)) for i in range(rows)],
            "rejected": [words(*range(3 * i, 3 * i + 4)) for i in range(rows)],
        }
    )


def settings(config: Any, tmp_path: Path, **kwargs: Any) -> Any:
    return config(str(tmp_path), **(COMMON | kwargs))


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.train
def test_three_ways_in_are_one_optimizer(tmp_path: Path) -> None:
    """The field, `optimizers=` of an unmodified Trainer, and a raw loop end in the same bits."""
    args = settings(LowMemTrainingArguments, tmp_path, optim="apollo_mini", lowmem_state="int8", max_grad_norm=0.0)
    by_field = LowMemTrainer(tiny_llama(), args, train_dataset=token_data())
    by_field.train()
    assert isinstance(by_field.optimizer.optimizer, ApolloMini)  # type: ignore[union-attr]

    model = tiny_llama()
    plain = settings(TrainingArguments, tmp_path, max_grad_norm=0.0)
    optimizer = make_optimizer("apollo_mini", model, lr=1e-2, state="int8", eps=args.adam_epsilon, seed=args.seed)
    callback = LowMemCallback(verbose=False)
    trainer = Trainer(model, plain, train_dataset=token_data(), optimizers=(optimizer, None), callbacks=[callback])
    batches = []
    step = trainer.training_step

    def remember(model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
        batches.append({k: v.clone() for k, v in inputs.items()})
        return step(model, inputs, *rest, **kwargs)

    trainer.training_step = remember  # type: ignore[method-assign]
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(weights(by_field.model), weights(model), strict=True))
    assert losses(by_field) == losses(trainer)

    loop = tiny_llama()
    optimizer = make_optimizer("apollo_mini", loop, lr=1e-2, state="int8", eps=args.adam_epsilon, seed=args.seed)
    for batch in batches:
        loop(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(weights(loop), weights(model), strict=True):  # the Trainer's loss is summed in another order
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.train
def test_a_plain_name_is_the_plain_trainer(tmp_path: Path) -> None:
    runs = []
    for trainer_class, config in ((Trainer, TrainingArguments), (LowMemTrainer, LowMemTrainingArguments)):
        trainer = trainer_class(tiny_llama(), settings(config, tmp_path), train_dataset=token_data())
        trainer.train()
        runs.append((losses(trainer), type(trainer.optimizer.optimizer)))  # type: ignore[union-attr]
    assert runs[0] == runs[1]


@pytest.mark.train
def test_our_trainers_take_plain_arguments(tmp_path: Path, tokenizer: Any) -> None:
    trainer = LowMemSFTTrainer(
        tiny_llama(), settings(SFTConfig, tmp_path), train_dataset=token_data(), processing_class=tokenizer
    )
    trainer.train()
    assert len(losses(trainer)) == 4


@pytest.mark.train
def test_any_other_trl_trainer(tmp_path: Path, tokenizer: Any) -> None:
    from trl import GRPOTrainer

    class LowMemGRPOTrainer(LowMemTrainerMixin, GRPOTrainer):
        pass

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(c) % 5) for c in completions]

    args = settings(
        with_lowmem(GRPOConfig), tmp_path, optim="apollo", lowmem_rank=4, lowmem_state="fp8", max_steps=2,
        num_generations=2, max_completion_length=4, generation_kwargs={"eos_token_id": None},
    )  # fmt: skip
    model = tiny_llama()
    start = weights(model)
    trainer = LowMemGRPOTrainer(
        model, reward_funcs=reward, args=args, train_dataset=pair_data().select_columns("prompt"),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert type(trainer.optimizer.optimizer).name == "apollo"
    assert any(not torch.equal(p, q) for p, q in zip(start, weights(model), strict=True))


# What a trainer makes of a setting ends at `param_groups`, which every method is asked for; from there to an effect on
# weights is the methods' own affair (tests/contracts). One of each family is trained: torch's Adam, one without eps and
# of steps of one length, one with a rank.
FAMILIES = ("adamw", "lion", "apollo")
CHANGES: list[dict[str, Any]] = [
    {"weight_decay": 0.5},
    {"adam_beta1": 0.2},
    {"adam_beta2": 0.5},
    {"adam_epsilon": 1e-1},
    {"learning_rate": 5e-3},
    {"lr_scheduler_type": "linear"},
    {"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup"},
    {"gradient_accumulation_steps": 2},
    {"lowmem_state": "fp8"},
]


def trainer_of(optim: str, tmp_path: Path, **kwargs: Any) -> LowMemTrainer:
    callbacks = kwargs.pop("callbacks", None)
    extra = {"lowmem_rank": 4} if OPTIMIZERS[optim].DEFAULTS.get("rank", 0) > 4 else {}
    args = settings(LowMemTrainingArguments, tmp_path, optim=optim, **(extra | kwargs))
    return LowMemTrainer(tiny_llama(), args, train_dataset=token_data(), callbacks=callbacks)


def ended(optim: str, tmp_path: Path, **kwargs: Any) -> list[torch.Tensor]:
    trainer = trainer_of(optim, tmp_path, **kwargs)
    trainer.train()
    return weights(trainer.model)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[torch.Tensor]]:
    """The weights that a method ends at with the common settings, trained once."""
    return functools.cache(lambda optim: ended(optim, tmp_path_factory.mktemp(optim)))


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
class TestReachesTheGroupsOf:
    def test_every_method(self, optim: str, tmp_path: Path) -> None:
        eps = {"adam_epsilon": 0.125} if "eps" in OPTIMIZERS[optim].DEFAULTS else {}
        given = {"learning_rate": 5e-3, "adam_beta1": 0.25, "adam_beta2": 0.75, "lowmem_state": "fp8", **eps}
        trainer = trainer_of(optim, tmp_path, **given)
        optimizer: Any = trainer.create_optimizer()
        for group in optimizer.param_groups:
            assert (group["lr"], group["betas"], group.get("eps")) == (5e-3, (0.25, 0.75), eps.get("adam_epsilon"))
            big = [p for p in group["params"] if p.numel() >= SMALLEST_COMPRESSED]
            assert all({c.name for c in optimizer.slot(p, group).codecs} == {"fp8"} for p in big)
        assert any(p.numel() >= SMALLEST_COMPRESSED for g in optimizer.param_groups for p in g["params"])

    def test_an_eps_that_has_no_effect_is_refused(self, optim: str, tmp_path: Path) -> None:
        if "eps" in OPTIMIZERS[optim].DEFAULTS:
            assert trainer_of(optim, tmp_path, adam_epsilon=0.1).args.adam_epsilon == 0.1
            return
        with pytest.raises(ValueError, match=r"adam_epsilon=0\.1 has no effect"):
            trainer_of(optim, tmp_path, adam_epsilon=0.1)

    def test_weight_decay_spares_norms_as_huggingface_does(self, optim: str, tmp_path: Path) -> None:
        trainer = trainer_of(optim, tmp_path, weight_decay=0.25)
        optimizer = trainer.create_optimizer()
        decayed = {n for g in optimizer.param_groups if g["weight_decay"] == 0.25 for n in g["param_names"]}
        assert decayed == set(trainer.get_decay_parameter_names(trainer.model))
        assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.25}


@pytest.mark.parametrize("optim", FAMILIES)
class TestReaches:
    @pytest.mark.train
    @pytest.mark.parametrize("changed", CHANGES, ids=lambda c: next(iter(c)))
    def test_by_its_effect(self, optim: str, changed: dict[str, Any], tmp_path: Path, unchanged: Any) -> None:
        if "adam_epsilon" in changed and "eps" not in OPTIMIZERS[optim].DEFAULTS:
            return  # refused, above
        pairs = zip(unchanged(optim), ended(optim, tmp_path, **changed), strict=True)
        assert any((p - q).abs().max() > 1e-6 for p, q in pairs)

    @pytest.mark.train
    def test_max_grad_norm(self, optim: str, tmp_path: Path) -> None:
        norms: list[float] = []

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

        ended(optim, tmp_path, max_grad_norm=1e-3, callbacks=[Watch()])
        assert len(norms) == 4
        assert norms == pytest.approx([1e-3] * 4, rel=1e-2)  # torch divides by the norm and 1e-6

    @pytest.mark.train
    def test_a_schedule_reaches_every_group_and_the_gradient_norm_is_logged(self, optim: str, tmp_path: Path) -> None:
        trainer = trainer_of(optim, tmp_path, lr_scheduler_type="linear", weight_decay=0.1)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "learning_rate" in row]
        assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
        assert {g["lr"] for g in trainer.optimizer.param_groups} == {0.0}  # type: ignore[union-attr]
        assert len(rows) == 4
        assert min(row["grad_norm"] for row in rows) > 0


@pytest.mark.train
@pytest.mark.parametrize("optim", [*FAMILIES, "lamb"])
def test_a_clipped_step_is_shorter(optim: str, tmp_path: Path) -> None:
    """Adam undoes a clipping but for eps: with a large one, steps get shorter. Lion's and LAMB's never do."""
    own_length = {"lion", "lamb"}
    start = weights(tiny_llama())

    def distance(**kwargs: Any) -> float:
        eps = {} if optim in own_length else {"adam_epsilon": 1.0}
        after = ended(optim, tmp_path, **eps, **kwargs)
        return math.sqrt(sum((p - q).pow(2).sum().item() for p, q in zip(start, after, strict=True)))

    clipped, plain = distance(max_grad_norm=1e-3), distance(max_grad_norm=0.0)
    assert (clipped > 0.9 * plain) if optim in own_length else (clipped < 0.5 * plain)


@pytest.mark.train
def test_the_group_table_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = settings(LowMemTrainingArguments, tmp_path, optim="apollo_mini", lowmem_state="int8")
    trainer = LowMemTrainer(tiny_llama(), args, train_dataset=token_data())
    with caplog.at_level("INFO", logger="hf_lowmem.training.mixin"):
        optimizer: Any = trainer.create_optimizer()
    assert "apollo_mini: 7 tensors" in caplog.text
    assert "bytes a parameter" in caplog.text
    trainer.train()
    predicted = sum(optimizer.state_bytes(p, g) for g in optimizer.param_groups for p in g["params"])
    assert optimizer_bytes(optimizer) == predicted


@pytest.mark.train
def test_the_rule_of_embedding_and_head_is_logged_and_stepped_in_backward(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own: dict[str, Any] = {"lowmem_embeddings": "scale", "lowmem_step_in_backward": True, "max_grad_norm": 0.0}
    args = settings(LowMemTrainingArguments, tmp_path, optim="apollo_mini", lowmem_state="int8", **own)
    model = tiny_llama()
    start = copy.deepcopy(model.state_dict())
    trainer = LowMemTrainer(model, args, train_dataset=token_data())
    with caplog.at_level("INFO", logger="hf_lowmem.training.mixin"):
        trainer.train()
    assert "scale (head): 1 tensors" in caplog.text
    assert (
        "scale (embedding): 1 tensors, 8,192 parameters, rank None, weight decay 0, state int8: 0.0 MiB" in caplog.text
    )
    assert not [name for name, value in model.state_dict().items() if torch.equal(value, start[name])]
    kept = {k for state in trainer.optimizer.state.values() for k in state}  # type: ignore[union-attr]
    assert "row_sq" not in kept


@pytest.mark.train
def test_lora_adapters_are_trained_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_llama()
    start = copy.deepcopy(model.state_dict())
    trainer = LowMemSFTTrainer(
        model,
        settings(LowMemSFTConfig, tmp_path, optim="apollo_mini", lowmem_state="int8"),
        train_dataset=token_data(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    trained = {n for g in trainer.optimizer.param_groups for n in g["param_names"]}  # type: ignore[union-attr]
    assert trained
    assert all("lora_" in name for name in trained)
    base = trainer.model.get_base_model().state_dict()  # type: ignore[union-attr, operator]
    assert all(torch.equal(v, base[k.replace("_proj.", "_proj.base_layer.")]) for k, v in start.items())


def asft_trainer(tmp_path: Path, tokenizer: Any, model: Any = None, **kwargs: Any) -> LowMemDPOTrainer:
    args = settings(LowMemDPOConfig, tmp_path, loss_type="asft", max_length=32, **kwargs)
    return LowMemDPOTrainer(
        tiny_llama() if model is None else model, args=args, train_dataset=pair_data(), eval_dataset=pair_data(4),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.train
def test_asft_loads_no_reference_model(tmp_path: Path, tokenizer: Any) -> None:
    """Counted: exactly one model is ever made, also when it is given by its path, where TRL would load a second."""
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    made = []
    init = PreTrainedModel.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(type(self).__name__)
        init(self, *args, **kwargs)

    with mock.patch.object(PreTrainedModel, "__init__", counted):
        trainer = asft_trainer(tmp_path, tokenizer, model=str(folder))
        trainer.train()
        assert sorted(made) == ["LlamaForCausalLM", "LlamaModel"]
        made.clear()
        args = settings(DPOConfig, tmp_path)
        DPOTrainer(str(folder), args=args, train_dataset=pair_data(), processing_class=tokenizer)
        assert len(made) == 4, "TRL's own loss does load one, so the count can fail"
    assert trainer.ref_model is None
    assert dpo_trainer.create_model_from_path.__module__.startswith("trl")


@pytest.mark.parametrize(("beta", "lam"), [(None, None), (0.1, 0.5)])
def test_asft_in_the_trainer_is_the_formula(
    beta: float | None, lam: float | None, tmp_path: Path, tokenizer: Any
) -> None:
    """Loss and gradients equal those of full logits and the plain function."""
    trainer = asft_trainer(tmp_path, tokenizer, beta=beta, asft_lambda=lam)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])  # type: ignore[index]
    model = trainer.model
    assert model is not None
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]

    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["completion_mask"][:, 1:]
    sums, lens = (logps * mask).sum(1), mask.sum(1)
    per_pair, _ = asft(PairLogps(sums[:6], sums[6:], lens[:6], lens[6:]), beta=beta or 1.0, asft_lambda=lam or 1.0)
    per_pair.mean().backward()
    torch.testing.assert_close(loss, per_pair.mean(), rtol=1e-5, atol=1e-6)
    for p, g in zip(model.parameters(), ours, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.train
def test_asft_learns_and_logs_under_trl_s_names(tmp_path: Path, tokenizer: Any) -> None:
    trainer = asft_trainer(tmp_path, tokenizer, max_steps=40, optim="adamw", lowmem_state="int8")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"]
    args = settings(DPOConfig, tmp_path)
    theirs = DPOTrainer(tiny_llama(), tiny_llama(), args, train_dataset=pair_data(), processing_class=tokenizer)
    theirs.train()
    names = set(theirs.state.log_history[0])
    assert names <= set(trainer.state.log_history[1]) | set(trainer.state.log_history[0])
    assert {"logps_mean/chosen", "logps_mean/rejected"} <= set(trainer.state.log_history[1])


@pytest.mark.train
def test_asft_with_lora(tmp_path: Path, tokenizer: Any) -> None:
    args = settings(LowMemDPOConfig, tmp_path, loss_type="asft")
    trainer = LowMemDPOTrainer(
        tiny_llama(), args=args, train_dataset=pair_data(), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    assert trainer.ref_model is None
    assert len(losses(trainer)) == 4


def test_a_reference_that_would_be_ignored_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    args = settings(LowMemDPOConfig, tmp_path, loss_type="asft")
    with pytest.raises(ValueError, match="needs no reference model"):
        LowMemDPOTrainer(tiny_llama(), tiny_llama(), args, train_dataset=pair_data(), processing_class=tokenizer)


def test_an_empty_completion_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    trainer = asft_trainer(tmp_path, tokenizer)
    row = dict(trainer.train_dataset[0])  # type: ignore[index]
    with pytest.raises(ValueError, match="rejected completion of example 1"):
        trainer.data_collator([row, row | {"rejected_ids": []}])


@pytest.mark.train
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"], ["sigmoid", "sft"]], ids="-".join)
def test_trl_s_losses_are_trl_s(loss_type: list[str], tmp_path: Path, tokenizer: Any) -> None:
    runs = []
    for trainer_class in (DPOTrainer, LowMemDPOTrainer):
        args = settings(LowMemDPOConfig, tmp_path, loss_type=loss_type)
        trainer = trainer_class(
            tiny_llama(), tiny_llama(1), args, train_dataset=pair_data(), processing_class=tokenizer
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


@pytest.mark.train
def test_sft_loss_is_trl_s(tmp_path: Path, tokenizer: Any) -> None:
    runs = []
    for trainer_class, config in ((SFTTrainer, SFTConfig), (LowMemSFTTrainer, LowMemSFTConfig)):
        args = settings(config, tmp_path, optim="adamw_torch", gradient_accumulation_steps=2)
        trainer = trainer_class(tiny_llama(), args, train_dataset=token_data(), processing_class=tokenizer)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4
