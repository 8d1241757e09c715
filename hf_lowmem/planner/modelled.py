"""Settings that a simulated step cannot show: they are refused, because their plan would be a wrong number.

The trainer's own code runs in a simulation, so most settings need no word here. What does: settings that a step obeys
outside of Python, or before it begins; and optimizers, whose states may be of kinds that fake tensors cannot have. The
latter are known by name before anything is made, since the attempt can end the process: copying torchao's tensors of a
fake tensor fails half-way and damages the heap.
"""

from typing import Any

from hf_lowmem.optim import ALL_METHODS, ZEROTH

__all__ = ["check_modelled"]

# Optimizers of HuggingFace's names whose plan has been held against a real step (tests/planner/test_fields.py).
PLANNED = (
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "adagrad",
    "sgd",
    "rmsprop",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "ademamix",
    "ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "rmsprop_bnb_8bit",
)
UNSET = "Leave it unset"
SETTINGS = (
    ("torch_compile", "a compiled step decides by itself what it saves and where it has temporaries", UNSET),
    ("deepspeed", "DeepSpeed's engine allocates flat buffers of its own, which need its package and a GPU", UNSET),
    ("use_liger_kernel", "liger's kernels run on a GPU alone", UNSET),
    ("activation_offloading", "it needs a CUDA device's streams", UNSET),
    ("parallelism_config", "context, sequence and tensor parallelism are not modelled", UNSET),
    ("full_determinism", "deterministic kernels have temporaries of their own", UNSET),
    ("debug", "it looks at the values of tensors, which a plan has none of", UNSET),
    ("fp16", "the scaler's steps need a GPU", "Plan with bf16=True, whose tensors have the same sizes"),
)


def check_modelled(args: Any, *, parallel: str | None = None) -> None:
    """Raise for a setting that a simulated step does not obey as a real one does.

    Raises:
        ValueError: naming the field, its value, the reason and the remedy.
    """
    for setting, reason, remedy in SETTINGS:
        if getattr(args, setting, None):
            raise ValueError(f"{setting}={getattr(args, setting)!r} cannot be planned: {reason}. {remedy}.")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in ALL_METHODS and optim not in PLANNED:
        raise ValueError(
            f"optim={optim!r} cannot be planned: its states are of a kind that has not been held against a real step. "
            f"Set optim to one of: {', '.join((*ALL_METHODS, *PLANNED))}; or measure a short run with LowMemCallback."
        )
    if getattr(args, "fsdp", None) and parallel != "fsdp2":
        raise ValueError(
            f"fsdp={args.fsdp!r} with parallel={parallel!r}: FSDP is planned for several processes. Set world_size to "
            "their number and parallel='fsdp2', or leave fsdp unset."
        )
    if args.optim in ZEROTH and "block_layers" in str(getattr(args, "optim_args", None)):
        raise ValueError(
            f"optim_args={args.optim_args!r} cannot be planned: a plan has two steps, and each moves another block. "
            "Plan without block_layers: with it a step takes as much at most."
        )
    whole = args.optim in ZEROTH and (ZEROTH[args.optim].STATES or args.lowmem_weights == "bf16_ecc")
    if parallel == "fsdp2" and whole:
        raise ValueError(
            f"optim={args.optim!r} with parallel='fsdp2' cannot be planned where it keeps states or bits beside the "
            "weights: an update takes a shard whole then, and a plan knows one process's. Plan one process, or "
            "optim='mezo' with lowmem_weights='bf16_sr'."
        )
    if (getattr(args, "model_init_kwargs", None) or {}).get("use_kernels"):
        raise ValueError(
            "model_init_kwargs={'use_kernels': True} cannot be planned: the hub's kernels run on a GPU alone. Leave it "
            "out."
        )
    if getattr(args, "lowmem_reference", None) == "quantized":
        raise ValueError(
            "lowmem_reference='quantized' cannot be planned: the reference is quantised while it is loaded, from "
            "weights that fake tensors do not have. Plan with lowmem_reference='precomputed', and add 4.13 bits a "
            "linear weight and the embeddings."
        )
    before = getattr(args, "precompute_ref_batch_size", None)
    if before is not None and before > args.per_device_train_batch_size:
        raise ValueError(
            f"precompute_ref_batch_size={before!r} cannot be planned: the pass before training is not weighed, and "
            f"may take more than a step with more pairs than per_device_train_batch_size="
            f"{args.per_device_train_batch_size}. Leave it unset."
        )
