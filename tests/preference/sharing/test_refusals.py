"""Models and settings for which sharing would not be exact: refused, with the reason, before training."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaModel,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    Qwen3NextConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from trl import DPOConfig

from hf_lowmem.preference.sharing import check_sharing, share
from hf_lowmem.preference.sharing.check import sharing_error
from tests.conftest import tiny_llama
from tests.preference.sharing.families import MOE, SIZES, tiny

LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def made(config: type, attention: str | None = None, **sizes: Any) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_config(config(**SIZES | sizes), attn_implementation=attention)


def with_config(**changed: Any) -> Callable[[], Any]:
    def build() -> Any:
        model = tiny_llama()
        for name, value in changed.items():
            setattr(model.config, name, value)
        return model

    return build


def vision_language() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = vision | {"image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=SIZES | {"head_dim": 16}, vision_config=sizes))


def encoder_decoder() -> Any:
    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=128))


def prompt_tuned() -> Any:
    return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


class WithState(nn.LSTM):
    """Some other way of mixing tokens."""


def with_state() -> Any:
    model = tiny_llama()
    model.model.layers[0].state = WithState(4, 4)
    return model


class OwnMask(LlamaModel):
    """As it is in code from elsewhere: this module imports none of transformers' masks."""


def own_mask() -> Any:
    model = tiny_llama()
    model.model.__class__ = OwnMask
    return model


# what: (builder, what the message must say)
REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "linear attention": (made(Qwen3NextConfig, head_dim=16, **LINEAR, **MOE), ("Qwen3NextModel", "linear_attention")),
    "mamba": (made(MambaConfig), ("MambaModel", "linear_attention")),
    "mamba beside attention": (
        made(BambaConfig, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1),
        ("BambaModel", "linear_attention"),
    ),
    "convolutions": (made(Lfm2Config, full_attn_idxs=[1]), ("Lfm2Model", "'conv'")),
    "rwkv": (made(RwkvConfig, attention_hidden_size=64), ("RwkvModel", "state")),
    "a module with a state": (with_state, ("WithState", "state")),
    "chunks": (
        made(Llama4TextConfig, head_dim=16, num_local_experts=2, router_aux_loss_coef=0.0),
        ("chunked_attention",),
    ),
    "chunks by the config": (with_config(attention_chunk_size=8), ("attention_chunk_size=8", "columns")),
    "windows of columns": (
        made(GPTNeoConfig, attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4),
        ("window_size=256", "columns"),
    ),
    "bloom": (made(BloomConfig, n_head=4, n_layer=1), ("BloomModel", "ALiBi")),
    "mpt": (made(MptConfig, d_model=64, n_heads=4, n_layers=1), ("MptModel", "ALiBi")),
    "falcon with ALiBi": (made(FalconConfig, alibi=True), ("FalconModel", "ALiBi")),
    "encoder-decoder": (encoder_decoder, ("T5", "encoder-decoder")),
    "vision-language": (vision_language, ("Gemma3Model", "vision-language")),
    "virtual tokens": (prompt_tuned, ("prompt-learning", "LoRA")),
    "load balancing": (made(MixtralConfig), ("router_aux_loss_coef=0.001", "Set router_aux_loss_coef=0")),
    "bidirectional": (with_config(use_bidirectional_attention=True), ("bidirectional",)),
    "not causal": (with_config(is_causal=False), ("bidirectional",)),
    "flash attention": (
        with_config(_attn_implementation="flash_attention_2"),
        ("attn_implementation='flash_attention_2'", "sdpa, eager, flex_attention"),
    ),
    "masks of its own": (own_mask, ("transformers.masking_utils",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_not_be_exact_are_refused(name: str) -> None:
    build, says = REFUSED[name]
    model = build()
    with pytest.raises(ValueError, match="lowmem_share_prompt=True") as caught:
        check_sharing(model)
    message = str(caught.value)
    assert all(part in message for part in says), message
    assert "in a trial" not in message, "refused by its structure, before anything runs"


def test_no_model_is_no_model() -> None:
    with pytest.raises(TypeError, match="lowmem_share_prompt=True: Linear is no model"):
        check_sharing(nn.Linear(2, 2))


def test_load_balancing_can_be_turned_off_by_the_arguments() -> None:
    model = made(MixtralConfig, num_local_experts=4)()
    check_sharing(model, DPOConfig("unused", use_cpu=True, bf16=False, report_to="none", router_aux_loss_coef=0.0))


def test_context_parallelism_is_refused() -> None:
    args = mock.Mock(router_aux_loss_coef=None, parallelism_config=mock.Mock(cp_size=2, sp_size=1))
    with pytest.raises(ValueError, match=r"context or sequence parallelism.*cp_size"):
        check_sharing(tiny_llama(), args)


def test_lora_is_allowed() -> None:
    check_sharing(get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM")))


def test_weights_that_are_not_there_are_not_tried() -> None:
    """As under ZeRO-3 or on the meta device; structure is still looked at."""
    with torch.device("meta"):
        model = tiny_llama()
    check_sharing(model)
    model.config.attention_chunk_size = 8
    with pytest.raises(ValueError, match="attention_chunk_size"):
        check_sharing(model)


class IgnoresMask(LlamaAttention):
    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, attention_mask=None, **kwargs)


def ignores(what: str) -> Any:
    """A model whose signature and imports are right, and which does not do what they say."""
    model = tiny("llama")
    if what == "mask":
        for layer in model.model.layers:
            layer.self_attn.__class__ = IgnoresMask
    else:
        rotary = model.model.rotary_emb
        plain = rotary.forward
        rotary.forward = lambda x, position_ids: plain(x, torch.arange(x.shape[1])[None].expand(x.shape[0], -1))
    return model


@pytest.mark.parametrize("what", ["mask", "positions"])
def test_a_model_that_ignores_them_fails_the_trial(what: str) -> None:
    model = ignores(what)
    with pytest.raises(ValueError, match=r"in a trial the hidden states differed.*Leave lowmem_share_prompt unset"):
        check_sharing(model)
    error, bound = sharing_error(model)
    assert error > 5 * bound


def test_a_model_that_takes_no_masks_by_layer_type_is_refused() -> None:
    model = tiny_llama()
    model.config.layer_types = ["sliding_attention"]  # Llama hands the dict of masks to its layers as it is
    model.config.sliding_window = 4
    with pytest.raises(ValueError, match="it takes no mask of ours"):
        check_sharing(model)


def test_the_trial_sees_a_wrong_mask_of_ours() -> None:
    model = tiny("llama")

    def wrong(self: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (self.segments[b, q] >= 0)

    with mock.patch.object(share.Visible, "__call__", wrong):
        assert sharing_error(model)[0] > 0.1
