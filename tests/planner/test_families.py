"""Models other than Llama: predicted as a real step takes, or refused by operation and module; never silently wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, Qwen3MoeConfig

from hf_lowmem.planner import CannotSimulate, plan
from tests.planner.real import arguments, measure

PARTS_WITHIN, PEAK_WITHIN = 0.01, 0.03  # as in test_truth.py
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
MAMBA: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3MoeConfig": SHAPE | EXPERTS | {"head_dim": 16},
    "MambaConfig": MAMBA,
    "Qwen2MoeConfig": SHAPE | EXPERTS | {"shared_expert_intermediate_size": 96},
    "MixtralConfig": SHAPE | {"num_local_experts": 4},
    "OlmoeConfig": SHAPE | {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOssConfig": SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16},
    "JambaConfig": SHAPE
    | {"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "Mamba2Config": MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "Gemma2Config": SHAPE | {"head_dim": 16, "sliding_window": 16},
    "Gemma3TextConfig": SHAPE | {"head_dim": 16, "sliding_window": 16},
    "GPT2Config": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 64},
    "GPTNeoXConfig": {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"},
    "Olmo2Config": SHAPE,
    "Phi3Config": SHAPE | {"pad_token_id": 0},
    "OPTConfig": {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "intermediate_size")}
    | {"ffn_dim": 96, "word_embed_proj_dim": 64},
}
ALWAYS = ("Qwen3MoeConfig", "Gemma3TextConfig")


def config_of(name: str) -> PreTrainedConfig:
    return getattr(transformers, name)(**FAMILIES[name])


@pytest.mark.train
@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_predicted_parts_and_peak_are_those_of_a_real_step(name: str, dtype: torch.dtype) -> None:
    args = arguments()
    predicted = plan(config_of(name), args, dtype=dtype, device="cpu")
    real = measure(config_of(name), args, dtype)
    at_update = [point for point in predicted.timeline if point.phase == "optimizer"][-1].parts
    assert (at_update["weights"], at_update["gradients"]) == (real.weights, real.gradients)
    assert abs(at_update["states"] - real.states) <= PARTS_WITHIN * real.states
    assert abs(predicted.saved_bytes - real.saved) <= PARTS_WITHIN * real.saved
    assert abs(predicted.peak_bytes - real.peak) <= PEAK_WITHIN * real.peak


@pytest.mark.train
def test_experts_that_are_looped_over_are_refused_by_operation_and_module() -> None:
    args = arguments(model_init_kwargs={"experts_implementation": "eager"})
    with pytest.raises(CannotSimulate, match=r"aten\.nonzero.* in module 'model\.layers\.0\.mlp\.experts'"):
        plan(Qwen3MoeConfig(**FAMILIES["Qwen3MoeConfig"]), args, dtype="bfloat16")


@pytest.mark.train
def test_gathered_experts_take_a_copy_of_their_weights_a_token() -> None:
    config = config_of("Qwen3MoeConfig")
    grouped, gathered = (
        plan(config, arguments(model_init_kwargs={"experts_implementation": name}), dtype="bfloat16")
        for name in ("grouped_mm", "batched_mm")
    )
    # gate_up and down of each token's two experts, kept for backward in each of two layers, in bf16
    copies = 2 * 48 * 2 * (3 * 64 * 48) * 2
    assert gathered.saved_bytes > copies > grouped.saved_bytes


@pytest.mark.train
def test_what_model_init_kwargs_changes_of_a_config_is_planned() -> None:
    config = config_of("Olmo2Config")
    made = plan(config, arguments(model_init_kwargs={"num_hidden_layers": 1}), dtype="bfloat16")
    assert made.settings["layers"] == 1
    assert config.num_hidden_layers == 2


def test_flash_attention_is_refused_where_nothing_stands_for_it() -> None:
    args = arguments(model_init_kwargs={"attn_implementation": "flash_attention_2"})
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2'.*'gpt_oss'"):
        plan(config_of("GptOssConfig"), args, dtype="bfloat16")


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class OddConfig(LlamaConfig):
    model_type = "odd_llama"


class OddMLP(LlamaMLP):
    def forward(self, x):
        scale = x.abs().max().item()
        return super().forward(x / scale)


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OddMLP(config)
"""


@pytest.mark.train
def test_custom_code_is_run_if_trusted_and_refused_by_operation_and_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils
    from transformers.models.llama import LlamaConfig

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "odd"
    config = LlamaConfig(**SHAPE)
    config.auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    config.save_pretrained(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "odd_llama"'))
    (folder / "odd.py").write_text(CODE)
    with pytest.raises(
        CannotSimulate, match=r"_local_scalar_dense.*in module 'model\.layers\.0\.mlp', at .*odd\.py:\d+"
    ):
        plan(str(folder), arguments(trust_remote_code=True), dtype="bfloat16")


@pytest.mark.parametrize("place", ["config.json", ""])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configs_kernel_of_the_hub_is_not_fetched(key: str, place: str, tmp_path: Path) -> None:
    """It would be somebody's code; only who trains may choose it."""
    from transformers.models.llama import LlamaConfig

    from hf_lowmem.planner.models import find_config, make_model, meta_model

    values = LlamaConfig(**SHAPE).to_dict() | {key: "somebody/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = find_config(tmp_path / place)
    for made in (make_model(config, torch.float32, None), meta_model(config, torch.float32, None)):
        assert made.config._attn_implementation in ("sdpa", "eager")
