"""`lowmem_offload` through every door: the same training, and errors where it could do nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig

from hf_lowmem import LowMemCallback, LowMemSFTConfig, LowMemTrainingArguments
from hf_lowmem.activations.blocks import patches
from hf_lowmem.activations.formats import nbytes
from hf_lowmem.planner import plan
from hf_lowmem.specs import ActivationSpec
from hf_lowmem.training.plugin import LowMemPlugin
from tests.activations.models import batch, build
from tests.training.heads import same, train
from tests.training.test_trainers import settings

pytestmark = pytest.mark.train

INPUTS: dict[str, Any] = {"lowmem_activations": "checkpoint_fp8", "lowmem_offload": "inputs"}


@pytest.mark.parametrize("loss", ["nll", "sigmoid"])
def test_a_training_is_the_same_bit_for_bit(loss: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"optim": "adamw", "loss_type": loss, "lowmem_activations": "checkpoint_fp8"}
    ours = train(tmp_path, **fields, lowmem_offload="inputs")
    assert "in host memory" in str(ours.activations)
    assert not list(patches(ours.model))
    same(ours, train(tmp_path, **fields))


def test_a_loop_of_ones_own_has_it(tmp_path: Path) -> None:
    found = []
    for offload in ("inputs", None):
        plugin = LowMemPlugin(optim="adamw", lowmem_activations="checkpoint_fp8", lowmem_offload=offload)
        accelerator = Accelerator(cpu=True)
        model, optimizer = plugin.prepare(accelerator, build("llama"))
        stores = [getattr(patch, "store", None) for patch in patches(model) if getattr(patch, "tier", None)]
        assert all(store is not None and store is stores[0] for store in stores) if offload else not any(stores)
        for _ in range(2):
            accelerator.backward(model(**batch()).loss)
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
        plugin.remove()
    assert all(map(torch.equal, *found))


def test_a_callback_takes_it_in_a_spec() -> None:
    LowMemCallback(ActivationSpec(tiers="checkpoint_fp8", offload="inputs"))


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (INPUTS | {"lowmem_offload": "input"}, ValueError, "lowmem_offload='input'.*Did you mean 'inputs'"),
    (INPUTS | {"lowmem_offload": True}, TypeError, "lowmem_offload=True"),
    (
        INPUTS | {"lowmem_activations": "fp8"},
        ValueError,
        "lowmem_offload='inputs'.*'fp8'.*Leave it unset.*checkpoint_fp8",
    ),
    (INPUTS | {"lowmem_activations": "fp8:0-1,hooks_fp8:2-"}, ValueError, "lowmem_offload='inputs'.*no layer keeps"),
    (INPUTS | {"lowmem_activations": None}, ValueError, "lowmem_offload='inputs' has no effect without lowmem_act"),
]


@pytest.mark.parametrize("door", [LowMemTrainingArguments, LowMemPlugin])
@pytest.mark.parametrize(("fields", "error", "words"), WRONG)
def test_what_could_have_no_effect_is_refused(
    door: Any, fields: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        LowMemPlugin(**fields) if door is LowMemPlugin else settings(door, tmp_path, **fields)


def test_a_plan_says_what_the_host_takes(tmp_path: Path) -> None:
    """The codes of all layers' inputs, of which three depths were simulated."""
    tokens, hidden, layers = 2048, 256, 9
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
    }
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    args = settings(
        LowMemSFTConfig, tmp_path, max_length=tokens, per_device_train_batch_size=1, optim="adamw", **INPUTS
    )
    found = plan(config, args, dtype="bfloat16")
    assert found.depths != (layers,)
    assert found.host_bytes == layers * nbytes((tokens, hidden), "e4m3", torch.bfloat16)
    assert "host memory" in str(found)
    assert found.to_dict()["host_bytes"] == found.host_bytes
