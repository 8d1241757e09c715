"""The rule of embedding and output head: which parameters take it, its bytes, resume, step in backward."""

import copy
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer, StepInBackward, group_table, make_optimizer, methods_with
from hf_lowmem.specs import EMBEDDING_RULES
from tests.conftest import tiny_llama

METHODS = methods_with("embeddings")
LOOKUPS = ("model.embed_tokens.weight", "lm_head.weight")
both = pytest.mark.parametrize(("name", "rule"), list(itertools.product(METHODS, EMBEDDING_RULES)))


def make(name: str, rule: str | None, model: nn.Module, **kwargs: Any) -> LowMemOptimizer:
    settings = {k: v for k, v in {"rank": 4, "update_gap": 3}.items() if k in OPTIMIZERS[name].DEFAULTS}
    given: dict[str, Any] = {"lr": 0.01, "state": "8bit", "weight_decay": 0.1} | settings | kwargs
    return make_optimizer(name, model, embeddings=rule, **given)


def train(model: Any, optimizer: LowMemOptimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def states_of(optimizer: LowMemOptimizer, model: nn.Module) -> dict[str, set[str]]:
    """Names of the states of each parameter, by its name."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: set(optimizer.slot(p, group).states) for group in optimizer.param_groups for p in group["params"]}


def test_the_methods_that_have_one() -> None:
    assert {"apollo", "apollo_mini", "galore", "fira", "natural_galore", "scale"} <= set(METHODS)
    assert not {"adamw", "adam_mini", "lion", "lamb", "soap"} & set(METHODS)
    for name in ("adamw", "lion"):
        with pytest.raises(ValueError, match=r"embeddings='scale' has no effect with name=.*apollo_mini"):
            make(name, "scale", tiny_llama())


@both
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_they_keep(name: str, rule: str, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    optimizer = make(name, rule, model)
    train(model, optimizer, range(2))
    assert optimizer_bytes(optimizer) == sum(row["state_bytes"] for row in group_table(optimizer))
    found = states_of(optimizer, model)
    own = {"adam": {"exp_avg", "exp_avg_sq"}, "scale": {"exp_avg"}, "adam_mini": {"exp_avg", "row_sq"}}[rule]
    if tied:
        assert found[LOOKUPS[0]] == own
    else:
        assert found[LOOKUPS[1]] == own
        assert found[LOOKUPS[0]] == (own if rule != "scale" else set())
    for norm in (n for n in found if "norm" in n):
        assert found[norm] == {"exp_avg", "exp_avg_sq"}


@both
def test_it_is_the_rule_of_the_method_of_that_name(name: str, rule: str) -> None:
    """And linear weights and norms take what they take with any other."""
    start = tiny_llama()
    results = []
    for other, lookups in ((name, rule), (name, "adam"), ("scale", rule), ("adam_mini", None)):
        model = copy.deepcopy(start)
        optimizer = make(other, lookups, model, state="fp32", weight_decay=0.0, eps=1e-8)
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        results.append(weights(model))
    ours, adam, scale, mini = results
    for key in ours:
        if key not in LOOKUPS:
            assert torch.equal(ours[key], adam[key]), key
        elif rule == "adam_mini":
            assert torch.equal(ours[key], mini[key]), key
            assert not torch.equal(ours[key], adam[key])
        elif rule == "scale":
            assert torch.equal(ours[key], scale[key]), key
            assert not torch.equal(ours[key], adam[key])


def test_adam_leaves_groups_as_they_were() -> None:
    """So that checkpoints from before there was a choice go on."""
    for name in METHODS:
        if "rank" not in OPTIMIZERS[name].DEFAULTS:
            continue
        groups = make(name, None, tiny_llama()).param_groups
        assert [(g["rank"] is not None, bool(g["weight_decay"])) for g in groups] == [
            (True, True),
            (False, True),
            (False, False),
        ]


@pytest.mark.parametrize("rule", EMBEDDING_RULES)
@pytest.mark.parametrize("name", ["apollo_mini", "galore", "scale"])
def test_it_resumes_and_only_with_itself(name: str, rule: str) -> None:
    model = tiny_llama()
    optimizer = make(name, rule, model)
    train(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(4, 8))

    again = tiny_llama()
    again.load_state_dict(saved[0])
    resumed = make(name, rule, again)
    resumed.load_state_dict(saved[1])
    train(again, resumed, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

    for other in set(EMBEDDING_RULES) - {rule}:
        with pytest.raises(ValueError, match=f"made with embeddings='{rule}', this optimizer has embeddings='{other}'"):
            make(name, other, tiny_llama()).load_state_dict(saved[1])


def test_a_checkpoint_from_before_there_was_a_choice_is_adam_s() -> None:
    model = tiny_llama()
    optimizer = make("apollo_mini", None, model)
    train(model, optimizer, range(2))
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["embeddings"], group["role"]
    make("apollo_mini", "adam", tiny_llama()).load_state_dict(old)
    with pytest.raises(ValueError, match="made with embeddings='adam'"):
        make("apollo_mini", "scale", tiny_llama()).load_state_dict(old)


@both
def test_step_in_backward_is_the_same_run(name: str, rule: str) -> None:
    one, other = tiny_llama(), tiny_llama()
    train(one, make(name, rule, one), range(3))
    stepped = make(name, rule, other)
    stepping = StepInBackward(stepped)
    train(other, stepped, range(3))
    stepping.remove()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_nothing_to_apply_it_to_is_an_error() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"embeddings='adam_mini' has no effect: neither an embedding nor .* is trained"
    ):
        make("apollo_mini", "adam_mini", model)
    trained = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    rows = group_table(make("apollo_mini", "adam_mini", trained))
    assert "adam_mini (head)" in {row["rule"] for row in rows}


def test_who_sees_how_much() -> None:
    """What a step in blocks of rows may be asked of."""
    reaches = {}
    for name, rule in itertools.product(("apollo_mini", "scale"), EMBEDDING_RULES):
        model = tiny_llama()
        optimizer = make(name, rule, model)
        for group in optimizer.param_groups:
            for p, label in zip(group["params"], group["param_names"], strict=True):
                reaches[name, rule, label] = optimizer.slot(p, group).reach
    embedding, head = LOOKUPS
    for name in ("apollo_mini", "scale"):
        assert [reaches[name, rule, head] for rule in EMBEDDING_RULES] == ["value", "row", "row"]
        assert [reaches[name, rule, embedding] for rule in EMBEDDING_RULES] == ["value", "whole", "row"]
    linear = "model.layers.0.mlp.up_proj.weight"
    assert reaches["scale", "scale", linear] == "row"
    assert reaches["apollo_mini", "scale", linear] == "whole"
