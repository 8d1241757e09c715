"""Lossy tiers by way of the kernels: the same bytes, the same gradients; where they do not apply, left alone.

Triton runs in its interpreter where there is no GPU. What it computes there must be, bit for bit, what the references
compute in the same place; those are fast enough for everything else.
"""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.activations import at_step, convert, undo
from hf_lowmem.activations.tape import Tape
from hf_lowmem.kernels import use_kernels
from hf_lowmem.memory import measure_saved
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import FAMILIES, batch, build, loss_and_gradients, twin
from tests.activations.test_lora import with_lora
from tests.activations.test_lossy import bound, worst

TIERS = ["fp8", "fp8_recompute"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wide(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Rows of one group and more."""
    heads: Any = None if family in ("phi3", "olmo2") else 32
    return build(family, dtype, hidden_size=128, intermediate_size=192, head_dim=heads)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a kernel stood in: "norm", "glu"."""
    counts = {"norm": 0, "glu": 0}

    def counted(name: str) -> Any:
        original = getattr(Tape, name)

        def run(self: Tape, *args: Any) -> Tensor | None:
            result = original(self, *args)
            counts[name] += result is not None
            return result

        return run

    for name in counts:
        monkeypatch.setattr(Tape, name, counted(name))
    return counts


def by_kernels(model: nn.Module, inputs: dict[str, Any], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    with use_kernels("reference"):
        return loss_and_gradients(model, inputs, seed)


@pytest.mark.parametrize(("family", "tier"), [("llama", "fp8"), ("qwen3", "fp8_recompute"), ("gemma3", "fp8")])
def test_triton_trains_a_layer_bit_for_bit_as_the_references(family: str, tier: str, fused: dict[str, int]) -> None:
    """Losses and gradients of two steps. The bound between the two implementations is zero; eager attention, because
    a GPU's sdpa adds up in no fixed order."""
    model = build(family, attn="eager", num_hidden_layers=1).to(DEVICE)
    inputs = {name: t.to(DEVICE) for name, t in batch(tokens=3).items()}
    spec = ActivationSpec(tiers=tier, stochastic=family == "llama", seed=1)
    runs = []
    for impl in ("reference", "triton"):
        trained = twin(model, lambda m: convert(m, spec))
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        with use_kernels(impl):
            for _ in range(2):
                runs.append(loss_and_gradients(trained, inputs))
                optimizer.step()
    norms = 4 if family == "gemma3" else 2
    assert fused == {"norm": 2 * 2 * norms, "glu": 2 * 2}
    for (loss, gradients), (ours, our_gradients) in zip(runs[:2], runs[2:], strict=True):
        assert torch.equal(loss, ours)
        assert all(torch.equal(g, our_gradients[name]) for name, g in gradients.items())
    assert not torch.equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "olmo2", "granite"])
def test_gradients_are_those_without_kernels(family: str, tier: str, fused: dict[str, int]) -> None:
    """In fp32. Both decode the same codes, except that where the forward passes differ in their last bits a code may
    fall to the other side. One such is 1/8 of one value, 1 / (8 sqrt(N)) of a tensor's norm, at most twice that of a
    gradient's (tests/activations/test_lossy.py); N is at least 48 tokens of 128 values; two of them are allowed for.
    """
    model = wide(family)
    inputs = batch()
    _, truth = loss_and_gradients(twin(model, lambda m: m.double()), inputs)
    convert(model, tier)
    loss, gradients = loss_and_gradients(model, inputs)
    assert not any(fused.values())
    ours, by_kernel = by_kernels(model, inputs)
    assert fused["norm"] >= 4
    assert fused["glu"] == 2
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    assert by_kernel.keys() == gradients.keys()
    if family != "phi3":  # its halves have groups, and so codes, of their own
        assert worst(by_kernel, gradients)[0] < math.sqrt(2) * 2 / (8 * math.sqrt(48 * 128))
    assert worst(by_kernel, truth)[0] < bound()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "olmo2"])
