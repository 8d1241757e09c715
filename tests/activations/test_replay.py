"""What backward computes again is what forward computed, whatever has happened to the module in between."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap

from hf_lowmem.activations import convert
from hf_lowmem.activations.blocks import Block, Cheap, Layer, Projection
from hf_lowmem.activations.checkpoint import wrap_layer
from hf_lowmem.activations.detect import why_not_cheap
from hf_lowmem.activations.state import State
from tests.activations.models import batch, build, loss_and_gradients
from tests.activations.test_hunt import LOSSY, error_of


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1) < 0.5) if self.training else x


class OfTheSample(nn.Module):
    """Draws one number in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(()).bernoulli_(0.5) + x.sin() if self.training else x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.randn_like(x)).tanh() if self.training else x.tanh()


class ScaledDropout(nn.Dropout):
    """A dropout whose backward needs its input, which that of torch's own dropouts does not."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square() * self.scale


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rand(x.shape, generator=self.generator)).sin() if self.training else x.sin()

    def __deepcopy__(self, memo: Any) -> "OwnGenerator":
        return OwnGenerator()


RANDOM = [
    DropPath,
    OfTheSample,
    Noise,
    ScaledDropout,
    OwnGenerator,
    lambda: nn.RReLU(0.1, 0.9),
    lambda: nn.Dropout(0.5),
]


class Counting(nn.Module):
    """Writes to its buffer and counts its calls."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return (x - self.mean).sin()


class Toy(nn.Module):
    def __init__(self, part: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.part: Any = part

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.b(self.part(self.a(hidden_states)))


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)
    layer(x * 1.0).square().sum().backward()
    found = {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    return {n: g for n, g in found.items() if g is not None}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(g, two[n]) for n, g in one.items())


@pytest.mark.parametrize("tier", ["exact", "checkpoint"])
@pytest.mark.parametrize("part", RANDOM)
def test_random_numbers_are_the_same_ones(part: Callable[[], nn.Module], tier: str) -> None:
    plain, ours = Toy(part()).eval(), Toy(part()).eval()
    if tier == "exact":
        Layer(ours, "toy", "exact", None).put()
        Cheap(ours.part).put()  # as if nobody had found out that it is random
    else:
        wrap_layer(ours, "none")
    expected = gradients(plain.train())
    state = torch.get_rng_state()
    assert equal(gradients(ours.train()), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert part is OwnGenerator or not equal(gradients(plain.eval()), expected)


@pytest.mark.parametrize("part", [*RANDOM[:4], RANDOM[5]])
def test_a_conversion_in_eval_mode_sees_what_training_does(part: Callable[[], nn.Module]) -> None:
    module, state = part().eval(), torch.get_rng_state()
    assert isinstance(module, nn.Dropout) or "random numbers" in str(why_not_cheap(module))
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training


@pytest.mark.parametrize("tier", ["exact", "checkpoint"])
def test_a_module_with_a_memory_runs_as_often_as_it_did(tier: str) -> None:
    plain, ours = Toy(Counting()), Toy(Counting())
    if tier == "exact":
        Layer(ours, "toy", "exact", None).put()
        Cheap(ours.part).put()
    else:
        wrap_layer(ours, "none")
    for _ in range(2):
        assert equal(gradients(ours), gradients(plain))
    assert torch.equal(ours.part.mean, plain.part.mean)
    assert (ours.part.calls, ours.part.seen) == (2, [1, 2])


def test_a_trial_leaves_no_trace_in_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    before = copy.deepcopy(norm.state_dict())
    why_not_cheap(norm)
    assert all(torch.equal(t, before[n]) for n, t in norm.state_dict().items())


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm"])
@pytest.mark.parametrize("tier", ["exact", "fp8", "fp8_recompute", "checkpoint_fp8"])
def test_parametrised_projections(norm: str, tier: str) -> None:
    model = build("llama")
    for layer in model.model.layers:
        getattr(nn.utils.parametrizations, norm)(layer.mlp.gate_proj)
    ours = copy.deepcopy(model)
    convert(ours, tier)
    for _ in range(2):  # the second time with the vectors that the first has left
        _, truth = loss_and_gradients(model, batch())
        _, found = loss_and_gradients(ours, batch())
        assert error_of(found, truth) < (1e-5 if tier == "exact" else LOSSY)
    assert all(torch.equal(t, dict(model.named_buffers())[n]) for n, t in ours.named_buffers())


MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=MLP, init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.3, target_modules=MLP, init_lora_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=4, rank_dropout=0.4, module_dropout=0.3, target_modules=MLP, init_weights=False),
    "loha": lambda: peft.LoHaConfig(r=4, rank_dropout=0.4, target_modules=MLP, init_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=MLP, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "vera": lambda: peft.VeraConfig(r=4, vera_dropout=0.3, target_modules=["gate_proj", "up_proj"], init_weights=False),
}


