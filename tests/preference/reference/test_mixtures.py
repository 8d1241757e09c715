"""TRL's losses through our trainer are TRL's; ours beside them are the weighted sum; no reference is loaded idly."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from hf_lowmem import LowMemDPOTrainer
from hf_lowmem.preference.losses import PREFERENCE_LOSSES, pair_logps
from hf_lowmem.training.dpo import TRL_LOSSES
from tests.preference.reference.runs import assert_same, data, first_batch, loss_and_gradients, policy, trainer
from tests.training.test_trainers import settings

# What a loss of TRL's cannot be without.
NEEDS: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}
VARIANTS: list[tuple[list[str], dict[str, Any]]] = [
    *(([name], NEEDS.get(name, {})) for name in TRL_LOSSES),
    (["sigmoid", "sft", "bco_pair"], {"loss_weights": [0.8, 1.0, 0.2]}),
    (["sigmoid"], {"f_divergence_type": "js_divergence"}),
    (["sigmoid"], {"ld_alpha": 0.5}),
    (["sigmoid"], {"use_weighting": True}),
    (["sigmoid"], {"beta": 0.7, "precompute_ref_log_probs": True}),
]


def test_every_loss_of_trl_is_known() -> None:
    assert len(TRL_LOSSES) == 15
    assert not set(TRL_LOSSES) & set(PREFERENCE_LOSSES)


@pytest.mark.parametrize(("types", "fields"), VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_trl_s_losses_are_trl_s(types: list[str], fields: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    got = []
    for kind in (LowMemDPOTrainer, DPOTrainer):
        made = trainer(
            tmp_path, tokenizer, types, kind=kind, **fields,
            ref_model=None if types == ["sft"] and kind is LowMemDPOTrainer else policy(1),
        )  # fmt: skip
        got.append(loss_and_gradients(made))
    assert_same(got[0], got[1], atol=1e-6)


@pytest.mark.parametrize(
    ("types", "weights"),
    [
        (["asft"], [0.3]),
        (["asft", "orpo", "simpo", "cpo"], None),
        (["sigmoid", "asft"], [1.0, 0.5]),
        (["orpo", "ipo", "sft", "simpo"], [0.1, 2.0, 0.5, 1.5]),
        (["sft", "cpo"], [0.0, 1.0]),
        (["cpo", "sigmoid_norm"], [-0.5, 1.0]),
    ],
    ids=lambda v: "-".join(map(str, v or [])),
)
def test_a_mixture_is_the_weighted_sum(
    types: list[str], weights: list[float] | None, tmp_path: Path, tokenizer: Any
) -> None:
    beta = 1.0 if "ipo" in types else None  # at TRL's 0.1 ipo's value is 25, and the others drown in its rounding
    asks = not set(types) <= {*PREFERENCE_LOSSES, "sft"}
    whole = trainer(tmp_path, tokenizer, types, loss_weights=weights, ref_model=policy(1) if asks else None, beta=beta)
    got = loss_and_gradients(whole)
    total, gradients = torch.zeros(()), {name: torch.zeros_like(g) for name, g in got[1].items()}
    for name, weight in zip(types, weights or [1.0] * len(types), strict=True):
        reference = policy(1) if name in ("sigmoid", "ipo", "sigmoid_norm") else None
        alone = trainer(tmp_path, tokenizer, name, ref_model=reference, beta=None if name == "orpo" else beta)
        part = loss_and_gradients(alone)
        total += weight * part[0]
        for n, gradient in part[1].items():
            gradients[n] += weight * gradient
    # Values below 16, five of them: a spacing of 9.5e-7 each, rounded to a half; gradients are smaller.
    assert_same(got, (total, gradients), atol=3e-6)


@pytest.mark.parametrize("name", list(PREFERENCE_LOSSES))
def test_ours_in_the_trainer_is_the_function_of_full_logits(name: str, tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, name)
    batch = first_batch(made)
    got = loss_and_gradients(made, batch)
    made.model.zero_grad()
    logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    per_pair, _ = PREFERENCE_LOSSES[name](pair_logps(logps, batch["completion_mask"][:, 1:]))
    per_pair.mean().backward()
    want = {n: p.grad.clone() for n, p in made.model.named_parameters()}
    # Log-probabilities of 5 nats a token have a spacing of 4.8e-7; sums of six such, in another order.
    assert_same(got, (per_pair.mean().detach(), want), atol=1e-5)


def logged(made: Any) -> dict[str, float]:
    made.model.train()
    made.compute_loss(made.model, first_batch(made))
    return {name: values[-1] for name, values in made._metrics["train"].items()}


def test_metrics_of_one_loss(tmp_path: Path, tokenizer: Any) -> None:
    """TRL's names, and both mean log-probabilities, whichever loss it is."""
    common = {"entropy", "num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    common |= {"logps/chosen", "logps/rejected", "logps_mean/chosen", "logps_mean/rejected"}
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    terms = {"asft": {"sft", "align"}, "orpo": {"sft", "align"}, "simpo": {"align"}, "cpo": {"sft", "align"}}
    for name in PREFERENCE_LOSSES:
        got = logged(trainer(tmp_path, tokenizer, name))
        assert set(got) == common | rewards | {f"loss/{t}" for t in terms[name]}
    assert set(logged(trainer(tmp_path, tokenizer, "sft"))) == common
    got = logged(trainer(tmp_path, tokenizer, "sigmoid", ref_model=policy(1)))
    assert set(got) == common | rewards


def test_metrics_of_a_mixture(tmp_path: Path, tokenizer: Any) -> None:
    """The plain names are TRL's where it has rewards, else our first loss's."""
    alone = {name: logged(trainer(tmp_path, tokenizer, name)) for name in ("asft", "orpo")}
    dpo = logged(trainer(tmp_path, tokenizer, "sigmoid", ref_model=policy(1)))
    both = logged(trainer(tmp_path, tokenizer, ["asft", "orpo"]))
    mixed = logged(trainer(tmp_path, tokenizer, ["asft", "sigmoid"], ref_model=policy(1)))
    for name in ("rewards/chosen", "rewards/margins"):
        assert both[name] == alone["asft"][name]
        assert both[f"orpo/{name}"] == alone["orpo"][name]
        assert mixed[name] == dpo[name]
        assert mixed[f"asft/{name}"] == alone["asft"][name]
    assert mixed["asft/loss/sft"] == alone["asft"]["loss/sft"]


def test_beta_is_each_loss_s_own_or_everybody_s(tmp_path: Path, tokenizer: Any) -> None:
    made = trainer(tmp_path, tokenizer, ["sigmoid", "asft", "simpo"], ref_model=policy(1))
    assert made.args.beta is None
    assert made.beta == 0.1
    assert {s.name: s.options["beta"] for s in made.args.lowmem_loss_specs()} == {"asft": 1.0, "simpo": 2.0}
    made = trainer(tmp_path, tokenizer, ["sigmoid", "asft", "simpo"], ref_model=policy(1), beta=0.3)
    assert made.beta == 0.3
    assert {s.name: s.options["beta"] for s in made.args.lowmem_loss_specs()} == {"asft": 0.3, "simpo": 0.3}
    assert trainer(tmp_path, tokenizer, ["sigmoid", "cpo"], ref_model=policy(1)).args.beta == 0.1


@pytest.mark.train
@pytest.mark.parametrize(
    "types", [["asft"], ["orpo"], ["simpo"], ["cpo"], ["sft"], ["sft", "asft", "orpo"]], ids="-".join
)
def test_no_reference_model_is_ever_made(types: list[str], tmp_path: Path, tokenizer: Any) -> None:
    """Counted in constructors and in living parameters, for a model that is given by its path, as TRL's second is."""
    folder = tmp_path / "model"
    policy().save_pretrained(folder)
    made: list[Any] = []
    init = PreTrainedModel.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        init(self, *args, **kwargs)

    with mock.patch.object(PreTrainedModel, "__init__", counted):
        run = trainer(tmp_path, tokenizer, types, model=str(folder), max_steps=1)
        run.train()
        assert sorted(type(m).__name__ for m in made) == ["LlamaForCausalLM", "LlamaModel"]
        assert run.ref_model is None
        assert run.reference_kind == "none"
        alive = {p.data_ptr() for m in made for p in m.parameters()}
        assert alive == {p.data_ptr() for p in run.model.parameters()}
        made.clear()
        trainer(tmp_path, tokenizer, "sigmoid", model=str(folder))
        assert len(made) == 4, "TRL's own loss does load one, so the count can fail"


def test_a_passed_reference_is_refused_where_none_is_needed(tmp_path: Path, tokenizer: Any) -> None:
    for types in (["orpo"], ["sft"], ["sft", "cpo"]):
        with pytest.raises(ValueError, match="needs no reference model and would ignore it"):
            trainer(tmp_path, tokenizer, types, ref_model=policy(1))


@pytest.mark.train
def test_no_copy_of_an_earlier_adapter_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    """For a PEFT model TRL adds a frozen copy of its adapter as the reference; a loss that needs none drops it."""
    lora = LoraConfig(r=4, target_modules="all-linear")
    for types, adapters in (("asft", {"default"}), ("sigmoid", {"default", "ref"})):
        made = trainer(tmp_path, tokenizer, types, model=get_peft_model(policy(), lora), max_steps=1)
        assert set(made.model.peft_config) == adapters
        made.train()
        assert len(made.state.log_history) == 2


def test_images_are_refused_by_name(tmp_path: Path, tokenizer: Any) -> None:
    pictures = data().add_column("images", [[]] * 16)  # pyright: ignore[reportCallIssue]
    either: list[dict[str, Any]] = [{"loss_type": "asft"}, {"lowmem_reference": "auto"}, {"lowmem_share_prompt": True}]
    for fields in either:
        with pytest.raises(ValueError, match=r"train_dataset has images, .* does not support vision-language models"):
            trainer(tmp_path, tokenizer, train=pictures, **fields)
    with pytest.raises(ValueError, match="does not seem to be a vision-language model"):  # TRL's word, not ours
        trainer(tmp_path, tokenizer, train=pictures)


@pytest.mark.parametrize("precompute", [False, True])
def test_plain_arguments_are_the_parent_s_business(precompute: bool, tmp_path: Path, tokenizer: Any) -> None:
    got = []
    for kind in (LowMemDPOTrainer, DPOTrainer):
        args = settings(DPOConfig, tmp_path, loss_type=["sigmoid", "sft"], precompute_ref_log_probs=precompute)
        made = kind(policy(), policy(1), args, train_dataset=data(), processing_class=tokenizer)
        got.append(loss_and_gradients(made))
        assert type(made.data_collator).__module__.startswith("trl")
    assert_same(got[0], got[1], atol=0)