def test_no_more_bytes_are_kept(family: str, tier: str, fused: dict[str, int]) -> None:
    model = wide(family, torch.bfloat16)
    convert(model, tier)
    kept = []
    for impl in ("auto", "reference"):
        with use_kernels(impl), measure_saved(model) as saved:
            output = model(**batch())
            kept.append(saved.total)
        del output
    assert fused["glu"] == 2
    assert kept[1] <= kept[0]


def test_in_bf16_the_error_is_no_larger_than_without_kernels(fused: dict[str, int]) -> None:
    """Kernels round once where torch rounds at every factor; a tenth is for the codes that fall otherwise."""
    model = wide("llama", torch.bfloat16)
    inputs = batch()
    _, truth = loss_and_gradients(twin(model, lambda m: m.double()), inputs)
    convert(model, "fp8")
    _, without = loss_and_gradients(model, inputs)
    _, ours = by_kernels(model, inputs)
    assert fused["glu"] == 2
    assert worst(ours, truth)[0] < 1.1 * worst(without, truth)[0] < 2 * bound()


@pytest.mark.parametrize("tier", TIERS)
def test_autocast(tier: str, fused: dict[str, int]) -> None:
    model = wide("llama")
    inputs = batch()
    _, truth = loss_and_gradients(twin(model, lambda m: m.double()), inputs)
    convert(model, tier)
    with torch.autocast("cpu", torch.bfloat16):
        loss, without = loss_and_gradients(model, inputs)
        ours, gradients = by_kernels(model, inputs)
    assert fused["glu"] == 2
    torch.testing.assert_close(ours, loss, rtol=2.0**-8, atol=0)
    assert worst(gradients, truth)[0] < 1.1 * worst(without, truth)[0] < 2 * bound()


@pytest.mark.parametrize("tier", TIERS)
def test_adapters_with_dropout(tier: str, fused: dict[str, int]) -> None:
    model = with_lora(wide("llama"))
    convert(model, tier)
    inputs = batch()
    loss, gradients = loss_and_gradients(model, inputs)
    ours, by_kernel = by_kernels(model, inputs)
    assert fused["norm"] == 3  # in the first layer nothing below the first norm is trained, and it is frozen itself
    assert fused["glu"] == 2
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    assert by_kernel.keys() == gradients.keys()
    assert worst(by_kernel, gradients)[0] < 0.01  # as above, with adapters of 8 values a token


def test_stochastic_rounding_follows_the_step(fused: dict[str, int]) -> None:
    model = build("llama")
    convert(model, ActivationSpec(tiers="fp8", stochastic=True))
    found = []
    for step in (1, 2, 1, 3):
        at_step(model, step)
        found.append(by_kernels(model, batch(), 1)[1])
    first, _, second, third = found
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], third[name])
    assert fused["norm"] == 4 * 4


def test_backward_twice_over_one_graph(fused: dict[str, int]) -> None:
    model = build("llama")
    convert(model, "fp8_recompute")
    with use_kernels("reference"):
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        once = {n: p.grad.clone() for n, p in model.named_parameters()}
        loss.backward()
    assert fused["glu"] == 2
    assert all(torch.equal(2 * once[n], p.grad) for n, p in model.named_parameters())


