"""What does not go together, checked when arguments are made: our fields with each other, with others', with engines.

Each function takes the arguments and raises a ValueError that names the field, its value, the reason and the remedy.
"""

import ast
import os
from dataclasses import fields
from typing import Any

from torch import Size

from hf_lowmem import zero
from hf_lowmem.optim import OPTIMIZERS, elementwise
from hf_lowmem.optim.release import accumulation_refused
from hf_lowmem.specs import OptimSpec, check_flag

__all__ = [
    "FSDP1_REFUSED",
    "LABELS",
    "OPTIMIZER_FIELDS",
    "check_fsdp_spec",
    "check_fsdp_version",
    "check_optimizer_fields",
    "check_step_in_backward",
    "check_tiers",
    "check_zero_config",
    "deepspeed_asked",
    "fsdp_asked",
    "parse_options",
]

# How OptimSpec's fields are called where a user sets them.
LABELS = {
    "name": "optim",
    "lr": "learning_rate",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "state": "lowmem_state",
    "weights": "lowmem_weights",
    "rank": "lowmem_rank",
    "update_gap": "lowmem_update_gap",
    "scale": "lowmem_scale",
    "projection": "lowmem_projection",
    "rotate": "lowmem_rotate",
    "options": "optim_args",
    "target_modules": "optim_target_modules",
}
OPTIMIZER_FIELDS = ("state", "weights", "rank", "update_gap", "scale", "projection", "rotate")

FSDP1_REFUSED = (
    "FSDP1 flattens weights, so rows and matrices, and with them the layout of states, are lost. Set "
    "fsdp_config={'version': 2} (FSDP2; accelerate: fsdp_version: 2), or use DDP."
)


def check_optimizer_fields(args: Any, ours: bool, name: str) -> None:
    """Fields of our optimizers with another's `optim`, and ours with DeepSpeed."""
    check_flag("lowmem_step_in_backward", args.lowmem_step_in_backward)
    if not ours:
        for option in (*OPTIMIZER_FIELDS, "step_in_backward"):
            value = getattr(args, f"lowmem_{option}")
            if value is not None and value is not False:
                raise ValueError(
                    f"lowmem_{option}={value!r} has no effect with optim={name!r}, which is not one of "
                    f"hf_lowmem's. Leave it unset, or set optim to one of: {', '.join(OPTIMIZERS)}."
                )
        return
    label = deepspeed_asked(args)
    if label:
        zero.check_method(
            label,
            name,
            elementwise(),
            weights=args.lowmem_weights,
            step_in_backward=args.lowmem_step_in_backward,
        )


def check_fsdp_version(args: Any, ours: bool, name: str) -> None:
    """FSDP1 is refused; the parents have made `fsdp_config` a dict by now. The trainer sees what accelerate set."""
    config = getattr(args, "fsdp_config", None) or {}
    asked = f"optim={name!r}" if ours else f"lowmem_activations={args.lowmem_activations!r}"
    if getattr(args, "fsdp", None) and (ours or args.lowmem_activations is not None):
        version = config.get("version", 2)
        if int(version) != 2 or config.get("xla"):
            what = "fsdp_config['xla']=True" if config.get("xla") else f"fsdp_config['version']={version!r}"
            raise ValueError(f"{what} with {asked}: {FSDP1_REFUSED}")


def check_zero_config(args: Any, ours: bool, name: str) -> None:
    """DeepSpeed's own settings; the parents have read them by now."""
    plugin, label = getattr(args, "deepspeed_plugin", None), deepspeed_asked(args)
    if plugin is None or not label:
        return
    if ours:
        zero.check_config(label, plugin.deepspeed_config, f"optim={name!r}", optimizer=True)
    if args.lowmem_activations is not None:
        tiers = f"lowmem_activations={args.lowmem_activations!r}"
        zero.check_config(label, plugin.deepspeed_config, tiers, optimizer=False)


