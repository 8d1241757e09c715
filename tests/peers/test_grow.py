"""G_stack (arXiv 2405.15319) as a script: layers in their order, twice, for models of several kinds; refusals."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.conftest import tiny_llama
from tests.test_scripts import ROOT

SMALL: Any = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import grow_depth  # type: ignore[import-not-found]

    return grow_depth


def gpt2(**more: Any) -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64, **more))


MODELS: dict[str, Any] = {
    "llama, tied, bf16": lambda: tiny_llama(num_hidden_layers=2, tie_word_embeddings=True, dtype=torch.bfloat16),
    "llama, two ends of sentence": lambda: tiny_llama(num_hidden_layers=2, eos_token_id=[2, 3]),
    "gemma2, windows": lambda: Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=3, sliding_window=4, **SMALL)),
    "smollm3, no rope in some": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(num_hidden_layers=3, no_rope_layers=[1, 0, 1], **SMALL)
    ),
    "gpt2": gpt2,
}


def stack(model: Any) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("name", MODELS)
def test_the_grown_model_runs_the_layers_twice(script: ModuleType, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, out = tmp_path / "model", tmp_path / "grown"
    MODELS[name]().save_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    assert script.main([str(source), "--output", str(out), "--factor", "2"]) == 0
    grown: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    depth = model.config.num_hidden_layers
    assert grown.config.num_hidden_layers == 2 * depth
    assert grown.dtype == model.dtype
    lists = [f for f in ("layer_types", "no_rope_layers") if getattr(model.config, f, None) is not None]
    assert all(getattr(grown.config, f) == 2 * getattr(model.config, f) for f in lists)
    assert grown.config.eos_token_id == model.config.eos_token_id
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (grown.get_output_embeddings().weight is grown.get_input_embeddings().weight) == tied
    layers = stack(model)
    for i, layer in enumerate(stack(grown)):
        theirs = dict(layers[i % depth].named_parameters())
        assert all(torch.equal(p, theirs[n]) for n, p in layer.named_parameters())
    # The small model that runs its own layers twice.
    layers.extend([*layers])
    for f in ("num_hidden_layers", *lists):
        setattr(model.config, f, 2 * depth if f == "num_hidden_layers" else 2 * getattr(model.config, f))
    ids = torch.arange(3, 19)[None]
    assert torch.equal(grown(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert json.loads((out / "grow.json").read_text()) == {"from": "model", "factor": 2}


def test_what_cannot_be_grown_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, places, adapter, out = (tmp_path / name for name in ("plain", "places", "adapter", "out"))
    tiny_llama().save_pretrained(plain)
    gpt2(scale_attn_by_inverse_layer_idx=True).save_pretrained(places)
    tiny_llama().save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    cases = [
        ([plain, "--output", plain], "is there already"),
        ([plain, "--output", out, "--factor", "1"], "--factor 1: expected"),
        ([tmp_path / "none", "--output", out], "none"),
        ([adapter, "--output", out], "holds an adapter"),
        ([places, "--output", out], "layer 2 would have the weights of layer 0, but is not like it: attn.scaling"),
    ]
    for arguments, said in cases:
        assert script.main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert re.search(said, error), error
    assert not out.exists()
