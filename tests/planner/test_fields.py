"""Every field of the trainers' arguments: it changes no memory of a step, or it is planned, or refused in words.

The fields are read off the config classes, so one that a new TRL or transformers brings fails here until somebody has
said which of the three it is.
"""

import itertools
import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from transformers.training_args import OptimizerNames

from hf_lowmem import LowMemDPOConfig, LowMemSFTConfig
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.planner import CannotSimulate, plan
from hf_lowmem.planner.modelled import PLANNED
from hf_lowmem.planner.search.fastest import prepare, search
from tests.planner.real import arguments, measure, small_config

# What they say: where, when and how often things are written, logged and named; how data are read on the host; how
# processes talk. No tensor of a step is larger or smaller for them.
OF_NO_WEIGHT = set(
    """
    lowmem_max_skipped_steps lowmem lowmem_schedule
    output_dir do_train do_eval do_predict num_train_epochs max_steps seed data_seed run_name report_to project
    disable_tqdm log_level log_level_replica log_on_each_node logging_strategy logging_first_step logging_steps
    logging_nan_inf_filter include_num_input_tokens_seen save_strategy save_steps save_total_limit save_only_model
    save_on_each_node enable_jit_checkpoint load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision trackio_space_id trackio_bucket_id
    trackio_static_space_id dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order dataloader_multiprocessing_context
    remove_unused_columns train_sampling_strategy length_column_name label_names dataset_num_proc dataset_text_field
    dataset_kwargs chat_template_path eos_token pad_token shuffle_dataset truncation_mode trust_remote_code
    accelerator_config ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph local_rank skip_memory_metrics torch_empty_cache_steps use_cache use_cpu tf32 eval_delay
    eval_steps eval_accumulation_steps eval_do_concat_batches eval_use_gather_object eval_packing batch_eval_metrics
    include_for_metrics prediction_loss_only bf16_full_eval fp16_full_eval learning_rate weight_decay adam_beta1
    adam_beta2 adam_epsilon lr_scheduler_type lr_scheduler_kwargs warmup_steps lowmem_scale lowmem_budget max_length
    model_init_kwargs torch_compile_backend torch_compile_mode liger_kernel_config fsdp_config ref_model_mixup_alpha
    ref_model_sync_steps auto_find_batch_size average_tokens_across_devices activation_checkpointing_kwargs
    """.split()  # noqa: SIM905
)
# Two or three values of every other field, with what it needs beside it.
SFT: dict[str, list[Any]] = {
    "packing": [True],
    "packing_strategy": ["bfd_split", "wrapped"],
    "padding_free": [True],
    "pad_to_multiple_of": [64],
    "completion_only_loss": [True],
    "assistant_only_loss": [True],
    "loss_type": ["chunked_nll", "dft"],
}
NEWER = {"activation_checkpointing"}  # which the oldest transformers has not
BOTH: dict[str, list[Any]] = {
    "per_device_train_batch_size": [2],
    "per_device_eval_batch_size": [16],
    "eval_strategy": ["steps"],
    "eval_on_start": [True],
    "gradient_accumulation_steps": [3],
    "gradient_checkpointing": [True],
    "gradient_checkpointing_kwargs": [{"use_reentrant": True}],
    "activation_checkpointing": [True],
    "activation_offloading": [True],
    "max_grad_norm": [0.0],
    "bf16": [True],
    "fp16": [True],
    "neftune_noise_alpha": [5.0],
    "label_smoothing_factor": [0.1],
    "torch_compile": [True],
    "use_liger_kernel": [True],
    "full_determinism": [True],
    "debug": ["underflow_overflow"],
    "fsdp": [True],
    "deepspeed": [{"zero_optimization": {"stage": 2}}],
    "parallelism_config": [ParallelismConfig(cp_size=2)],
    "router_aux_loss_coef": [0.01],
    "optim_args": ["rank=4"],
    "optim_target_modules": [["mlp"]],
    "lowmem_activations": ["exact", "fp8", "checkpoint_fp8", "stream", "stream_fp8"],
    "lowmem_stream_chunk": [256],
    "lowmem_matmul": ["fp8_row", "int8_row"],
    "lowmem_matmul_least": [0],
    "lowmem_sample": [0.3],
    "lowmem_activations_stochastic": [True],
    "lowmem_offload": ["inputs"],
    "lowmem_state": ["8bit"],
    "lowmem_weights": ["bf16_sr"],
    "lowmem_rank": [8],
    "lowmem_update_gap": [7],
    "lowmem_projection": ["random"],
    "lowmem_rotate": [True],
    "lowmem_embeddings": ["scale", "adam_mini"],
    "lowmem_step_in_backward": [True],
    "lowmem_accumulation": ["int8_sr"],
}
DPO: dict[str, list[Any]] = {
    "loss_type": ["hinge", "ipo", "exo_pair", "robust", "aot", "sft", "orpo", "simpo", "cpo", ["asft", "sigmoid"]],
    "loss_weights": [[0.5]],
    "beta": [0.2],
    "asft_lambda": [0.5],
    "orpo_lambda": [0.5],
    "simpo_gamma": [0.5],
    "cpo_alpha": [0.5],
    "f_divergence_type": ["js_divergence", "alpha_divergence"],
    "f_alpha_divergence_coef": [0.3],
    "label_smoothing": [0.1],
    "ld_alpha": [0.5],
    "discopop_tau": [0.1],
    "use_weighting": [True],
    "disable_dropout": [False],
    "sync_ref_model": [True],
    "precompute_ref_log_probs": [True],
    "precompute_ref_batch_size": [64],
    "padding_free": [True],
    "pad_to_multiple_of": [64],
    "lowmem_reference": ["full", "precomputed", "auto", "adapter", "quantized", "none"],
    "lowmem_margin_column": ["margin"],
    "lowmem_margin_w": [0.3],
    "lowmem_margin_k": [0.3],
    "lowmem_share_prompt": [True],
    "lowmem_pack_tokens": [200],
}
BESIDE: dict[str, dict[str, Any]] = {
    "packing_strategy": {"packing": True, "per_device_train_batch_size": 2},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
    "activation_checkpointing": {"gradient_checkpointing": None},
    "eval_strategy": {"eval_steps": 1},
    "optim_args": {"optim": "apollo"},
    "optim_target_modules": {"optim": "apollo", "lowmem_rank": 8},
    "lowmem_activations_stochastic": {"lowmem_activations": "fp8"},
    "lowmem_offload": {"lowmem_activations": "checkpoint_fp8"},
    "lowmem_matmul": {"lowmem_matmul_least": 0},
    "lowmem_sample": {"gradient_checkpointing": False},
    "lowmem_matmul_least": {"lowmem_matmul": "fp8_row"},
    "lowmem_stream_chunk": {"lowmem_activations": "stream"},
    "lowmem_state": {"optim": "adamw"},
    "lowmem_weights": {"optim": "adamw"},
    "lowmem_rank": {"optim": "apollo"},
    "lowmem_update_gap": {"optim": "galore", "lowmem_rank": 8},
    "lowmem_projection": {"optim": "galore", "lowmem_rank": 8},
    "lowmem_rotate": {"optim": "galore", "lowmem_rank": 8},
    "lowmem_embeddings": {"optim": "apollo_mini"},
    "lowmem_step_in_backward": {"optim": "apollo_mini", "max_grad_norm": 0.0},
    "lowmem_accumulation": {
        "optim": "lion",
        "lowmem_step_in_backward": True,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 3,
    },
    "loss_weights": {"loss_type": ["sigmoid"]},
    "asft_lambda": {"loss_type": "asft"},
    "orpo_lambda": {"loss_type": "orpo"},
    "simpo_gamma": {"loss_type": "simpo"},
    "cpo_alpha": {"loss_type": "cpo"},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "discopop_tau": {"loss_type": "discopop"},
    "label_smoothing": {"loss_type": "robust"},
    "lowmem_margin_w": {"lowmem_margin_column": "margin"},
    "lowmem_margin_k": {"lowmem_margin_column": "margin"},
    "lowmem_pack_tokens": {"lowmem_share_prompt": True, "per_device_train_batch_size": 3},
    "precompute_ref_batch_size": {"precompute_ref_log_probs": True},
}
CONFIGS = {"sft": LowMemSFTConfig, "dpo": LowMemDPOConfig}
TRIED = {"sft": BOTH | SFT, "dpo": BOTH | DPO}
CASES = [(kind, name, value) for kind, tried in TRIED.items() for name, values in tried.items() for value in values]
# What a default run looks at; the others, and all pairs, are slow.
QUICK = {"packing", "packing_strategy", "eval_strategy", "fp16", "fsdp", "sync_ref_model", "lowmem_pack_tokens"}


