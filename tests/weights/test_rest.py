"""Weights at rest: a model computes what the plain one would, and whoever else reads a weight is told its name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_lowmem.activations import convert
from hf_lowmem.memory import parameter_bytes
from hf_lowmem.optim import OPTIMIZERS, StepInBackward, make_optimizer
from hf_lowmem.optim.resting import choose
from hf_lowmem.planner.models import make_model
from hf_lowmem.specs import TIERS, OptimSpec
from hf_lowmem.training.resting import RestingWeights
from hf_lowmem.weights import SIDE_FILE, at_rest, rest, resting, wake
from tests.conftest import tiny_llama

BF16 = torch.bfloat16
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def llama(**overrides: Any) -> Any:
    return tiny_llama(dtype=BF16, **{"num_hidden_layers": 2} | overrides).train()


def gpt2(**overrides: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, **overrides))
    return model.to(BF16).train()


def loss_of(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def both(make: Callable[..., Any], **kwargs: Any) -> tuple[Any, Any]:
    """A model at rest, and a plain one with the same values."""
    model, plain = make(**kwargs), make(**kwargs)
    make_optimizer("adamw", model, weights="int8_sr")
    plain.load_state_dict(model.state_dict())
    return model, plain


def gradients(model: Any, run: Callable[[Any], Tensor] = loss_of) -> tuple[Tensor, dict[str, Tensor]]:
    loss = run(model)
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(model: Any, plain: Any, run: Callable[[Any], Tensor] = loss_of) -> None:
    (loss, found), (expected, grads) = gradients(model, run), gradients(plain, run)
    assert torch.equal(loss, expected)
    assert found.keys() == grads.keys()
    assert all(torch.equal(found[n], grads[n]) for n in grads), [
        n for n in grads if not torch.equal(found[n], grads[n])
    ]


@pytest.mark.parametrize("first", ["tier", "rest"])
@pytest.mark.parametrize("tier", [None, *TIERS])
def test_loss_and_gradients_are_those_of_the_plain_model(tier: str | None, first: str) -> None:
    """In whichever order both are put on the model, since a tier's forwards stand around a layer's own."""
    model, plain = llama(), llama()
    if first == "tier" and tier is not None:
        convert(model, tier)
    make_optimizer("adamw", model, weights="int8_sr")
    assert len(resting(model)) == 15
    plain.load_state_dict(model.state_dict())
    if tier is not None:
        convert(plain, tier)
        convert(model, tier)
    same(model, plain)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_checkpointing_runs_a_layer_twice(make: Callable[..., Any]) -> None:
    model, plain = both(make)
    for one in (model, plain):
        one.gradient_checkpointing_enable({"use_reentrant": False})
    same(model, plain)


def test_linears_with_a_bias_and_conv1d() -> None:
    """GPT-2's linears lie the other way round; its head and its embedding are one, and stay."""
    model, plain = both(gpt2)
    assert len(resting(model)) == 9  # four a layer, and the table of positions
    assert at_rest(model.lm_head.weight) is None
    same(model, plain)
    same(*both(llama, attention_bias=True, mlp_bias=True))


def test_autocast_of_an_fp32_stream() -> None:
    def run(model: Any) -> Tensor:
        hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            return model.model.layers[0].mlp(hidden).float().square().mean()

    same(*both(llama), run)


def test_a_backward_pass_may_enter_a_layer_from_its_middle() -> None:
    """As a router's loss does: no way into a layer finds a weight that is not there."""

    def run(model: Any) -> Tensor:
        seen = []
        hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda m, i, o: seen.append(o))
        loss = loss_of(model) + seen[0].float().square().mean()
        hook.remove()
        return loss

    same(*both(llama), run)


def test_weights_shared_by_two_layers_rest_once() -> None:
    def make() -> Any:
        model = llama()
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model

    model, plain = both(make)
    assert len(resting(model)) == 14
    same(model, plain)


