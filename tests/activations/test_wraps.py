"""What `wrap_layer` and `wrap_module` both promise: the module looks, copies, compiles and evaluates as before."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from hf_lowmem.activations.checkpoint import is_wrapped, wrap_layer
from hf_lowmem.activations.hooks import wrap_module
from hf_lowmem.memory import measure_saved
from tests.activations.wrapped_models import Block, assert_same, llama, loss_of, step

WRAPS: dict[str, Callable[..., Callable[[], None]]] = {"checkpoint_fp8": wrap_layer, "hooks_fp8": wrap_module}


@pytest.mark.train
@pytest.mark.parametrize("tier", WRAPS)
def test_the_model_compiles_around_the_layers(tier: str) -> None:
    """fmt="none": compiled, transformers makes a mask, sdpa saves other tensors, and hooks would round others."""
    model = llama(1, torch.float32)
    WRAPS[tier](model.model.layers[0], fmt="none")
    want = step(model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    loss, grads = step(compiled)
    assert_same((loss, {name.removeprefix("_orig_mod."): g for name, g in grads.items()}), want)


@pytest.mark.parametrize("tier", WRAPS)
def test_one_graph_around_a_wrapped_module_is_refused_with_the_reason(tier: str) -> None:
    layer = nn.Linear(4, 4)
    WRAPS[tier](layer)
    torch.compiler.reset()
    with pytest.raises(Unsupported, match="compressed activations are kept by eager code"):
        torch.compile(nn.Sequential(layer), backend="eager", fullgraph=True)(torch.zeros(2, 4))


@pytest.mark.parametrize("tier", WRAPS)
def test_eval_and_no_grad_run_the_layer_itself(tier: str) -> None:
    model = llama(dtype=torch.float32)
    ids = torch.arange(24)[None]
    model.eval()
    want = model(input_ids=ids).logits
    generated = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, use_cache=True)
    with measure_saved(model) as plain:
        kept = model(input_ids=ids).logits  # eval with grad
    for layer in model.model.layers:
        WRAPS[tier](layer)
    with measure_saved(model) as ours:
        got = model(input_ids=ids).logits
    assert torch.equal(got, want)
    assert ours.total == plain.total
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, use_cache=True), generated)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, kept)


@pytest.mark.parametrize("tier", WRAPS)
def test_hf_checkpointing_as_well_is_refused(tier: str) -> None:
    model = llama()
    for layer in model.model.layers:
        WRAPS[tier](layer)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=rf"{tier} and has HuggingFace's.*gradient_checkpointing_disable"):
        loss_of(model)
    model.gradient_checkpointing_disable()
    assert loss_of(model).requires_grad


@pytest.mark.parametrize("tier", WRAPS)
def test_a_wrapped_layer_looks_like_the_plain_one(tier: str) -> None:
    model = llama()
    names, kind = list(model.state_dict()), type(model.model.layers[0])
    signature = inspect.signature(model.model.layers[0].forward)
    plain = step(model)
    undo = [WRAPS[tier](layer) for layer in model.model.layers]
    ours = step(model)
    assert list(model.state_dict()) == names
    layer = model.model.layers[0]
    assert type(layer) is kind
    assert is_wrapped(layer)
    assert inspect.signature(layer.forward) == signature
    assert any(not torch.equal(g, plain[1][name]) for name, g in ours[1].items())

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.weight.mul_(0)  # a copy that ran the original's layer would not notice
        assert not torch.equal(step(twin)[0], ours[0])
        assert_same(step(model), ours)

    for one in undo * 2:  # twice does no harm
        one()
    assert not is_wrapped(layer)
    assert "forward" not in vars(layer)
    assert_same(step(model), plain)


@pytest.mark.parametrize("tier", WRAPS)
def test_somebody_elses_patch_is_kept(tier: str) -> None:
    block, calls = Block(), []
    x = torch.randn(2, 16)

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return Block.forward(block, *args, **kwargs)

    vars(block)["forward"] = patched
    undo = WRAPS[tier](block)
    block(x)
    assert calls
    ours = block.forward
    vars(block)["forward"] = print
    with pytest.raises(RuntimeError, match=r"was replaced by .* after it was wrapped"):
        undo()
    vars(block)["forward"] = ours
    undo()
    assert block.forward is patched


@pytest.mark.parametrize("tier", WRAPS)
def test_seeds_are_asked_once_a_forward_pass(tier: str) -> None:
    model, asked = llama(1), []

    def seeds() -> int:
        asked.append(len(asked))
        return asked[-1] % 2

    WRAPS[tier](model.model.layers[0], seeds=seeds)
    first, second, third = step(model), step(model), step(model)
    assert asked == [0, 1, 2]
    assert_same(first, third)
    assert any(not torch.equal(g, second[1][name]) for name, g in first[1].items())


@pytest.mark.parametrize("tier", WRAPS)
def test_a_step_can_be_weighed_without_data(tier: str) -> None:
    config = llama().config
    with FakeTensorMode():
        model = LlamaForCausalLM(config).train()
        for layer in model.model.layers:
            WRAPS[tier](layer)
        _, grads = step(model)
    assert {name: g.shape for name, g in grads.items()} == {n: p.shape for n, p in llama().named_parameters()}


@pytest.mark.parametrize("tier", WRAPS)
@pytest.mark.parametrize(
    ("module", "options", "error", "match"),
    [
        (nn.Linear(2, 2), {"fmt": "fp4"}, ValueError, "fmt='fp4' is not available"),
        (nn.Linear(2, 2), {"fmt": 8}, TypeError, "fmt=8: expected a string"),
        ("layer", {}, TypeError, "wraps an nn.Module, not str"),
    ],
)
def test_bad_arguments_are_named(tier: str, module: Any, options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        WRAPS[tier](module, **options)


@pytest.mark.parametrize("tier", WRAPS)
def test_a_module_is_wrapped_once(tier: str) -> None:
    layer = nn.Linear(2, 2)
    WRAPS[tier](layer)
    for again in WRAPS.values():
        with pytest.raises(ValueError, match=f"Linear is wrapped already, as {tier}: undo that first"):
            again(layer)