def tiny(**overrides: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    return small_config(**sizes | overrides)


def answer(kind: str, values: dict[str, Any]) -> str:
    """What `plan` says to arguments that the trainer's config accepts: "" for a plan, else the refusal."""
    values = {"max_length": 32} | values
    try:
        args = arguments(CONFIGS[kind], **values)
    except (ImportError, TypeError, ValueError):
        return "no arguments"
    try:
        made = plan(tiny(), args, dtype="bfloat16" if values.get("lowmem_weights") else "float32")
    except (CannotSimulate, TypeError, ValueError) as error:
        return str(error)
    assert made.peak_bytes == sum(made.parts.values()) > 0
    assert made.parts["weights"] > 0
    return ""


def is_in_words(refusal: str, names: list[str]) -> bool:
    """A refusal names one of the fields, or the step's operation, and says what to do."""
    return refusal in ("", "no arguments") or any(name in refusal for name in [*names, "cannot be planned"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_is_known(kind: str) -> None:
    there = {f.name for f in fields(CONFIGS[kind])} - {"optim"}  # which has its own tests below
    unknown = there - OF_NO_WEIGHT - TRIED[kind].keys()
    assert not unknown, f"say of {sorted(unknown)} whether they change the memory of a step, and how"
    assert TRIED[kind].keys() - NEWER <= there


def cases(quick: bool) -> list[Any]:
    chosen = [(k, n, v) for k, n, v in CASES if (n in QUICK) == quick]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}"[:50]) for case in chosen]


def check(kind: str, name: str, value: Any) -> None:
    refusal = answer(kind, BESIDE.get(name, {}) | {name: value})
    assert is_in_words(refusal, [name, str(value)]), refusal


@pytest.mark.train
@pytest.mark.parametrize(("kind", "name", "value"), cases(True))
def test_a_field_is_planned_or_refused_in_words(kind: str, name: str, value: Any) -> None:
    check(kind, name, value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "value"), cases(False))
def test_each_other_field_is_planned_or_refused_in_words(kind: str, name: str, value: Any) -> None:
    check(kind, name, value)


@pytest.mark.train
def test_a_loss_that_torch_refuses_is_refused_in_words() -> None:
    """TRL multiplies in place what relu keeps for its backward pass."""
    refusal = answer("dpo", {"loss_type": "hinge", "use_weighting": True})
    assert re.search("(?s)a step of these settings fails.*inplace.*Try a step in training.*cannot be planned", refusal)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_pair_of_fields_is_planned_or_refused_in_words(kind: str) -> None:
    """One value of each; what the config refuses is no pair."""
    firsts = [(name, values[0]) for name, values in TRIED[kind].items()]
    for (one, first), (two, second) in itertools.combinations(firsts, 2):
        values = BESIDE.get(one, {}) | BESIDE.get(two, {}) | {one: first, two: second}
        refusal = answer(kind, values)
        assert is_in_words(refusal, [one, two]), f"{values}: {refusal}"


MORE_OPTIMIZERS = {name.value for name in OptimizerNames} - set(PLANNED)


@pytest.mark.parametrize("optim", sorted(MORE_OPTIMIZERS))
def test_an_optimizer_whose_states_nobody_has_weighed_is_refused_before_anything_is_made(
    optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this very process: copying torchao's states of fake tensors would end it."""
    monkeypatch.setattr("hf_lowmem.planner.simulate.simulate_step", None)
    args = arguments(optim=optim, optim_target_modules=["mlp"], optim_args="rank=4")
    for ask in (plan, lambda *a, **k: search(*a, **k, budget=2**30)):
        with pytest.raises(ValueError, match=rf"optim='{optim}' cannot be planned.*Set optim to one of: adamw,"):
            ask(tiny(), args, dtype="float32", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("optim", PLANNED)
def test_the_states_of_every_other_optimizer_are_those_of_a_real_step(optim: str) -> None:
    args = arguments(optim=optim)
    made, real = plan(small_config(), args, dtype="float32", device="cpu"), measure(small_config(), args, torch.float32)
    states = max(point.parts.get("states", 0) for point in made.timeline)
    assert abs(states - real.states) <= 0.01 * real.states + 4096
    assert abs(made.peak_bytes - real.peak) <= 0.03 * real.peak


def test_no_optimizer_of_ours_is_left_out() -> None:
    assert not set(OPTIMIZERS) & set(PLANNED)


WEIGHED: dict[str, tuple[Any, dict[str, Any]]] = {
    "packing": (LowMemSFTConfig, {"packing": True, "per_device_train_batch_size": 2, "max_length": 256}),
    "packing, one row": (LowMemSFTConfig, {"packing": True, "packing_strategy": "bfd_split", "max_length": 384}),
    "wrapped": (
        LowMemSFTConfig,
        {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 2, "max_length": 128},
    ),
    "flattened": (
        LowMemSFTConfig,
        {"packing": True, "packing_strategy": "wrapped", "padding_free": True, "per_device_train_batch_size": 3},
    ),
    "packing under a tier": (
        LowMemSFTConfig,
        {"packing": True, "per_device_train_batch_size": 2, "max_length": 192, "lowmem_activations": "fp8"},
    ),
    "shared prompts": (
        LowMemDPOConfig,
        {"loss_type": "asft", "lowmem_share_prompt": True, "per_device_train_batch_size": 2, "max_length": 96},
    ),
    "shared prompts, packed": (
        LowMemDPOConfig,
        {"loss_type": "orpo", "lowmem_share_prompt": True, "lowmem_pack_tokens": 200, "per_device_train_batch_size": 3},
    ),
    "products in 8 bits": (
        LowMemSFTConfig,
        {"lowmem_matmul": "fp8_row", "lowmem_matmul_least": 0, "max_length": 192, "gradient_checkpointing": False},
    ),
    "products in 8 bits under a tier": (
        LowMemSFTConfig,
        {"lowmem_matmul": "fp8_row", "lowmem_matmul_least": 0, "max_length": 192, "lowmem_activations": "fp8"},
    ),
    "a sample of linears' inputs": (
        LowMemSFTConfig,
        {"lowmem_sample": 0.3, "max_length": 192, "gradient_checkpointing": False},
    ),
    "smoothed labels": (LowMemSFTConfig, {"label_smoothing_factor": 0.1}),
    "noise on embeddings": (LowMemSFTConfig, {"neftune_noise_alpha": 5.0, "max_length": 128}),
}
QUICKLY_WEIGHED = ("packing", "shared prompts")


def weigh(name: str) -> None:
    cls, values = WEIGHED[name]
    config, args = small_config(num_hidden_layers=2), arguments(cls, **values)
    made, real = plan(config, args, dtype="float32", device="cpu"), measure(config, args, torch.float32)
    assert abs(made.peak_bytes - real.peak) <= 0.01 * real.peak
    kept = [point.parts for point in made.timeline if point.phase == "end of forward"][-1]
    saved = kept["activations"] + kept.get("logits", 0)  # label smoothing is the one loss that keeps logits
    assert abs(saved - real.saved) <= 0.01 * real.saved


@pytest.mark.train
@pytest.mark.parametrize("name", QUICKLY_WEIGHED)
def test_a_batch_is_planned_as_the_trainer_lays_it_out(name: str) -> None:
    weigh(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WEIGHED if name not in QUICKLY_WEIGHED])
def test_each_other_batch_is_planned_as_the_trainer_lays_it_out(name: str) -> None:
    weigh(name)


@pytest.mark.train
def test_the_mask_of_documents_is_in_the_plan_and_flash_attention_has_none() -> None:
    def kept(attention: str | None, **values: Any) -> int:
        init = {"model_init_kwargs": {"attn_implementation": attention}} if attention else {}
        return plan(tiny(), arguments(max_length=512, **values, **init), dtype="float32").saved_bytes

    plain, packed, flash = kept(None), kept(None, packing=True), kept("flash_attention_2", packing=True)
    assert packed - plain > 4 * 512**2 * 0.9  # fp32, as sdpa takes it
    assert abs(flash - plain) < 64 * 1024


@pytest.mark.train
def test_an_evaluation_that_is_the_peak_is_found() -> None:
    values: dict[str, Any] = {"max_length": 64, "gradient_checkpointing": True, "optim": "sgd"}
    without = plan(tiny(), arguments(**values, per_device_eval_batch_size=64), dtype="float32")
    small, large = (
        plan(
            tiny(),
            arguments(**values, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=n),
            dtype="float32",
        )
        for n in (1, 4096)
    )
    assert small.peak_bytes == without.peak_bytes
    assert large.phase == "evaluation"
    assert large.peak_bytes > 4096 * 64 * 64 * 4  # one hidden state of it


@pytest.mark.slow
def test_a_search_under_packing_knows_the_square() -> None:
    """The estimate for four rows, from one, two and eight, is what the plan says."""
    args = arguments(
        packing=True, per_device_train_batch_size=8, max_length=128, lowmem_activations="fp8", max_grad_norm=0.5
    )
    asked = prepare(small_config(num_hidden_layers=5), args, dtype="float32", device="cpu")
    for choice in asked.found:
        if choice.batch == 4 and choice.accumulation == 2:
            estimate = asked.estimate(choice, 128)
            assert estimate == pytest.approx(asked.really(choice, 128), rel=0.01)
            return
    raise AssertionError("no candidate of four rows")


@pytest.mark.slow
def test_a_search_knows_what_gradients_take_that_are_added_up_in_int8() -> None:
    """A budget with `lowmem_accumulation` is asked of what steps in backward and accumulates, and estimated as such."""
    values: dict[str, Any] = {"optim": "scale", "lowmem_state": "8bit", "lowmem_weights": "bf16_sr", "max_length": 64}
    args = arguments(
        **values,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        lowmem_activations="fp8",
        lowmem_accumulation="int8_sr",
        lowmem_budget="1GiB",
    )
    asked = prepare(small_config(num_hidden_layers=5), args, dtype="bfloat16", device="cpu")
    (choice,) = asked.found
    assert choice.step_in_backward
    assert asked.estimate(choice, 64) == pytest.approx(asked.really(choice, 64), rel=0.01)


@pytest.mark.parametrize("optim", ["apollo", "galore", "fira", "natural_galore"])
def test_a_rank_that_no_weight_exceeds_is_refused_in_words(optim: str) -> None:
    for rank, says in ((None, "Set lowmem_rank to less than 64"), (512, "Lower the rank")):
        args = arguments(optim=optim, lowmem_rank=rank)
        with pytest.raises(ValueError, match=rf"lowmem_rank={rank}.*{says}"):
            search(tiny(), args, budget=2**31, dtype="float32", device="cpu")