@pytest.fixture
def no_nan_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not let a parameter be moved to the meta device, which stands for an accelerator here."""
    monkeypatch.setattr(rest, "_set_nan", lambda p, device: None)


def devices(model: nn.Module) -> set[str]:
    return {t.device.type for kept in resting(model).values() for t in kept.stored()}


def test_a_model_at_rest_is_moved(request: pytest.FixtureRequest) -> None:
    """It goes to a device as codes: there may be no room for it in bf16."""
    model = llama(mlp_bias=True)
    make_optimizer("adamw", model, weights="int8_sr")
    request.getfixturevalue("no_nan_is_moved")
    resting_parameters = [p for p in model.parameters() if at_rest(p) is not None]
    assert model.to("meta") is model
    assert devices(model) == {"meta"}
    assert {id(p) for p in resting_parameters} < {id(p) for p in model.parameters()}
    mlp = model.model.layers[0].mlp.up_proj
    assert (mlp.bias.device.type, model.lm_head.weight.device.type) == ("meta", "meta")


def test_a_trainer_moves_codes(request: pytest.FixtureRequest) -> None:
    class Host:
        def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
            before.update(resting(model))
            request.getfixturevalue("no_nan_is_moved")
            model.to(device)

    class Trainer(RestingWeights, Host):
        def _resting_spec(self) -> OptimSpec:
            return OptimSpec(name="adamw", weights="int8_sr")

    before: dict[str, Any] = {}
    model = llama()
    Trainer()._move_model_to_device(model, torch.device("cpu"))
    assert not before  # there already, it may take a checkpoint's values first
    Trainer()._move_model_to_device(model, torch.device("meta"))
    assert len(before) == 15
    assert devices(model) == {"meta"}


def test_bytes_are_those_of_codes_and_scales() -> None:
    model = llama()
    make_optimizer("adamw", model, weights="int8_sr")
    kept = sum(w.codes.numel() + 4 * w.scale.numel() + 2 for w in resting(model).values())
    others = sum(2 * p.numel() for p in model.parameters() if at_rest(p) is None)
    assert parameter_bytes(model) == kept + others


def test_a_second_graph_of_older_weights_is_an_error() -> None:
    """As autograd says it of plain weights that a step in backward has written to."""
    model, hidden = llama(), torch.randn(2, 5, 64, dtype=BF16)
    optimizer = make_optimizer("adamw", model, weights="int8_sr")
    stepping = StepInBackward(optimizer)
    first, second = (model.model.layers[0].mlp(hidden).float().sum() for _ in range(2))
    first.backward()
    with pytest.raises(RuntimeError, match="was updated after the forward pass"):
        second.backward()
    stepping.remove()


def test_gradients_that_wait_for_a_step_are_an_error() -> None:
    model = llama()
    optimizer = make_optimizer("adamw", model, weights="int8_sr")
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"needs a step in backward, and model\..*StepInBackward\(optimizer\)"):
        optimizer.step()


def test_saved_as_a_plain_model_and_back_to_the_bit(tmp_path: Path) -> None:
    model = llama()
    optimizer = make_optimizer("adamw", model, lr=5e-3, weights="int8_sr")
    stepping = StepInBackward(optimizer)
    for _ in range(5):
        loss_of(model).backward()
        optimizer.step()
    stepping.remove()
    model.save_pretrained(tmp_path)
    assert (tmp_path / SIDE_FILE).is_file()
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    saved = model.state_dict()
    assert list(saved) == list(plain.state_dict())
    assert {v.dtype for v in saved.values()} == {BF16}
    assert all(torch.equal(v, saved[n]) for n, v in plain.state_dict().items())
    make_optimizer("adamw", plain, weights="int8_sr")
    kept, again = resting(model), resting(plain)
    assert all(torch.equal(kept[n].codes, again[n].codes) and torch.equal(kept[n].scale, again[n].scale) for n in kept)


def test_scales_that_do_not_fit_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    make_optimizer("adamw", model, weights="int8_sr")
    model.save_pretrained(tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    with torch.no_grad():
        plain.model.layers[0].mlp.up_proj.weight.mul_(3)
    make_optimizer("adamw", plain, weights="int8_sr")
    assert "does not fit 1 weights" in caplog.text


def test_loading_while_at_rest(caplog: pytest.LogCaptureFixture) -> None:
    model, other = llama(), llama(seed=1)
    make_optimizer("adamw", model, weights="int8_sr")
    make_optimizer("adamw", other, weights="int8_sr")
    values = other.state_dict()
    rest._say_rounded.cache_clear()
    model.load_state_dict(values)
    assert caplog.text.count("rounded to codes anew") == 1
    # The nearest codes, by scales of their own.
    for name, kept in resting(model).items():
        group = values[name].float().abs().amax(-1, keepdim=True) / 127
        assert torch.all((kept.decode().float() - values[name].float()).abs() <= group)
    with pytest.raises(RuntimeError, match=r"up_proj.*values of shape|size mismatch"):
        model.load_state_dict(values | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)})
    model.load_state_dict(values, assign=True)
    with pytest.raises(RuntimeError, match="has been replaced since"):
        loss_of(model)


def test_awake_again() -> None:
    model = llama()
    keys = {n: sorted(vars(m)) for n, m in model.named_modules()}
    make_optimizer("adamw", model, weights="int8_sr")
    saved = model.state_dict()
    make_optimizer("adamw", model, weights="int8_sr")  # again is nothing
    assert len(resting(model)) == 15
    with pytest.raises(ValueError, match=r"weights='bf16_sr'.*at rest in int8 \(model\..*wake\(model\)"):
        make_optimizer("adamw", model, weights="bf16_sr")
    assert wake(model) is model
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == keys
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert all(torch.equal(v, saved[n]) for n, v in model.state_dict().items())
    copy.deepcopy(model)
    make_optimizer("adamw", model, weights="bf16_sr")


def test_awake_in_between_is_noticed() -> None:
    """An optimizer does not go on to step codes that nobody reads any more."""
    model = llama()
    optimizer = make_optimizer("adamw", model, lr=1e-2, weights="int8_sr")
    stepping = StepInBackward(optimizer)
    loss_of(model).backward()
    wake(model)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    loss_of(model).backward()
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
    stepping.remove()


def test_generation() -> None:
    model, plain = both(llama)
    made = [m.eval().generate(IDS[:, :5], max_new_tokens=6, do_sample=False) for m in (model, plain)]
    assert torch.equal(*made)


def test_what_stays_is_said() -> None:
    model = llama(hidden_size=64, intermediate_size=112)
    for p in model.model.layers[1].parameters():
        p.requires_grad_(False)
    found = choose(model)
    assert [n for n, _, _ in found.weights if "down" in n] == []  # rows of 112 values
    assert "128 stay" not in str(found)
    assert "the output head" in str(found)
    assert "rows that 32 does not divide" in str(found)


def refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer("adamw", model, weights="int8_sr")
    assert not resting(model)


def test_refused_in_words() -> None:
    refused(tiny_llama(), r"weights='int8_sr' has no effect: no trained bfloat16 weight.*float32 weights.*dtype=")
    adapted = llama()
    adapted.peft_config = {"default": None}
    refused(adapted, r"weights='int8_sr' cannot be combined with adapters.*load_in_8bit")
    with pytest.raises(ValueError, match=r"for a model.*make_optimizer\(name, model"):
        OPTIMIZERS["adamw"](llama().parameters(), weights="int8_sr")
    broken = llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight has NaN or Inf"):
        make_optimizer("adamw", broken, weights="int8_sr")


def test_a_forward_that_is_not_the_layers_own_is_left_alone() -> None:
    model = llama()
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) * 2
    make_optimizer("adamw", model, weights="int8_sr")
    assert at_rest(linear.weight) is None
    loss_of(model).backward()


def test_a_simulation_looks_at_no_values() -> None:
    config = llama().config
    with FakeTensorMode():
        model = make_model(config, BF16, "sdpa")
        make_optimizer("adamw", model, weights="int8_sr")
        assert len(resting(model)) == 15
        model(input_ids=torch.zeros(2, 24, dtype=torch.long)).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
