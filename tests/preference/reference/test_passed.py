"""The reference is the model that was passed, in eval mode, for every way of having it; or it is refused in words."""

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig, IA3Config, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.patching import in_eval_mode
from tests.preference.reference.runs import data, first_batch, policy, trainer
from tests.training.test_trainers import losses, settings, token_data


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", **more)


def trained(folder: Path) -> Any:
    """A model in memory whose name leads to other weights."""
    policy().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.train
@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared prompts"])
@pytest.mark.parametrize("way", [None, "full", "precomputed", "auto", "adapter", "a PEFT model"])
def test_at_the_first_step_the_loss_is_log_2(way: str | None, share: bool, tmp_path: Path, tokenizer: Any) -> None:
    model, extra, kind = trained(tmp_path / "model"), {}, way
    if way == "adapter":
        extra = {"peft_config": lora()}
    elif way == "a PEFT model":
        model, kind = get_peft_model(model, lora(init_lora_weights=False)), "auto"
    made = trainer(
        tmp_path, tokenizer, model=model, lowmem_reference=kind, max_steps=2, extra=extra, lowmem_share_prompt=share
    )
    made.train()
    first, second = losses(made)
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert abs(second - math.log(2)) > 1e-4  # the reference does not follow


def test_a_quantized_reference_is_of_the_model_that_was_passed(tmp_path: Path, tokenizer: Any) -> None:
    model = trained(tmp_path / "model")
    made = trainer(tmp_path, tokenizer, model=model, lowmem_reference="quantized")
    assert torch.equal(made.ref_model.model.norm.weight, model.model.norm.weight)
    assert made.ref_model.model.norm.weight is not model.model.norm.weight


@pytest.mark.train
def test_after_a_supervised_stage_in_the_same_process(tmp_path: Path, tokenizer: Any) -> None:
    """Which leaves TRL's fused head on the model, whose copy must not call the original."""
    policy().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    args = settings(LowMemSFTConfig, tmp_path, max_steps=2)
    LowMemSFTTrainer(model, args, train_dataset=token_data(), processing_class=tokenizer).train()
    made = trainer(tmp_path, tokenizer, model=model, lowmem_reference="full", max_steps=2)
    made.train()
    assert losses(made)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert not {id(m) for m in model.modules()} & {id(m) for m in made.ref_model.modules()}


@pytest.mark.train
def test_what_is_changed_later_is_not_the_reference(tmp_path: Path, tokenizer: Any) -> None:
    """Between the constructor and `train()`: every way holds on to what the constructor was given."""
    first = []
    for way in ("full", "precomputed"):
        made = trainer(tmp_path, tokenizer, model=trained(tmp_path / "model"), lowmem_reference=way, max_steps=1)
        with torch.no_grad():
            made.model.model.norm.weight.mul_(1.5)
        made.train()
        first += losses(made)
    assert first[0] == pytest.approx(first[1], abs=1e-5)
    assert abs(first[0] - math.log(2)) > 1e-4


def by_a_closure(model: Any) -> None:
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def by_a_closure_in_a_layer(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    model.model.layers[0].input_layernorm.forward = lambda x, inner=norm: type(inner).forward(inner, inner.keep(x))
    norm.keep = torch.nn.Identity()


def by_a_lock(model: Any) -> None:
    model.lock = threading.Lock()


@pytest.mark.train
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (by_a_closure, r"calls the original's (LlamaModel|Embedding).*Pass the reference itself as ref_model"),
        (by_a_closure_in_a_layer, r"calls the original's Identity"),
        (by_a_lock, r"it cannot be copied.*Pass the reference itself as ref_model"),
    ],
)
def test_a_copy_that_is_none_is_refused(spoil: Any, says: str, tmp_path: Path, tokenizer: Any) -> None:
    model = policy()
    spoil(model)
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, tokenizer, model=model, lowmem_reference="full", max_steps=1).train()


