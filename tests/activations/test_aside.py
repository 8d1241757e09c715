"""Where somebody else decides what is saved: checkpoints, hooks, compilers; and tensors that are no plain memory."""

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from hf_lowmem.activations import aside, convert, undo
from hf_lowmem.memory import measure_saved
from tests.activations.models import batch, build, loss_and_gradients
from tests.activations.test_hunt import LOSSY, error_of

TAPES = ("exact", "fp8", "fp8_recompute")
TIERS = (*TAPES, "checkpoint_fp8")


class Checkpointed(nn.Module):
    """The user's own checkpoint around a whole model."""

    def __init__(self, model: Any, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, **inputs: Tensor) -> Any:
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])

        def run(embeds: Tensor) -> Tensor:
            return self.model(inputs_embeds=embeds, labels=inputs["labels"], use_cache=False).loss

        return type("Out", (), {"loss": checkpoint(run, embeds, use_reentrant=self.reentrant)})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_a_checkpoint_around_the_model(tier: str, reentrant: bool) -> None:
    aside.say_once.cache_clear()
    model = Checkpointed(build("llama"), reentrant)
    kept, found = [], []
    for t in (None, tier):
        if t:
            convert(model, t)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with measure_saved(model) as saved:
                out = model(**batch())
                kept.append(saved.total)
            del out
            gc.collect()
            found.append(loss_and_gradients(model, batch())[1])
        said = [w for w in caught if "runs inside a torch.utils.checkpoint" in str(w.message)]
        assert bool(said) == (t is not None and not reentrant)
    assert kept[1] == kept[0]
    # The second pass of a reentrant checkpoint is a forward pass like any other, in which the tier works.
    assert error_of(found[1], found[0]) < (LOSSY if reentrant and tier != "exact" else 1e-9)


def checkpointed(module: Any) -> None:
    run = type(module).forward.__get__(module)

    class Inside(type(module)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

    module.__class__ = Inside


def offloaded(module: Any) -> None:
    run = type(module).forward.__get__(module)

    class Inside(type(module)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with save_on_cpu():
                return run(*args, **kwargs)

    module.__class__ = Inside


@pytest.mark.parametrize("how", [checkpointed, offloaded])
@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm"])
@pytest.mark.parametrize("tier", TAPES)
def test_a_part_that_looks_after_itself(tier: str, part: str, how: Callable[[Any], None]) -> None:
    model = build("llama")
    for layer in model.model.layers:
        how(getattr(layer, part))
    _, truth = loss_and_gradients(model, batch())
    convert(model, tier)
    _, found = loss_and_gradients(model, batch())
    assert error_of(found, truth) < (1e-9 if tier == "exact" else LOSSY)


PARTS = ["mlp", "self_attn", "input_layernorm", "mlp.act_fn", "self_attn.q_proj", ""]


@pytest.mark.train
@pytest.mark.parametrize("wrapped", [False, True], ids=["compile()", "torch.compile"])
@pytest.mark.parametrize("part", PARTS)
def test_compiled_parts(part: str, wrapped: bool) -> None:
    model = build("llama", num_hidden_layers=1)
    _, truth = loss_and_gradients(model, batch())
    torch.compiler.reset()
    module = model.model.layers[0].get_submodule(part)
    if wrapped:
        place, _, name = f"model.layers.0.{part}".rstrip(".").rpartition(".")
        setattr(model.get_submodule(place), name, torch.compile(module, backend="eager"))
    else:
        module.compile(backend="eager")
    for tier in ("exact", "fp8_recompute"):
        report = convert(model, tier)
        assert report.layers[0].handled["mlp"] == 1
        _, found = loss_and_gradients(model, batch())
        found = {n.replace("_orig_mod.", ""): g for n, g in found.items()}
        # Compiled, a module may save other tensors; in eager code the values are the same to the last roundings.
        assert error_of(found, truth) < (1e-5 if tier == "exact" else LOSSY)
    undo(model)
    assert not any(hasattr(vars(m).get("forward"), "module") for m in model.modules())


class Temperature(nn.Module):
    """Saves a tensor without dimensions, and a sparse one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.temperature = linear, nn.Parameter(torch.tensor(1.3))
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.values = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        sharp = (self.temperature * 2).exp()
        places, size = torch.tensor([[0, 1], [2, 3]]), (self.out_features, self.in_features)
        some = torch.sparse_coo_tensor(places, self.values, size, check_invariants=False)
        more = torch.sparse.mm(some, x.flatten(0, -2).T).T.view(*x.shape[:-1], -1)
        return self.linear(x) * sharp + more


@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("tier", TIERS)
def test_scalars_and_sparse_tensors(tier: str, place: str) -> None:
    model = build("llama")
    for layer in model.model.layers:
        outer, _, name = place.rpartition(".")
        setattr(layer.get_submodule(outer), name, Temperature(layer.get_submodule(place)))
    ours = copy.deepcopy(model)
    convert(ours, tier)
    _, truth = loss_and_gradients(model, batch())
    _, found = loss_and_gradients(ours, batch())
    assert error_of(found, truth) < (1e-9 if tier == "exact" else LOSSY)
