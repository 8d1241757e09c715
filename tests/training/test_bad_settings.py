"""Bad settings: one table. Each is refused at construction by an error that names the field and the remedy."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_lowmem import (
    LowMemCallback,
    LowMemDPOConfig,
    LowMemPlugin,
    LowMemSFTConfig,
    LowMemTrainer,
    LowMemTrainerMixin,
    LowMemTrainingArguments,
    make_optimizer,
    with_lowmem,
)
from hf_lowmem.optim import OPTIMIZERS, StepInBackward
from tests.conftest import tiny_llama

SCREEN = 10 * 120
# A message says what to do, or what is expected in place of the value.
REMEDY = re.compile(
    r"\b(set|leave|choose|use|take|write|give|make|load|expected|must|raise|add|call|train|name|need|did you mean|here it "
    r"is|at least|remove|pass|build|lower)s?\b",
    re.IGNORECASE,
)
COMMON: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}


def args(config: Any = LowMemTrainingArguments, **kwargs: Any) -> Callable[[], Any]:
    return lambda: config(**(COMMON | kwargs))


def optimizer(name: str = "apollo", **kwargs: Any) -> Callable[[], Any]:
    return lambda: make_optimizer(name, nn.Linear(80, 60), **kwargs)


def lora() -> nn.Module:
    return get_peft_model(tiny_llama(dtype=torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[return-value]


def frozen_model() -> nn.Module:
    return nn.Linear(4, 4).requires_grad_(False)


def trainer(build: Callable[[], Any], create: bool = False, **kwargs: Any) -> Callable[[], Any]:
    def run() -> None:
        made = LowMemTrainer(tiny_llama(), build(), **kwargs)
        if create:
            made.create_optimizer()

    return run


OURS: dict[str, Any] = {"optim": "apollo"}
STEPPING: dict[str, Any] = OURS | {"lowmem_step_in_backward": True, "max_grad_norm": 0.0}

# (what is wrong, how it is built, exception, what its message must say)
BAD: list[tuple[str, Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    # optim: which one
    ("misspelt optim", args(optim="apolo"), ValueError, ("optim='apolo'", "'apollo'")),
    ("misspelt HuggingFace optim", args(optim="adamw_troch"), ValueError, ("optim='adamw_troch'", "adamw_torch")),
    ("optim that is no string", args(optim=3), TypeError, ("optim=3", "string")),
    ("optim_args that is a field", args(**OURS, optim_args="rank=3"), ValueError, ("optim_args='rank=3'", "lowmem_rank")),
    ("betas in optim_args", args(**OURS, optim_args="betas=3"), ValueError, ("optim_args='betas=3'", "adam_beta1")),
    ("optim_args of no pair", args(**OURS, optim_args="rank"), ValueError, ("optim_args='rank'", "key=value")),
    ("no codec of a basis", args(optim="galore", optim_args="basis=int5"), ValueError, ("optim_args: basis='int5'", "int4")),
    ("overlap beyond one", args(optim="galore", optim_args="lazy_overlap=2"), ValueError, ("optim_args: lazy_overlap=2", "(0, 1)")),
    ("chunk of text", args(lowmem_activations="stream", lowmem_stream_chunk="256"), TypeError, ("lowmem_stream_chunk='256'", "2048", "got str")),
    ("optim_args of a dict", args(**OURS, optim_args={"basis": "int4"}), TypeError, ("optim_args={", "key=value", "dict")),
    ("unknown optim_args", args(**OURS, optim_args="ranc=3"), ValueError, ("optim_args", "ranc=3", "optim='apollo'")),
    ("FSDP1 beside ours", args(**OURS, fsdp=True, fsdp_config={"version": 1}), ValueError, ("fsdp_config['version']=1", "optim='apollo'", "'version': 2")),
    ("FSDP1 beside tiers", args(lowmem_activations="fp8", fsdp=True, fsdp_config={"version": 1}), ValueError, ("fsdp_config['version']=1", "lowmem_activations='fp8'", "'version': 2")),
    ("soap under FSDP2", args(optim="soap", fsdp=True), ValueError, ("'soap' under FSDP2", "Use DDP")),
    ("svd under FSDP2", args(optim="galore", lowmem_projection="svd", fsdp=True), ValueError, ("lowmem_projection='svd'", "'galore'", "'subspace'")),
    ("deepspeed beside ours", args(**OURS, deepspeed={"x": 1}), ValueError, ("deepspeed", "ZeRO", "FSDP2")),
    # fields of ours beside HuggingFace's optimizers
    ("state without us", args(optim="adamw_torch", lowmem_state="int8"), ValueError, ("lowmem_state='int8'", "adamw_torch")),
    ("state with the default optim", args(lowmem_state="int8"), ValueError, ("lowmem_state='int8'", "set optim to")),
    ("rank without us", args(optim="sgd", lowmem_rank=4), ValueError, ("lowmem_rank=4", "no effect")),
    ("gap without us", args(optim="sgd", lowmem_update_gap=4), ValueError, ("lowmem_update_gap=4", "no effect")),
    ("scale without us", args(optim="sgd", lowmem_scale=1.0), ValueError, ("lowmem_scale=1.0", "no effect")),
    ("projection without us", args(optim="sgd", lowmem_projection="random"), ValueError, ("lowmem_projection", "no effect")),
    ("weights without us", args(optim="sgd", lowmem_weights="keep"), ValueError, ("lowmem_weights='keep'", "no effect")),
    # values that cannot be
    ("unknown codec", args(**OURS, lowmem_state="int9"), ValueError, ("lowmem_state='int9'", "'int8'")),
    ("codec of no type", args(**OURS, lowmem_state=8), TypeError, ("lowmem_state=8", "codec")),
    ("rank 0", args(**OURS, lowmem_rank=0), ValueError, ("lowmem_rank=0", "at least 1")),
    ("rank as text", args(**OURS, lowmem_rank="256"), TypeError, ("lowmem_rank='256'", "integer")),
    ("rank as truth", args(**OURS, lowmem_rank=True), TypeError, ("lowmem_rank=True", "integer")),
    ("fractional rank", args(**OURS, lowmem_rank=2.5), TypeError, ("lowmem_rank=2.5", "integer")),
    ("gap 0", args(**OURS, lowmem_update_gap=0), ValueError, ("lowmem_update_gap=0", "at least 1")),
    ("negative scale", args(**OURS, lowmem_scale=-1.0), ValueError, ("lowmem_scale=-1.0", "(0, inf)")),
    ("scale 0", args(**OURS, lowmem_scale=0), ValueError, ("lowmem_scale=0", "(0, inf)")),
    ("NaN scale", args(**OURS, lowmem_scale=float("nan")), ValueError, ("lowmem_scale=nan", "finite")),
    ("unknown projection", args(**OURS, lowmem_projection="svdd"), ValueError, ("lowmem_projection='svdd'", "svd")),
    ("pair of three", args(**OURS, lowmem_state="int8,fp8,bf16"), ValueError, ("lowmem_state='int8,fp8,bf16'",)),
    ("pair of one", args(**OURS, lowmem_state="int8,"), ValueError, ("lowmem_state='int8,'",)),
    ("pair with a stranger", args(**OURS, lowmem_state="int8,fp9"), ValueError, ("lowmem_state", "fp9", "fp8")),
    ("unknown weight store", args(**OURS, lowmem_weights="bf16_rs"), ValueError, ("lowmem_weights='bf16_rs'", "bf16_sr")),
    ("weight store for fp32 weights", trainer(args(**OURS, lowmem_weights="bf16_sr"), create=True), ValueError, ("lowmem_weights='bf16_sr'", "no parameter is bfloat16", "dtype=torch.bfloat16")),
    ("weight store for fp32 weights by hand", optimizer(rank=4, weights="bf16_ecc"), ValueError, ("weights='bf16_ecc'", "float32")),
    ("weight store of a class", lambda: OPTIMIZERS["adamw"]([nn.Parameter(torch.zeros(2))], weights="bf16_sr"), ValueError, ("weights='bf16_sr'",)),
    ("rotate as a number", args(**OURS, lowmem_rotate=1), TypeError, ("lowmem_rotate=1", "True or False")),
    ("embeddings for adamw", args(optim="adamw", lowmem_embeddings="scale"), ValueError, ("lowmem_embeddings='scale'", "optim='adamw'", "apollo_mini")),
    ("embeddings without us", args(optim="sgd", lowmem_embeddings="scale"), ValueError, ("lowmem_embeddings='scale'", "no effect")),
    ("unknown rule of embeddings", args(**OURS, lowmem_embeddings="adam-mini"), ValueError, ("lowmem_embeddings='adam-mini'", "adam_mini")),
    ("role by hand", args(optim="scale", optim_args="role=head"), ValueError, ("role='head'", "no effect", "the model says")),
    ("negative sinkhorn_iters", args(optim="scale", optim_args="sinkhorn_iters=-1"), ValueError, ("sinkhorn_iters=-1", "at least 0")),
    ("momentum 1", args(optim="muon", optim_args="momentum=1.0"), ValueError, ("momentum=1.0", "[0, 1)")),
    ("cautious lamb", args(optim="lamb", optim_args="cautious=True"), ValueError, ("cautious=True", "adamw")),
    ("cautious accumulation in backward", args(optim="galore", optim_args="cautious=True", lowmem_step_in_backward=True, max_grad_norm=0, gradient_accumulation_steps=2), ValueError, ("gradient_accumulation_steps=2", "cautious=True")),
    ("rotate for adamw", args(optim="adamw", lowmem_rotate=True), ValueError, ("lowmem_rotate=True", "optim='adamw'", "no effect")),
    ("negative learning rate", args(**OURS, learning_rate=-1.0), ValueError, ("learning_rate=-1.0",)),
    ("beta1 of 1", args(**OURS, adam_beta1=1.0), ValueError, ("adam_beta1=1.0", "[0, 1)")),
    ("beta2 below 0", args(**OURS, adam_beta2=-0.1), ValueError, ("adam_beta2=-0.1", "[0, 1)")),
    ("epsilon 0", args(**OURS, adam_epsilon=0.0), ValueError, ("adam_epsilon=0.0", "(0, inf)")),
    ("negative decay", args(**OURS, weight_decay=-0.1), ValueError, ("weight_decay=-0.1",)),
    # values that would do nothing
    ("rank for adamw", args(optim="adamw", lowmem_rank=8), ValueError, ("lowmem_rank=8", "optim='adamw'", "apollo")),
    ("gap for adamw", args(optim="adamw", lowmem_update_gap=8), ValueError, ("lowmem_update_gap=8", "apollo")),
    ("scale for adamw", args(optim="adamw", lowmem_scale=8.0), ValueError, ("lowmem_scale=8.0", "apollo")),
    ("projection for adamw", args(optim="adamw", lowmem_projection="random"), ValueError, ("lowmem_projection", "apollo")),
    ("targets for adamw", args(optim="adamw", optim_target_modules=["q_proj"]), ValueError, ("optim_target_modules", "apollo")),
    ("empty targets", args(**OURS, optim_target_modules=[]), ValueError, ("optim_target_modules=[]", "names no module")),
    # step in backward
    ("step in backward with another's optim", args(lowmem_step_in_backward=True), ValueError, ("lowmem_step_in_backward=True", "set optim to")),
    ("step in backward as text", args(**OURS, lowmem_step_in_backward="yes"), TypeError, ("lowmem_step_in_backward='yes'",)),
    ("clipping by the global norm", args(**STEPPING | {"max_grad_norm": 1.0}), ValueError, ("max_grad_norm=1.0", "lowmem_step_in_backward", "max_grad_norm=0")),
    ("accumulation of whole gradients", args(**STEPPING, gradient_accumulation_steps=2), ValueError, ("gradient_accumulation_steps=2", "'apollo'", "galore")),
    ("reentrant checkpoints", args(**STEPPING, gradient_checkpointing_kwargs={"use_reentrant": True}), ValueError, ("gradient_checkpointing_kwargs", "use_reentrant to False")),
    ("compiled backward", args(**STEPPING, torch_compile=True), ValueError, ("torch_compile=True", "lowmem_step_in_backward")),
    ("stepping optimizer of another", lambda: StepInBackward(torch.optim.SGD([nn.Parameter(torch.zeros(2))])), TypeError, ("SGD", "make_optimizer")),  # type: ignore[arg-type]
    ("stepping twice", lambda: [StepInBackward(o) for o in [optimizer(rank=4)()] * 2], ValueError, ("has a hook", "Remove it")),
    ("accumulation by hand", lambda: StepInBackward(optimizer(rank=4)(), ready=lambda: True), ValueError, ("accumulation", "'apollo'", "galore")),
    # saved activations
    ("unknown tier", args(lowmem_activations="fp9"), ValueError, ("lowmem_activations='fp9'", "fp8")),
    ("tier that is no string", args(lowmem_activations=8), TypeError, ("lowmem_activations=8", "string")),
    ("layers of no form", args(lowmem_activations="fp8:a-b"), ValueError, ("lowmem_activations='fp8:a-b'", "fp8:0-11")),
    ("layers that overlap", args(lowmem_activations="fp8:0-4,exact:3-"), ValueError, ("lowmem_activations", "layer 3 twice")),
    ("layer that is not there", trainer(args(lowmem_activations="fp8:0-7")), ValueError, ("lowmem_activations='fp8:0-7'", "layers 0 to 0")),
    ("tiers in a checkpoint", args(LowMemSFTConfig, lowmem_activations="fp8", gradient_checkpointing=True), ValueError, ("gradient_checkpointing=True", "lowmem_activations='fp8'", "checkpoint_fp8")),
    ("tiers and offloading", args(LowMemSFTConfig, lowmem_activations="fp8", activation_offloading=True), ValueError, ("activation_offloading=True", "lowmem_activations")),
    ("tiers and Liger", args(lowmem_activations="fp8", use_liger_kernel=True), ValueError, ("use_liger_kernel=True", "lowmem_activations")),
    ("stochastic nothing", args(lowmem_activations_stochastic=True), ValueError, ("lowmem_activations_stochastic=True", "no effect")),
    ("stochastic rounding of nothing", args(lowmem_activations="exact", lowmem_activations_stochastic=True), ValueError, ("lowmem_activations_stochastic=True", "'exact'", "no effect")),
    ("stochastic as text", args(lowmem_activations="fp8", lowmem_activations_stochastic="no"), TypeError, ("lowmem_activations_stochastic='no'",)),
    ("tier of a callback", lambda: LowMemCallback("fp9"), ValueError, ("'fp9'", "fp8")),
    # preference losses
    ("unknown loss", args(LowMemDPOConfig, loss_type="asfd"), ValueError, ("loss_type='asfd'", "'asft'")),
    ("a loss twice", args(LowMemDPOConfig, loss_type=["asft", "asft"]), ValueError, ("loss_type", "twice")),
    ("no loss", args(LowMemDPOConfig, loss_type=[]), ValueError, ("loss_type=[]", "no loss")),
    ("weights of another number", args(LowMemDPOConfig, loss_type=["asft", "sigmoid"], loss_weights=[1.0]), ValueError, ("loss_weights", "1 weights for 2")),
    ("a weight that is no number", args(LowMemDPOConfig, loss_type=["asft", "sigmoid"], loss_weights=["1", 2]), TypeError, ("loss_weights='1'", "number")),
    ("beta for orpo", args(LowMemDPOConfig, loss_type="orpo", beta=0.1), ValueError, ("beta=0.1", "no effect", "'orpo'")),
    ("orpo_lambda without orpo", args(LowMemDPOConfig, loss_type="asft", orpo_lambda=0.1), ValueError, ("orpo_lambda=0.1", "no effect", "'orpo'")),
    ("simpo_gamma without simpo", args(LowMemDPOConfig, loss_type=["sigmoid", "cpo"], simpo_gamma=0.5), ValueError, ("simpo_gamma=0.5", "'simpo'")),
    ("cpo_alpha without cpo", args(LowMemDPOConfig, cpo_alpha=1.0), ValueError, ("cpo_alpha=1.0", "'cpo'")),
    ("negative orpo_lambda", args(LowMemDPOConfig, loss_type="orpo", orpo_lambda=-0.1), ValueError, ("orpo_lambda=-0.1", ">= 0")),
    ("negative simpo_gamma", args(LowMemDPOConfig, loss_type="simpo", simpo_gamma=-0.1), ValueError, ("simpo_gamma=-0.1", ">= 0")),
    ("NaN cpo_alpha", args(LowMemDPOConfig, loss_type="cpo", cpo_alpha=float("nan")), ValueError, ("cpo_alpha=nan", "finite")),
    ("cpo_alpha as text", args(LowMemDPOConfig, loss_type="cpo", cpo_alpha="1"), TypeError, ("cpo_alpha='1'", "number")),
    ("beta 0 for simpo", args(LowMemDPOConfig, loss_type="simpo", beta=0.0), ValueError, ("beta=0.0", "> 0")),
    ("beta 0 for cpo", args(LowMemDPOConfig, loss_type="cpo", beta=0.0), ValueError, ("beta=0.0", "> 0")),
    ("asft_lambda without asft", args(LowMemDPOConfig, asft_lambda=1.0), ValueError, ("asft_lambda=1.0", "loss_type='asft'")),
    ("negative asft_lambda", args(LowMemDPOConfig, loss_type="asft", asft_lambda=-1.0), ValueError, ("asft_lambda=-1.0",)),
    ("beta 0 for asft", args(LowMemDPOConfig, loss_type="asft", beta=0.0), ValueError, ("beta=0.0", "> 0")),
    ("precomputed reference for asft", args(LowMemDPOConfig, loss_type="asft", precompute_ref_log_probs=True), ValueError, ("precompute_ref_log_probs", "no reference")),
    ("synchronised reference for asft", args(LowMemDPOConfig, loss_type="asft", sync_ref_model=True), ValueError, ("sync_ref_model", "no reference")),
    ("label smoothing for asft", args(LowMemDPOConfig, loss_type="asft", label_smoothing=0.1), ValueError, ("label_smoothing=0.1", "no effect")),
    ("label smoothing for ours", args(LowMemDPOConfig, loss_type=["asft", "orpo"], label_smoothing=0.1), ValueError, ("label_smoothing=0.1", "no effect")),
    ("no sequence in a batch", args(LowMemSFTConfig, per_device_train_batch_size=0), ValueError, ("per_device_train_batch_size=0", "at least 1")),
    ("no micro-batch", args(LowMemDPOConfig, gradient_accumulation_steps=0), ValueError, ("gradient_accumulation_steps=0", "at least 1")),
    ("no token", args(LowMemSFTConfig, max_length=0), ValueError, ("max_length=0", "at least 1")),
    ("less than no epoch", args(LowMemSFTConfig, num_train_epochs=-1), ValueError, ("num_train_epochs=-1", "(0, inf)")),
    ("beta that is no number for sigmoid", args(LowMemDPOConfig, beta=float("nan")), ValueError, ("beta=nan", "finite")),
    ("negative beta for ipo", args(LowMemDPOConfig, loss_type="ipo", beta=-1.0), ValueError, ("beta=-1.0", "(0, inf)")),
    ("half of the labels smoothed", args(LowMemDPOConfig, loss_type="robust", label_smoothing=0.5), ValueError, ("label_smoothing=0.5", "[0, 0.5)")),
    ("label smoothing for sigmoid", args(LowMemDPOConfig, label_smoothing=0.1), ValueError, ("label_smoothing=0.1", "no effect", "robust")),
    ("precomputed reference for TRL's sft", args(LowMemDPOConfig, loss_type=["sft", "asft"], precompute_ref_log_probs=True), ValueError, ("precompute_ref_log_probs", "no reference")),
    # batches that share prompts
    ("sharing as text", args(LowMemDPOConfig, lowmem_share_prompt="yes"), TypeError, ("lowmem_share_prompt='yes'", "True or False")),
    ("packing without sharing", args(LowMemDPOConfig, lowmem_pack_tokens=4096), ValueError, ("lowmem_pack_tokens=4096", "lowmem_share_prompt=True")),
    ("rows of nothing", args(LowMemDPOConfig, lowmem_share_prompt=True, lowmem_pack_tokens=0), ValueError, ("lowmem_pack_tokens=0", "at least 1")),
    ("rows of half a token", args(LowMemDPOConfig, lowmem_share_prompt=True, lowmem_pack_tokens=2.5), TypeError, ("lowmem_pack_tokens=2.5", "integer")),
    ("rows in which a pair may not fit", args(LowMemDPOConfig, lowmem_share_prompt=True, lowmem_pack_tokens=2047), ValueError, ("lowmem_pack_tokens=2047", "max_length=1024", "2048")),
    # the reference model
    ("unknown reference", args(LowMemDPOConfig, lowmem_reference="half"), ValueError, ("lowmem_reference='half'", "full")),
    ("reference that is no string", args(LowMemDPOConfig, lowmem_reference=4), TypeError, ("lowmem_reference=4", "string")),
    ("a reference for asft", args(LowMemDPOConfig, loss_type="asft", lowmem_reference="quantized"), ValueError, ("lowmem_reference='quantized'", "no effect")),
    ("no reference for dpo", args(LowMemDPOConfig, lowmem_reference="none"), ValueError, ("lowmem_reference='none'", "'sigmoid'", "'auto'")),
    ("no reference for a mixture", args(LowMemDPOConfig, loss_type=["asft", "ipo"], lowmem_reference="none"), ValueError, ("lowmem_reference='none'", "'ipo'")),
    ("full and precomputed", args(LowMemDPOConfig, lowmem_reference="full", precompute_ref_log_probs=True), ValueError, ("precompute_ref_log_probs=True", "'full'")),
    ("adapter and precomputed", args(LowMemDPOConfig, lowmem_reference="adapter", precompute_ref_log_probs=True), ValueError, ("precompute_ref_log_probs=True", "'adapter'")),
    ("synchronised and precomputed", args(LowMemDPOConfig, lowmem_reference="precomputed", sync_ref_model=True), ValueError, ("sync_ref_model=True", "'precomputed'")),
    ("synchronised and quantized", args(LowMemDPOConfig, lowmem_reference="quantized", sync_ref_model=True), ValueError, ("sync_ref_model=True", "'quantized'", "'full'")),
    ("quantized and sharded", args(LowMemDPOConfig, lowmem_reference="quantized", deepspeed={"x": 1}), ValueError, ("deepspeed", "4-bit", "'precomputed'")),
    # dynamic reward scaling
    ("margin_w without a column", args(LowMemDPOConfig, lowmem_margin_w=0.5), ValueError, ("lowmem_margin_w=0.5", "no effect", "lowmem_margin_column")),
    ("margin_k without a column", args(LowMemDPOConfig, lowmem_margin_k=0.5), ValueError, ("lowmem_margin_k=0.5", "no effect")),
    ("margins for ipo", args(LowMemDPOConfig, loss_type=["sigmoid", "ipo"], lowmem_margin_column="m"), ValueError, ("lowmem_margin_column='m'", "'ipo'")),
    ("margins for asft", args(LowMemDPOConfig, loss_type="asft", lowmem_margin_column="m"), ValueError, ("lowmem_margin_column='m'", "'sigmoid'")),
    ("margins of no column", args(LowMemDPOConfig, lowmem_margin_column=""), TypeError, ("lowmem_margin_column=''", "column")),
    ("margin_w of 0", args(LowMemDPOConfig, lowmem_margin_column="m", lowmem_margin_w=0.0), ValueError, ("lowmem_margin_w=0.0", "(0, inf)")),
    ("negative margin_k", args(LowMemDPOConfig, lowmem_margin_column="m", lowmem_margin_k=-1.0), ValueError, ("lowmem_margin_k=-1.0", "(0, inf)")),
    ("divergence for asft", args(LowMemDPOConfig, loss_type="asft", f_divergence_type="forward_kl"), ValueError, ("f_divergence_type", "no effect")),
    # make_optimizer and the classes
    ("unknown method", optimizer("galor"), ValueError, ("name='galor'", "Choose from")),
    ("no module", lambda: make_optimizer("adamw", [torch.zeros(2)]), TypeError, ("torch.nn.Module", "OPTIMIZERS['adamw']")),  # type: ignore[arg-type]
    ("nothing to train", lambda: make_optimizer("adamw", frozen_model()), ValueError, ("no trainable parameter", "requires_grad")),
    ("rank above every weight", optimizer(rank=60), ValueError, ("rank=60", "the largest is 60")),
    ("targets that match nothing", optimizer(rank=4, target_modules="nope"), ValueError, ("target_modules='nope'", "matches no")),
    ("betas of one", optimizer(betas=(0.9,)), TypeError, ("betas=(0.9,)", "two numbers")),
    ("tensor as lr", optimizer(lr=torch.tensor(0.1)), TypeError, ("lr=", "number")),
    ("negative seed", optimizer(seed=-1), ValueError, ("seed=-1", "at least 0")),
    ("codec for the class", lambda: OPTIMIZERS["adamw"]([nn.Parameter(torch.zeros(2))], state="fp9"), ValueError, ("state='fp9'", "fp8")),
    ("bad group", lambda: OPTIMIZERS["adamw"]([{"params": [nn.Parameter(torch.zeros(2))], "betas": (2, 0)}]), ValueError, ("betas[0]=2",)),
    ("rank in a group of adamw", lambda: OPTIMIZERS["adamw"]([{"params": [nn.Parameter(torch.zeros(2))], "rank": 2}]), ValueError, ("rank=2", "no effect")),
    ("complex parameter", lambda: OPTIMIZERS["adamw"]([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), TypeError, ("complex64", "view_as_real")),
    # with_lowmem and trainers
    ("no config class", lambda: with_lowmem(nn.Module), TypeError, ("with_lowmem", "TrainingArguments")),  # type: ignore[type-var]
    ("no class", lambda: with_lowmem("SFTConfig"), TypeError, ("with_lowmem('SFTConfig')",)),  # type: ignore[arg-type]
    (
        "two optimizers",
        trainer(args(**OURS), optimizers=(torch.optim.SGD([nn.Parameter(torch.zeros(2))]), None)),
        ValueError,
        ("optim='apollo'", "optimizers="),
    ),
    ("arguments of no trainer of TRL's", lambda: SFTTrainer(tiny_llama(), args=args(**OURS)()), TypeError, ("LowMemTrainingArguments", "Make the arguments with LowMemSFTConfig")),
    ("SFT's arguments for DPO", lambda: DPOTrainer(tiny_llama(), args=args(LowMemSFTConfig, **OURS)()), TypeError, ("LowMemSFTConfig", "Make the arguments with LowMemDPOConfig")),
    ("DPO's arguments for SFT", lambda: SFTTrainer(tiny_llama(), args=args(LowMemDPOConfig)()), TypeError, ("LowMemDPOConfig", "Use LowMemDPOTrainer")),
    ("DPO's arguments for no trainer of TRL's", lambda: Trainer(tiny_llama(), args(LowMemDPOConfig, lowmem_reference="quantized")()), TypeError, ("LowMemDPOConfig", "Use LowMemDPOTrainer")),
    # presets
    ("unknown preset", args(lowmem="tiny"), ValueError, ("lowmem='tiny'", "light, balanced, smallest")),
    ("preset that is no word", args(lowmem=3), TypeError, ("lowmem=3", "string")),
    ("preset of nothing", args(lowmem="light", optim="lion", lowmem_state="int8"), ValueError, ("lowmem='light' has no effect", "Leave it unset")),
    ("preset beside another's optim", args(lowmem="light", optim="adamw_torch"), ValueError, ("lowmem='light' sets lowmem_state=8bit", "optim='adamw_torch'")),
    ("smallest with accumulation", args(lowmem="smallest", gradient_accumulation_steps=2), ValueError, ("gradient_accumulation_steps=2", "lowmem='smallest' sets")),
    ("smallest with clipping", args(lowmem="smallest", max_grad_norm=0.5), ValueError, ("max_grad_norm=0.5", "Set max_grad_norm=0")),
    ("smallest, compiled", args(lowmem="smallest", torch_compile=True), ValueError, ("torch_compile=True", "leave torch_compile unset")),
    ("balanced in a checkpoint", args(lowmem="balanced", gradient_checkpointing=True), ValueError, ("gradient_checkpointing=True", "lowmem='balanced' sets")),
    # names of fields
    ("a misspelt field", args(lowmem_stat="int8"), TypeError, ("lowmem_stat='int8'", "Did you mean lowmem_state?")),
    ("a misspelt field of TRL's", args(LowMemSFTConfig, max_lenght=8), TypeError, ("max_lenght=8", "Did you mean max_length?")),
    ("a misspelt field of a loop", lambda: LowMemPlugin(lowmem_actvations="fp8"), TypeError, ("lowmem_actvations='fp8'", "Did you mean lowmem_activations?")),  # type: ignore[call-arg]
    ("a field of no config", args(LowMemDPOConfig, zzzz=1), TypeError, ("zzzz=1", "Leave it out")),
    # weights and what is trained
    ("bf16 weights of adapters", lambda: make_optimizer("adamw", lora(), weights="bf16_sr"), ValueError, ("weights='bf16_sr'", "adapters", "autocast_adapter_dtype=False")),
    ("weights at rest of adapters", lambda: make_optimizer("adamw", lora(), weights="int8_sr"), ValueError, ("weights='int8_sr'", "adapters", "load_in_8bit=True")),
    ("weights at rest that wait", args(**OURS, lowmem_weights="int8_sr"), ValueError, ("lowmem_weights='int8_sr'", "lowmem_step_in_backward=True")),
    ("weights at rest in fp32", lambda: make_optimizer("adamw", tiny_llama(), weights="int8_sr"), ValueError, ("weights='int8_sr'", '{"dtype": "bfloat16"}', "--dtype bfloat16")),
    ("a model by its name in fp32", trainer(args(**OURS, lowmem_weights="bf16_ecc"), create=True), ValueError, ('model_init_kwargs={"dtype": "bfloat16"}', "--dtype bfloat16")),
    # the end of a diverged run
    ("no skipped steps at all", args(**OURS, lowmem_max_skipped_steps=0), ValueError, ("lowmem_max_skipped_steps=0", "at least 1")),
    ("skipped steps as text", args(**OURS, lowmem_max_skipped_steps="3"), TypeError, ("lowmem_max_skipped_steps='3'", "integer")),
    ("a sample of all rows", args(lowmem_sample=1.0), ValueError, ("lowmem_sample=1.0", "(0, 1)")),
    ("a sample of none", args(lowmem_sample=0), ValueError, ("lowmem_sample=0", "(0, 1)")),
    ("a sample as text", args(lowmem_sample="0.3"), TypeError, ("lowmem_sample='0.3'", "number")),
    ("a sample beside a tier", args(lowmem_sample=0.3, lowmem_activations="fp8"), ValueError, ("lowmem_activations='fp8'", "lowmem_sample=0.3", "unset")),
    ("a sample under TRL's checkpointing", args(LowMemSFTConfig, lowmem_sample=0.3), ValueError, ("gradient_checkpointing=True", "gradient_checkpointing=False")),
    ("a sample in a loop", lambda: LowMemPlugin(optim="adamw", lowmem_sample=0.3), ValueError, ("lowmem_sample=0.3", "LowMemPlugin", "unset")),
    ("unknown schedule", args(lowmem_schedule="cosine"), ValueError, ("lowmem_schedule='cosine'", "power")),
    ("power without tokens", args(lowmem_schedule="power"), ValueError, ("lowmem_schedule='power'", "tokens_per_step", "packing=True")),
    ("two schedules", args(lowmem_schedule="power", lr_scheduler_type="cosine", lr_scheduler_kwargs={"tokens_per_step": 8}), ValueError, ("lr_scheduler_type='cosine'", "lowmem_schedule='power'", "Leave one")),
    ("schedule of a loop", lambda: LowMemPlugin(optim="adamw", lowmem_schedule="power"), ValueError, ("lowmem_schedule='power'", "LowMemPlugin", "get_power_schedule")),
    ("skipped steps without us", args(lowmem_max_skipped_steps=3), ValueError, ("lowmem_max_skipped_steps=3", "no effect")),
    # a loop of one's own
    ("checkpointing of a loop", lambda: LowMemPlugin(gradient_checkpointing=True), ValueError, ("gradient_checkpointing=True", "gradient_checkpointing_enable()")),
    ("skipped steps of a loop", lambda: LowMemPlugin(optim="adamw", lowmem_max_skipped_steps=3), ValueError, ("lowmem_max_skipped_steps=3", "optimizer.skipped()")),
    ("a rate for another's optimizer", lambda: LowMemPlugin(learning_rate=1e-3), ValueError, ("learning_rate=0.001", "no effect")),
    ("an unknown field of a section", lambda: LowMemPlugin.from_section("x", {"lowmem_stat": "int8"}), ValueError, ("'lowmem_stat'", "Did you mean 'lowmem_state'")),
    ("a loop without an optimizer", lambda: LowMemPlugin().prepare(Accelerator(cpu=True), tiny_llama()), ValueError, ("optimizer=yours",)),
    ("a scheduler that is none", lambda: LowMemPlugin(optim="adamw").prepare(Accelerator(cpu=True), tiny_llama(), scheduler=3), TypeError, ("scheduler=3", "lambda optimizer")),  # type: ignore[arg-type]
    # fields where they are none
    ("a field in make_optimizer", optimizer("adamw", lowmem_state="int8"), ValueError, ("lowmem_state='int8'", "here it is state='int8'")),
    ("another method's option", optimizer("adamw", damping=3), ValueError, ("damping=3", "natural_galore", "Leave it out")),
    ("the model first", lambda: make_optimizer(nn.Linear(4, 4), "adamw"), TypeError, ("got Linear", "make_optimizer(name, model)")),  # type: ignore[arg-type]
    ("tiers of two owners", trainer(args(lowmem_activations="fp8"), callbacks=[LowMemCallback("fp8")]), ValueError, ("one owner", "Leave one")),
    ("tiers of a callback as a number", lambda: LowMemCallback(3), TypeError, ("activations=3", "'fp8'")),  # type: ignore[arg-type]
    # budgets
    ("a budget without a unit", args(lowmem_budget="24"), ValueError, ("lowmem_budget='24'", "GiB")),
    ("a budget as a number", args(lowmem_budget=24), TypeError, ("lowmem_budget=24", "'24GiB'")),
    ("a budget of nothing", args(lowmem_budget="0GiB"), ValueError, ("lowmem_budget='0GiB'", "above zero")),
    ("a budget for what cannot be planned", trainer(args(lowmem_budget="1GiB")), ValueError, ("lowmem_budget='1GiB'", "LowMemSFTTrainer", "hf-lowmem plan")),
    ("layers in the wrong order", args(lowmem_activations="fp8:5-2"), ValueError, ("'fp8:5-2'", "fp8:0-11")),
    ("fp16 in a step in backward", args(**STEPPING, fp16=True), ValueError, ("fp16=True", "Use bf16")),
    ("a budget for a loop", lambda: LowMemPlugin(lowmem_budget="1GiB"), ValueError, ("lowmem_budget='1GiB' has no effect in LowMemPlugin", "hf-lowmem plan")),
]  # fmt: skip


@pytest.mark.parametrize(("build", "error", "says"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_is_refused(build: Callable[[], Any], error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        build()
    for words in says:
        assert words in str(caught.value)
    assert len(str(caught.value)) <= SCREEN, "a screen"
    assert REMEDY.search(str(caught.value)), f"no remedy: {caught.value}"


def test_the_table_is_long_enough_and_has_no_row_twice() -> None:
    assert len({row[0] for row in BAD}) == len(BAD) >= 60


def test_the_same_settings_without_the_fault_are_accepted() -> None:
    """So that no row above is refused for another reason than its own."""
    args(**OURS, lowmem_state="int8", lowmem_rank=8, lowmem_update_gap=5, lowmem_scale=2.0, lowmem_projection="random",
         lowmem_weights="keep", optim_target_modules=["q_proj"])()  # fmt: skip
    args(LowMemDPOConfig, loss_type="asft", asft_lambda=0.5, beta=0.1, loss_weights=[2.0])()
    args(LowMemDPOConfig, loss_type=["robust", "orpo", "simpo", "cpo"], loss_weights=[1.0, 0.1, 0.1, 0.1], orpo_lambda=0.2,
         simpo_gamma=1.0, cpo_alpha=0.0, label_smoothing=0.1, lowmem_reference="precomputed")()  # fmt: skip
    args(
        LowMemDPOConfig, loss_type=["sigmoid", "asft"], lowmem_margin_column="m", lowmem_margin_w=0.2, lowmem_margin_k=1
    )()
    args(LowMemSFTConfig, optim="adamw", lowmem_state="fp8_expand")()
    optimizer(rank=4, target_modules="")  # built only when called
    make_optimizer("apollo", nn.Linear(80, 60), rank=59)
    assert with_lowmem(SFTConfig) is LowMemSFTConfig
    assert with_lowmem(DPOConfig) is LowMemDPOConfig


def test_unpublished_modules_are_refused_by_name(tmp_path: Any) -> None:
    """A low-rank optim whose rank leaves nothing is refused when the model is known, by the field's own name."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    settings = args(output_dir=str(tmp_path), optim="apollo", lowmem_rank=32)()

    class OurTrainer(LowMemTrainerMixin, Trainer):
        pass

    with pytest.raises(ValueError, match="lowmem_rank=32 has no effect"):
        OurTrainer(model, settings).create_optimizer()