def check_tiers(args: Any, checkpointing: Any) -> None:
    """What a tier of `lowmem_activations` cannot share the layers with."""
    tiers = f"lowmem_activations={args.lowmem_activations!r}"
    inside = "inside it nothing is left for a tier to compress"
    for setting, value, reason, remedy in (
        ("gradient_checkpointing", checkpointing, inside, "Leave it unset; 'checkpoint_fp8' is a tier"),
        ("activation_offloading", "activation_offloading", inside, "Set one of the two"),
        (
            "use_liger_kernel",
            "use_liger_kernel",
            "its norms and MLPs keep tensors in functions of their own, out of reach",
            "Set one of the two",
        ),
    ):
        found = getattr(args, value, None) if isinstance(value, str) else value
        if found:
            raise ValueError(f"{setting}={found!r} cannot be combined with {tiers}: {reason}. {remedy}.")


def check_step_in_backward(args: Any) -> None:
    """What needs all gradients at once."""
    for setting, value, reason, remedy in (
        (
            "max_grad_norm",
            args.max_grad_norm,
            "the global norm needs every gradient before the first update",
            "Set max_grad_norm=0; apollo, apollo_mini and fira limit the growth of each update by themselves",
        ),
        ("fp16", args.fp16, "loss scaling checks every gradient before the first update", "Use bf16=True"),
        (
            "torch_compile",
            args.torch_compile,
            "a compiled backward pass hands over all gradients at its end, so nothing would be freed",
            "Leave torch_compile unset",
        ),
        (
            "gradient_checkpointing_kwargs",
            (args.gradient_checkpointing_kwargs or {}).get("use_reentrant") and args.gradient_checkpointing_kwargs,
            "a reentrant checkpoint may hand over one weight's gradient in parts",
            "Set use_reentrant to False",
        ),
        (
            "world_size",
            args.world_size if args.world_size > 1 and not fsdp_asked(args) else 0,
            "DDP averages gradients after each one's update",
            "Set fsdp=True (FSDP2), train in one process, or leave lowmem_step_in_backward unset",
        ),
        ("n_gpu", args.n_gpu if args.n_gpu > 1 else 0, "DataParallel has replicas", "Make one GPU visible"),
    ):
        if value:
            raise ValueError(
                f"{setting}={value!r} cannot be combined with lowmem_step_in_backward=True: {reason}. {remedy}."
            )
    steps = args.gradient_accumulation_steps
    if steps > 1 and not OPTIMIZERS[args.optim].ACCUMULATES:
        raise ValueError(accumulation_refused(f"gradient_accumulation_steps={steps!r}", args.optim))


def fsdp_asked(args: Any) -> bool:
    """Whether these arguments, or accelerate's launcher, will shard the model."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    return launched or bool(getattr(args, "fsdp", None))


def deepspeed_asked(args: Any) -> str:
    """What asks for DeepSpeed, as the user wrote it: the field, or accelerate's launcher. Empty: nothing does."""
    value = getattr(args, "deepspeed", None)
    if value:
        return f"deepspeed={value!r}"
    variable = "ACCELERATE_USE_DEEPSPEED"
    return f"{variable}={os.environ[variable]}" if os.environ.get(variable, "").lower() in ("1", "true", "yes") else ""


def check_fsdp_spec(spec: OptimSpec, fsdp: bool) -> None:
    """Raise for a method, or a projection, that cannot work on weights of which each process has some rows.

    Raises:
        ValueError: with the remedy.
    """
    if not fsdp:
        return
    cls = OPTIMIZERS[spec.name]
    group = cls.resolve(spec) | {"rank": 1}
    reason = cls.unsharded_only(Size((2, 2)), group)
    if reason is not None:
        raise ValueError(reason.replace("projection=", f"{spec.label('projection')}=", 1))


def parse_options(optim_args: str | None, name: str) -> dict[str, Any]:
    """HuggingFace's `optim_args`, "key=value,key=value", as the options that a method alone understands.

    Raises:
        ValueError: for a pair without "=", or for what has a field of its own.
    """
    options: dict[str, Any] = {}
    for pair in filter(None, (optim_args or "").replace(" ", "").split(",")):
        key, equals, text = pair.partition("=")
        if not equals or not key or not text:
            raise ValueError(f"optim_args={optim_args!r}: {pair!r} is not of the form key=value.")
        if key in {f.name for f in fields(OptimSpec)}:
            raise ValueError(
                f"optim_args={optim_args!r}: with optim={name!r} this is a field of its own. Set "
                f"{LABELS.get(key, 'adam_beta1 and adam_beta2' if key == 'betas' else key)} instead."
            )
        try:
            options[key] = ast.literal_eval(text.title() if text.lower() in ("true", "false") else text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options