def spoiled_by(kind: str) -> tuple[Any, dict[str, Any]]:
    """(model, more arguments) whose policy without its adapter is no reference."""
    if kind == "pissa":
        return policy(), {"peft_config": lora(init_lora_weights="pissa")}
    if kind == "pissa, wrapped":
        return get_peft_model(policy(), lora(init_lora_weights="pissa_niter_2")), {}
    if kind == "bias":
        return policy(attention_bias=True), {"peft_config": lora(bias="all")}
    wrapped: Any = get_peft_model(policy(attention_bias=True), lora())
    if kind == "a base weight":
        wrapped.base_model.model.model.norm.weight.requires_grad_(True)
    elif kind == "another adapter":
        wrapped.add_adapter("second", lora())
        wrapped.set_adapter("second")
    else:
        wrapped.add_adapter("ref", lora())
    return wrapped, {}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pissa", r"init_lora_weights='pissa' takes the adapter out.*Set init_lora_weights=True"),
        ("pissa, wrapped", r"init_lora_weights='pissa_niter_2'.*peft_config\['default'\]"),
        ("bias", r"bias='all': biases of the base are trained.*lowmem_reference='precomputed'"),
        ("a base weight", r"1 weights \('.*norm.weight', \.\.\.\) of the base are trained"),
        ("another adapter", r"active_adapter=\['second'\].*Name the adapter 'default'"),
        ("ref", r"has an adapter 'ref' already.*delete_adapter\('ref'\)"),
    ],
)
@pytest.mark.parametrize("way", [None, "adapter"])
def test_an_adapter_that_is_not_all_of_the_change(
    kind: str, says: str, way: str | None, tmp_path: Path, tokenizer: Any
) -> None:
    model, extra = spoiled_by(kind)
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, tokenizer, model=model, lowmem_reference=way, extra=extra)
    model, extra = spoiled_by(kind)
    made = trainer(tmp_path, tokenizer, model=model, ref_model=policy(1), lowmem_reference="full", extra=extra)
    assert made.reference_kind == "full"  # which the messages offer


KEPT_BESIDE_MODULES: dict[str, Callable[[], PeftConfig]] = {
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "fourierft": lambda: FourierFTConfig(n_frequency=20, target_modules=["q_proj"]),
    "vera": lambda: VeraConfig(target_modules=["q_proj", "o_proj"]),
    "an embedding": lambda: LoraConfig(r=4, target_modules=["embed_tokens"]),
    "tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
}


@pytest.mark.parametrize("way", ["adapter", "precomputed"])
@pytest.mark.parametrize("kind", KEPT_BESIDE_MODULES)
def test_the_frozen_copy_of_an_adapter_is_whole(kind: str, way: str, tmp_path: Path, tokenizer: Any) -> None:
    """Tensors that PEFT keeps under the adapter's name itself, too, which TRL does not copy."""
    model = get_peft_model(policy(), KEPT_BESIDE_MODULES[kind]())
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    made = trainer(tmp_path, tokenizer, model=model, lowmem_reference=way)
    assert made.compute_loss(made.model, first_batch(made)).item() == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("way", ["full", "precomputed", "adapter", "quantized"])
def test_the_reference_draws_no_dropout(way: str, tmp_path: Path, tokenizer: Any) -> None:
    """Though policy and reference are passed in train mode, with dropout on; each module's mode is as it was."""
    extra = {"peft_config": lora(lora_dropout=0.5)} if way == "adapter" else {}
    dropping: dict[str, Any] = {"attention_dropout": 0.5, "initializer_range": 0.3}
    model, reference = policy(**dropping).train(), policy(1, **dropping).train()
    still = model.model.norm
    still.training = False
    made = trainer(
        tmp_path, tokenizer, model=model, ref_model=None if way == "adapter" else reference, lowmem_reference=way,
        disable_dropout=False, extra=extra,
    )  # fmt: skip
    seen = []
    compute = made.compute_ref_log_probs

    def recorded(*args: Any) -> Any:
        seen.append(torch.cat(compute(*args)))
        return seen[-1].chunk(2)

    batch, made.compute_ref_log_probs = first_batch(made), recorded
    policies = [made.compute_loss(made.model, batch).item() for _ in range(3)]
    assert [m for m in model.modules() if not m.training] == [still]
    if way == "precomputed":
        with in_eval_mode(model := policy(1, **dropping)):
            made.model = made.ref_model = model
            add_fused_lm_head(model)
            plain = {k: v for k, v in batch.items() if not k.startswith("ref_")}
            seen = [
                torch.cat(compute(model, plain)),
                torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]),
            ]
    else:
        assert len(seen) == 3
        assert len(set(policies)) == 3, "the policy draws its dropout"
    for got in seen[1:]:
        torch.testing.assert_close(got, seen[0])


def test_modes_come_back_after_an_exception() -> None:
    model = policy().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    inside = []
    with contextlib.suppress(KeyError), in_eval_mode(model):
        inside = [m.training for m in model.modules()]
        raise KeyError
    assert inside
    assert not any(inside)
    assert [m.training for m in model.modules()] == modes
    assert {True, False} == set(modes)


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"lowmem_activations": "fp8_recompute"}])
def test_neither_checkpointing_nor_a_tier_changes_the_reference(
    setting: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    def values(**fields: Any) -> list[float]:
        fields = {"gradient_checkpointing": None} | fields if "lowmem_activations" in fields else fields
        made = trainer(
            tmp_path, tokenizer, ref_model=None, lowmem_reference="precomputed", max_steps=1, evals=data(4), **fields
        )
        late = made.evaluate(data(5))  # with the tier in place
        return [late["eval_loss"], *made.train_dataset["ref_chosen_logps"][:4]]

    assert values(**setting) == pytest.approx(values(), abs=1e-6)
