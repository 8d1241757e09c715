"""convert and undo: what they change, what they leave, what they refuse."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem.activations import convert, measure, undo
from hf_lowmem.memory import measure_saved
from hf_lowmem.specs import TIERS, ActivationSpec
from tests.activations.models import batch, build, loss_and_gradients


def forwards(model: nn.Module) -> dict[str, str]:
    return {n: type(vars(m)["forward"]).__name__ for n, m in model.named_modules() if "forward" in vars(m)}


@pytest.mark.parametrize("tier", TIERS)
def test_undo_leaves_no_trace(tier: str) -> None:
    model = build("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    convert(model, tier)
    assert forwards(model)
    undo(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    undo(model)  # and again


@pytest.mark.parametrize("tier", TIERS)
def test_converting_twice_changes_nothing(tier: str) -> None:
    model = build("llama")
    first = str(convert(model, tier))
    found = forwards(model)
    assert str(convert(model, tier)) == first
    assert forwards(model) == found
    undo(model)
    assert not forwards(model)


def test_another_tier_replaces_the_first() -> None:
    model = build("llama")
    convert(model, "fp8_recompute")
    convert(model, "checkpoint_fp8")
    assert set(forwards(model)) == {"model.layers.0", "model.layers.1"}


def test_a_refused_tier_leaves_the_first_in_place() -> None:
    model = build("llama")
    convert(model, "fp8")
    found = forwards(model)
    with pytest.raises(ValueError):
        convert(model, "fp8:0-7")
    assert forwards(model) == found


@pytest.mark.parametrize("tier", TIERS)
def test_state_dict_names_and_saved_folder_are_the_plain_models(tier: str, tmp_path: Any) -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    convert(model, tier)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert str(model) == str(plain)
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    files = {p.name: p.read_bytes() for p in (tmp_path / "plain").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()} == files


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_converted_and_independent(tier: str, how: Any) -> None:
    model = build("llama")
    convert(model, tier)
    loss, gradients = loss_and_gradients(model, batch())
    copied = how(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    undo(model)
    assert forwards(copied)
    ours, our_gradients = loss_and_gradients(copied, batch())
    assert torch.equal(loss, ours)
    assert all(torch.equal(g, our_gradients[n]) for n, g in gradients.items())


@pytest.mark.parametrize("tier", TIERS)
def test_eval_and_generate_are_untouched(tier: str) -> None:
    model = build("llama").eval()
    ids = batch(tokens=6)["input_ids"]
    tokens, logits = model.generate(ids, max_new_tokens=4, do_sample=False), model(ids).logits
    convert(model, tier)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    assert torch.equal(model(ids).logits, logits)
    gradients = loss_and_gradients(model, batch())[1]  # eval mode with gradients is HuggingFace's too
    undo(model)
    assert all(torch.equal(g, gradients[n]) for n, g in loss_and_gradients(model, batch())[1].items())


def test_a_policy_gives_each_layer_its_tier() -> None:
    model = build("llama", num_hidden_layers=4)
    loss, _ = loss_and_gradients(model, batch())
    report = convert(model, "fp8:0-1, checkpoint_fp8:3-")
    assert [layer.tier for layer in report.layers] == ["fp8", "fp8", None, "checkpoint_fp8"]
    assert torch.equal(loss_and_gradients(model, batch())[0], loss)
    inputs = batch()
    ratios = [after / before for before, after in measure(model, lambda: model(**inputs), 48).layers.values()]
    assert len(ratios) == 3  # the third layer is plain
    assert ratios[2] < ratios[1] < 0.4


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ("fp9", "lowmem_activations='fp9' is not available"),
        (8, "lowmem_activations=8: expected a string"),
        ("fp8:0-1,fp9:2-", "lowmem_activations='fp9' is not available"),
        ("fp8:", "lowmem_activations='fp8:': 'fp8:' is not a tier with its layers"),
        ("fp8:3-1", "not a tier with its layers"),
        ("fp8:0-3,exact:3-", "names layer 3 twice"),
        ("fp8:0-,exact:5", "names layer 5 twice"),
        ("fp8,exact:5", "is not a tier with its layers"),
    ],
)
def test_bad_policies_are_refused_before_a_model_exists(tiers: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ActivationSpec(tiers=tiers)


def test_stochastic_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="stochastic=1: expected True or False"):
        ActivationSpec(tiers="fp8", stochastic=1)  # type: ignore[arg-type]


def test_layers_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"lowmem_activations='fp8:0-9': the model has layers 0 to 1. Write 'fp8:0-'"):
        convert(build("llama"), "fp8:0-9")


def test_an_unknown_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="no stack of decoder layers was found in Sequential"):
        convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "fp8")
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
        convert("gpt2", "fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("tier", TIERS)
def test_checkpointing_is_never_a_silent_no_op(tier: str) -> None:
    model = build("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"activation checkpointing is on.*activation_checkpointing=False"):
        convert(model, tier)
    model.gradient_checkpointing_disable()
    convert(model, tier)
    model.gradient_checkpointing_enable()  # as Trainer.train() does, later
    with pytest.raises((RuntimeError, ValueError), match="activation checkpointing"):
        model(**batch())


def test_experts_are_reported_and_the_rest_is_handled() -> None:
    report = convert(build("mixtral"), "fp8")
    assert report.layers[0].handled == {"attention": 1, "recomputed (norms, activations, dropouts)": 2}
    assert "experts" in report.layers[0].left["mlp"]
    assert "mlp: experts" in str(report)


def test_the_report_is_one_row_for_equal_layers() -> None:
    lines = str(convert(build("llama", num_hidden_layers=3), "fp8:0-1")).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["model.layers.0-1", "fp8"], ["model.layers.2", "-"]]


def test_eager_attention_is_reported() -> None:
    assert "eager" in str(convert(build("llama", attn="eager"), "fp8"))
    assert "eager" not in str(convert(build("llama"), "fp8"))


def test_measure_counts_both_and_leaves_the_generator_alone() -> None:
    model = build("llama")
    convert(model, "fp8")
    inputs = batch()
    state = torch.get_rng_state()
    measured = measure(model, lambda: model(**inputs), 48)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0 < measured.after < measured.before
    assert "model.layers.1" in str(measured)
    assert len(forwards(model)) == 2 * 6
    with pytest.raises(ValueError, match="tokens=0"):
        measure(model, lambda: model(**inputs), 0)
    with pytest.raises(ValueError, match="eval mode"):
        measure(model.eval(), lambda: model(**inputs), 48)


@pytest.mark.train
def test_a_compiled_model_runs_its_layers_as_they_are_converted() -> None:
    model = build("llama")
    loss, gradients = loss_and_gradients(model, batch())
    convert(model, "exact")
    compiled = torch.compile(model, backend="eager")
    ours, our_gradients = loss_and_gradients(compiled, batch())  # type: ignore[arg-type]
    assert torch.equal(loss, ours)
    assert all(torch.equal(g, our_gradients[f"_orig_mod.{n}"]) for n, g in gradients.items())
    before, after = next(iter(measure(model, lambda: compiled(**batch()), 48).layers.values()))
    assert after < 0.6 * before


def test_fake_tensors_weigh_a_step() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = []
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "vocab_size": 64}
    with FakeTensorMode():
        for tier in (None, "exact", "fp8"):
            model = LlamaForCausalLM(LlamaConfig(**sizes)).train()
            if tier:
                convert(model, tier)
            ids = torch.zeros(2, 128, dtype=torch.long)
            with measure_saved(model) as saved:
                loss = model(input_ids=ids, labels=ids).loss
            kept.append(saved.total)
            loss.backward()
    assert kept[2] < 0.6 * kept[1] < 0.5 * kept[0]