@pytest.mark.parametrize("tier", ["exact", "fp8_recompute", "checkpoint_fp8"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_draw_the_same_numbers(kind: str, tier: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), ADAPTERS[kind]()).train()
    ours = copy.deepcopy(model)
    convert(ours, tier)
    _, truth = loss_and_gradients(model, batch())
    _, found = loss_and_gradients(ours, batch())
    assert equal(found, truth) if tier == "exact" else error_of(found, truth) < LOSSY


def with_adapter() -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(build("llama"), ADAPTERS["lora"]())


def switch_off(m: Any) -> None:
    for module in m.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def rescale(m: Any) -> None:
    for module in m.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 9.0)


def replace_parts(m: Any) -> None:
    for layer in m.base_model.model.model.layers:
        layer.mlp.gate_proj, layer.mlp.act_fn = nn.Linear(64, 112), nn.Tanh()
        layer.input_layernorm.weight = nn.Parameter(torch.ones(64))


def freeze(m: Any) -> None:
    m.requires_grad_(False)


def hook(m: Any) -> None:
    for module in m.modules():
        module.register_forward_hook(lambda module, args, output: None)
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]) if args else None)


def to_eval(m: Any) -> None:
    m.eval()


CHANGES = [to_eval, switch_off, rescale, replace_parts, freeze, hook]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tier", ["exact", "fp8_recompute", "checkpoint_fp8"])
def test_what_changes_before_backward_changes_nothing(tier: str, change: Callable[[Any], None]) -> None:
    found = []
    for converted in (False, True):
        model = with_adapter().train()
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if converted:
            convert(model, tier)
        torch.manual_seed(3)
        loss = model(**batch()).loss
        change(model)
        for p in weights.values():  # a frozen leaf takes no gradient, whoever computes it
            p.requires_grad_(True)
        if change is freeze:
            for n, p in weights.items():
                p.requires_grad_("up_proj" in n)
        loss.backward()
        found.append({n: p.grad for n, p in weights.items() if p.grad is not None})
    assert equal(*found) if tier == "exact" else error_of(found[1], found[0]) < LOSSY


@pytest.mark.parametrize("how", ["changed in place", "merged"])
@pytest.mark.parametrize("tier", ["fp8_recompute", "checkpoint_fp8"])
def test_what_cannot_be_had_back_is_an_error(tier: str, how: str) -> None:
    model = with_adapter().train()
    convert(model, tier)
    loss = model(**batch()).loss
    if how == "merged":
        model.merge_adapter()  # adds to the very weights, by way of `.data`, which no version counter sees
    else:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
    with pytest.raises(RuntimeError, match=f"{how}.* between the forward|modified by an inplace operation"):
        loss.backward()


def test_a_module_is_left_as_it_was_found() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    module.names = ["a"]
    state = State(module)
    module.eval()
    module.names.append("b")
    module[0].weight = nn.Parameter(torch.ones(2, 2))
    module.late = 1
    before = {name: dict(vars(m)) for name, m in module.named_modules()}
    with state.again():
        assert module.training
        assert module.names == ["a"]
        assert not hasattr(module, "late")
        assert not torch.equal(module[0].weight, torch.ones(2, 2))
        module.names.append("c")
        module.calls = 3
    for name, m in module.named_modules():
        assert vars(m).keys() == before[name].keys()
        assert all(vars(m)[key] is value for key, value in before[name].items())
    assert module.names == ["a", "b"]


@pytest.mark.parametrize("tier", ["exact", "fp8", "fp8_recompute", "checkpoint_fp8"])
@pytest.mark.parametrize("graph", [False, True], ids=["leaves", "computed"])
def test_lent_weights_are_the_ones_computed_with(tier: str, graph: bool) -> None:
    """As in MAML: `computed` weights are a step of gradient descent away from the model's own, with its graph."""
    model = build("llama")
    ours = copy.deepcopy(model)
    convert(ours, tier)
    found = []
    for m in (model, ours):
        own = dict(m.named_parameters())
        g = torch.Generator().manual_seed(1)
        lent = {n: p + 0.3 * p.detach() * torch.randn(p.shape, generator=g) for n, p in own.items()}
        if not graph:
            own = lent = {n: p.detach().requires_grad_() for n, p in lent.items()}
        loss = functional_call(m, lent, (), {**batch(), "use_cache": False}).loss
        found.append(dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True)))
    assert equal(*found) if tier == "exact" else error_of(found[1], found[0]) < LOSSY


