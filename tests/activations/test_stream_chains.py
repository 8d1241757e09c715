"""`stream/N`: every Nth layer keeps its input, and what backward computes is what it computes with all of them."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.activations import convert, ends, host, measure
from hf_lowmem.activations.aside import say_once
from hf_lowmem.activations.blocks import patches
from hf_lowmem.activations.host import HostStore
from hf_lowmem.activations.streaming.call import Call
from hf_lowmem.specs import ActivationSpec
from tests.activations.models import batch, build, loss_and_gradients
from tests.activations.streams import TOKENS, distance, laid_out, model_of, streamed

LAYERS = 5


def same(ours: Any, theirs: Any) -> None:
    (loss, grads), (other, expected) = ours, theirs
    assert torch.equal(loss, other)
    assert distance(grads, expected) == 0


@pytest.mark.parametrize(
    ("family", "layout", "tiers"),
    [
        ("llama", "plain", "stream/2"),
        ("llama", "left", "stream/4"),
        ("mistral", "packed", "stream/3"),
        ("gemma3", "right", "stream/9"),
        ("gpt2", "plain", "stream/2"),
        ("mixtral", "plain", "stream_fp8/3"),  # whose inputs are kept as they are
        ("llama", "plain", "stream/2:0-2,stream/3:3-"),
    ],
)
def test_gradients_are_those_of_all_inputs_to_the_bit(family: str, layout: str, tiers: str) -> None:
    dropouts = {"resid_pdrop": 0.3, "attn_pdrop": 0.3} if family == "gpt2" else {}
    depth = {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
    model, inputs = model_of(family, **{depth: LAYERS}, **dropouts), laid_out(layout)
    same(*(loss_and_gradients(streamed(model, 7, t), inputs) for t in (tiers, "stream")))


def test_codes_are_rounded_once_more_and_the_loss_is_the_same() -> None:
    """What is rounded is the input of another layer: the error is of the same kind, and not much larger."""
    model, inputs = model_of("llama", num_hidden_layers=8), laid_out("plain")
    loss, exact = loss_and_gradients(model, inputs)

    def error(tiers: str) -> float:
        found, grads = loss_and_gradients(streamed(model, 8, tiers), inputs)
        assert torch.equal(found, loss)
        return (sum(float((grads[n] - g).square().sum()) for n, g in exact.items())) ** 0.5

    # Two roundings where there was one, each of which is independent: the root of two, and as much for what grows.
    assert error("stream_fp8/4") <= 2 * error("stream_fp8")


def test_every_nth_layer_keeps_its_input_alone() -> None:
    model = streamed(build("llama", torch.bfloat16, hidden_size=128, num_hidden_layers=LAYERS), 16, "stream_fp8/2")
    measured = measure(model, lambda: model(**batch(48)).loss, 96)
    kept = [after for _, after in measured.layers.values()]
    own = 96 * (128 + 2)
    assert kept[1:] == [0, own, 0, own]
    assert kept[0] >= own


def test_layers_run_forward_once_more_and_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    again, repeated = [], Call.repeated
    monkeypatch.setattr(Call, "repeated", lambda self, *args: (again.append(self), repeated(self, *args))[1])
    model = streamed(build("llama", num_hidden_layers=LAYERS), 8, "stream_fp8/3")
    loss_and_gradients(model, batch(TOKENS))
    layers = [call.module for call in again]
    assert layers == [model.model.layers[i] for i in (3, 0, 1)]  # of 0-1-2 and 3-4, from the last chain on
    del again[:], layers
    gc.collect()
    assert not [item for item in gc.get_objects() if isinstance(item, Call)]


def test_the_report_says_so() -> None:
    model = build("llama", num_hidden_layers=LAYERS)
    model.model.layers[1].mlp.extra = nn.Conv1d(1, 1, 1)
    report = convert(model, "stream_fp8/2")
    assert [layer.tier for layer in report.layers] == ["stream_fp8", "checkpoint_fp8", *["stream_fp8"] * 3]
    assert str(report).count("one input for each 2 layers") == 2  # the rows of equal layers
    assert report.tiers == "stream_fp8/2"


# What somebody does to activations between two layers.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "another": lambda h: h * 1.5,
    "in_place": lambda h: h.mul_(1.5),
    "a_copy": lambda h: h.clone(),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("place", ["before", "after"])
def test_an_input_that_is_not_the_last_output_is_kept(how: str, place: str) -> None:
    def changed(tiers: str) -> Any:
        model = streamed(model_of("llama", num_hidden_layers=LAYERS), 8, tiers)
        change = CHANGES[how]
        if place == "before":
            model.model.layers[2].register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
        else:
            model.model.layers[1].register_forward_hook(lambda module, args, out: change(out))
        return model

    inputs = {"input_ids": batch(TOKENS)["input_ids"], "use_cache": False}
    say_once.cache_clear()
    found = []
    for tiers in ("stream", "stream/4"):
        model = changed(tiers)
        if "/" in tiers:
            with pytest.warns(UserWarning, match=r"another tensor than the one that the layer before.*'/4' out"):
                out = model(**inputs).logits
        else:
            out = model(**inputs).logits
        out.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_frozen_layers_and_embeddings() -> None:
    model = model_of("llama", num_hidden_layers=LAYERS)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    model.model.layers[2].requires_grad_(False)
    inputs = laid_out("right")
    same(*(loss_and_gradients(streamed(model, 8, t), inputs) for t in ("stream/3", "stream")))


def test_graphs_may_live_together_and_run_twice() -> None:
    def run(tiers: str) -> list[Any]:
        model = streamed(build("llama", num_hidden_layers=LAYERS), 7, tiers)
        losses = [model(**batch(tokens)).loss for tokens in (24, 9, 16)]
        for loss in (losses[1], losses[0], losses[2]):  # in no order of theirs
            loss.backward(retain_graph=True)
        losses[0].backward()
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, run("stream/3"), run("stream")))


def test_a_loss_of_a_layer_inside_of_a_chain() -> None:
    """Backward then begins in the middle of it."""

    def run(tiers: str) -> list[Any]:
        model = streamed(build("llama", num_hidden_layers=LAYERS), 7, tiers)
        states = model(**batch(24), output_hidden_states=True).hidden_states
        states[3].square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(map(torch.equal, run("stream/4"), run("stream")))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_chains_of_its_own(copied: Any) -> None:
    model, inputs = streamed(build("llama", num_hidden_layers=4), 8, "stream/2"), batch(TOKENS)
    alive = model(**inputs).loss
    other = copied(model)
    same(loss_and_gradients(other, inputs), loss_and_gradients(model, inputs))
    chains = {
        id(found) for m in (model, other) for p in patches(m) if (found := getattr(p, "chains", None)) is not None
    }
    assert len(chains) == 2
    alive.backward()


@pytest.mark.parametrize("tier", ["stream/2", "stream_fp8/2"])
def test_in_host_memory_are_the_inputs_that_are_kept(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy_ = [], host._Lane.copy

    def seen(self: Any, kept: Any, parts: Any, pairs: Any) -> None:
        pairs = list(pairs)
        copies.append("out" if pairs[0][0] is kept.host[0] else "back")
        copy_(self, kept, parts, iter(pairs))

    monkeypatch.setattr(host._Lane, "copy", seen)
    model, inputs, found = build("llama", torch.bfloat16, num_hidden_layers=LAYERS), batch(TOKENS), []
    for offload in ("inputs", None):
        ours = copy.deepcopy(model)
        convert(ours, ActivationSpec(tiers=tier, chunk=8, offload=offload))
        found.append(loss_and_gradients(ours, inputs))
        stores = {store for p in patches(ours) if isinstance(store := getattr(p, "store", None), HostStore)}
        assert [store.layers for store in stores] == ([3] if offload else [])
    same(*found)
    assert copies == ["out"] * 3 + ["back"] * 2  # the last chain's is still there


def test_a_second_derivative_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(build("llama"), 8)
    loss = model(**batch(TOKENS)).loss
    with pytest.raises(RuntimeError, match=r"create_graph=True.*LlamaDecoderLayer.*Leave create_graph out, or"):
        torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight, create_graph=True)
    monkeypatch.setattr(ends, "TILE", 5)
    norm = build("llama").model.norm
    ends.TiledNorm(norm).put()
    out = norm(torch.randn(2, 16, norm.weight.numel(), requires_grad=True))
    with pytest.raises(RuntimeError, match=r"create_graph=True.*LlamaRMSNorm"):
        torch.autograd.grad(out.sum(), norm.weight, create_graph=True)


@pytest.mark.parametrize(
    "tiers", ["fp8/4", "checkpoint_fp8/2", "stream/1", "stream/0", "stream/x", "stream/", "stream/2/2"]
)
def test_what_cannot_be_shared_is_refused(tiers: str) -> None:
    with pytest.raises(ValueError, match=r"lowmem_activations='.*/N' keeps the input of every Nth layer.*Write"):
        ActivationSpec(tiers=tiers)