@pytest.mark.parametrize("tier", TIERS)
def test_weights_stepped_inside_backward(tier: str, fused: dict[str, int]) -> None:
    model = build("llama")
    convert(model, tier)
    _, gradients = by_kernels(model, batch())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def step(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(p.grad)  # type: ignore[arg-type]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    by_kernels(model, batch())
    assert fused["glu"] == 4
    assert all(torch.equal(before[n] - gradients[n], p) for n, p in model.named_parameters())


def test_a_norms_weight_changed_before_backward_is_an_error() -> None:
    model = build("llama")
    convert(model, "fp8")
    with use_kernels("reference"):
        loss = model(**batch()).loss
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_frozen_parts(fused: dict[str, int]) -> None:
    """A norm below which nothing is trained, and a gate without gradient: the former by a kernel, the latter not."""
    model = build("llama")
    model.requires_grad_(False)
    model.model.layers[0].input_layernorm.requires_grad_(True)
    model.model.layers[1].mlp.requires_grad_(True)
    convert(model, "fp8")
    _, gradients = loss_and_gradients(model, batch())
    _, ours = by_kernels(model, batch())
    assert fused == {"norm": 4, "glu": 2}
    assert worst(ours, gradients)[0] < 0.01

    model = build("llama", num_hidden_layers=1).requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    convert(model, "fp8")
    fused["glu"] = 0
    by_kernels(model, batch())
    assert fused["glu"] == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_by_the_kernels_too(how: Any, fused: dict[str, int]) -> None:
    model = build("llama")
    convert(model, "fp8")
    _, gradients = by_kernels(model, batch())
    _, ours = by_kernels(how(model), batch())
    assert fused == {"norm": 8, "glu": 4}
    assert all(torch.equal(g, ours[name]) for name, g in gradients.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_cpu_no_kernel_is_asked_for(family: str, fused: dict[str, int]) -> None:
    model = build(family)
    loss, _ = loss_and_gradients(model, batch(tokens=8))
    convert(model, "fp8")
    ours, _ = loss_and_gradients(model, batch(tokens=8))
    assert torch.equal(loss, ours)
    assert not any(fused.values())


def test_other_dtypes_and_eval_mode_are_left_alone(fused: dict[str, int]) -> None:
    model = build("llama", torch.float64)
    loss, _ = loss_and_gradients(model, batch())
    convert(model, "fp8")
    assert torch.equal(by_kernels(model, batch())[0], loss)
    assert not any(fused.values())
    model = build("llama").eval()
    logits = model(**batch()).logits
    convert(model, "fp8")
    with use_kernels("reference"):
        assert torch.equal(model(**batch()).logits, logits)
    assert not any(fused.values())


def test_modules_with_hooks_run_themselves(fused: dict[str, int]) -> None:
    model = build("llama", num_hidden_layers=1)
    convert(model, "fp8")
    layer = model.model.layers[0]
    seen: list[str] = []
    layer.input_layernorm.register_forward_hook(lambda *args: seen.append("norm"))
    layer.mlp.act_fn.register_full_backward_hook(lambda *args: seen.append("act"))
    layer.mlp.gate_proj.register_forward_hook(lambda *args: seen.append("gate"))
    layer.mlp.register_full_backward_hook(lambda *args: seen.append("mlp"))
    _, gradients = loss_and_gradients(model, batch())
    expected, seen[:] = list(seen), []
    _, ours = by_kernels(model, batch())
    assert seen == expected
    assert set(seen) == {"norm", "gate", "mlp", "act"}
    assert fused == {"norm": 1, "glu": 0}
    assert worst(ours, gradients)[0] < 0.01


def test_a_hook_may_change_what_the_mlp_is_given(fused: dict[str, int]) -> None:
    model = build("llama", num_hidden_layers=1)
    convert(model, "fp8")
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.register_forward_hook(lambda module, args, out: out * 2)
    mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    _, gradients = loss_and_gradients(model, batch())
    _, ours = by_kernels(model, batch())
    assert fused["glu"] == 1
    assert worst(ours, gradients)[0] < 0.01


def test_a_forward_that_somebody_has_replaced_is_called(fused: dict[str, int]) -> None:
    model = build("llama", num_hidden_layers=1)
    layer = model.model.layers[0]
    for module in (layer.mlp, layer.input_layernorm):
        module.forward = lambda x, own=module.forward: own(x) * 2  # as kernel libraries patch a model
    loss, _ = loss_and_gradients(model, batch())
    convert(model, "fp8")
    ours, _ = by_kernels(model, batch())
    assert fused == {"norm": 1, "glu": 0}
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    undo(model)
    assert torch.equal(loss_and_gradients(model, batch())[0], loss)