def test_a_clone_is_not_the_weight_that_it_was_made_of() -> None:
    model = build("llama")
    convert(model, "exact")
    plain = copy.deepcopy(model)
    convert(plain, "exact:0")  # the same graph of clones, the second layer plain
    found = []
    for m in (plain, model):
        lent = {n: p.clone() for n, p in m.named_parameters()}
        with torch.no_grad():
            for p in m.model.layers[1].parameters():
                p.mul_(2)
        loss = functional_call(m, lent, (), batch()).loss
        found.append(dict(zip(lent, torch.autograd.grad(loss, list(lent.values())), strict=True)))
    assert equal(*found)


def test_a_result_changed_in_place_is_not_what_its_module_made() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.a = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            with torch.no_grad():
                y.add_(1)
            return F.linear(y.double(), self.a.weight.double()).float()

    plain, ours = Inside(), Inside()
    Layer(ours, "toy", "exact", None).put()
    Cheap(ours.norm).put()
    assert equal(gradients(ours), gradients(plain))


def test_an_input_changed_in_place_is_not_what_is_run_again() -> None:
    """A frozen linear saves no input, so that autograd lets it change; then its output must be kept."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.down = nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.gate(x)
            with torch.no_grad():
                x.mul_(3)
            return self.down(y)

    plain, ours = Inside(), Inside()
    Block(ours, "mlp").put()
    Layer(ours, "toy", "fp8_recompute", None).put()
    Projection(ours.gate).put()
    assert error_of(gradients(ours), gradients(plain)) < LOSSY


@pytest.mark.parametrize("tier", ["exact", "fp8_recompute", "checkpoint_fp8"])
def test_transforms_of_torch_func_get_the_layers_as_they_are(tier: str) -> None:
    model = build("llama", attn="eager")
    weights = {n: torch.stack([p.detach(), 1.1 * p.detach()]) for n, p in model.named_parameters()}
    inputs = {"input_ids": batch()["input_ids"], "use_cache": False}

    def mean(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (), inputs).logits.square().mean()

    def ensemble() -> Tensor:
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        return torch.autograd.grad(vmap(mean)(leaves).sum(), leaves["model.layers.0.mlp.up_proj.weight"])[0]

    def by_func() -> Tensor:
        return torch.func.grad(mean)({n: w[0] for n, w in weights.items()})["model.layers.0.mlp.up_proj.weight"]

    plain = ensemble(), by_func()
    convert(model, tier)
    assert torch.equal(ensemble(), plain[0])
    assert torch.equal(by_func(), plain[1])


@pytest.mark.parametrize("tier", ["exact", "fp8", "checkpoint_fp8", "stream"])
def test_tangents_are_those_of_the_plain_model(tier: str) -> None:
    model = build("llama", attn="eager")
    embeds = model.get_input_embeddings()(batch()["input_ids"]).detach()
    direction = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(1))

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            logits = model(inputs_embeds=forward_ad.make_dual(embeds, direction), use_cache=False).logits
            made = forward_ad.unpack_dual(logits).tangent
        assert made is not None
        return made.detach()

    plain = tangent()
    convert(model, tier)
    assert torch.equal(tangent(), plain)


def on_bare_parameters() -> Any:
    """A model whose fused experts have a LoRA each, which PEFT puts on as a parametrization for the time of a call."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    model = peft.get_peft_model(build("mixtral"), config).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def two_passes(model: Any) -> dict[str, Tensor]:
    """Gradients of two forward passes before one backward pass."""
    first = batch()
    second = first | {"input_ids": first["input_ids"].flip(0)}
    (model(**first, use_cache=False).loss + model(**second, use_cache=False).loss).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tier", ["exact", "fp8", "fp8_recompute", "checkpoint_fp8", "stream"])
def test_adapters_on_bare_parameters(tier: str) -> None:
    plain = two_passes(on_bare_parameters())
    assert any("experts" in name for name in plain)
    ours = on_bare_parameters()
    convert(ours, tier)
    error = error_of(two_passes(ours), plain)
    assert error < (1e-5 if tier in ("exact", "checkpoint_fp8", "stream") else LOSSY)
