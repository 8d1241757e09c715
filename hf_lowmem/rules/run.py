"""Run: the facts of a training run, as far as they are known where somebody asks.

Each door knows some: an accelerate YAML knows the engine and not the clipping, training arguments know the clipping and
perhaps not the engine, a trainer knows all. What is not known is None, and no rule is applied to it.
"""

# accelerate's commands have no stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

import os
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Self, cast

from torch.distributed.fsdp import CPUOffloadPolicy

from hf_lowmem.optim import ALL_METHODS, ZEROTH
from hf_lowmem.specs import OPTIMIZER_FIELDS, OptimSpec

TRUE = ("1", "true", "yes")
PIECES = ("cp_size", "sp_size")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Facts of a run; None where one is not known.

    Args:
        optim: name of the optimizer.
        fields: fields of our optimizers that are set, by name.
        spec: of our optimizer, once it was checked for itself.
        tiers, stochastic, chunk, host: `lowmem_activations`, its rounding, tokens that a streamed layer runs on, and
            `lowmem_offload`.
        matmul, matmul_least: `lowmem_matmul`, and `lowmem_matmul_least`.
        sample: `lowmem_sample`.
        schedule: `lowmem_schedule`.
        scheduler: `lr_scheduler_type`, where it is not the default.
        in_backward: whether each weight is stepped in backward.
        budget: `lowmem_budget`, or "auto" for lowmem="auto".
        loop: who trains, where that is no Trainer, such as "LowMemPlugin".
        clips: the program that clips gradients by itself and has no door for a step in backward.
        passed: an optimizer that was passed beside the fields, as it was written.
        engine: "single", "ddp", "fsdp" or "deepspeed".
        fsdp_version: 1 or 2; "XLA" for the FSDP of torch_xla.
        cpu_offload: whether FSDP keeps shards in host memory.
        zero: DeepSpeed's settings, in the form of its JSON.
        processes, n_gpu: number of processes, and of the GPUs that one of them has replicas on.
        pieces: processes among which a row is cut (context and sequence parallelism), by the names of
            accelerate's ParallelismConfig, where that is more than one.
        precision: "no", "fp16" or "bf16".
        accumulation: micro-batches a step.
        compile: whether the model is compiled.
        checkpointing, reentrant: whether layers are checkpointed, and by torch's reentrant form.
        offload: whether saved activations are moved off the device.
        liger: whether liger's kernels stand in the model.
        max_grad_norm: bound of the global norm; 0 for none.
        said: how the user has written a fact, by its name.
    """

    optim: str | None = None
    fields: Mapping[str, Any] | None = None
    spec: OptimSpec | None = None
    tiers: str | None = None
    stochastic: bool | None = None
    host: str | None = None
    chunk: int | None = None
    matmul: str | None = None
    matmul_least: int | None = None
    sample: float | None = None
    schedule: str | None = None
    scheduler: str | None = None
    in_backward: bool | None = None
    budget: str | None = None
    loop: str | None = None
    clips: str | None = None
    passed: str | None = None
    engine: str | None = None
    fsdp_version: int | str | None = None
    cpu_offload: bool | None = None
    zero: Mapping[str, Any] | None = None
    processes: int | None = None
    n_gpu: int | None = None
    pieces: Mapping[str, int] | None = None
    precision: str | None = None
    accumulation: int | None = None
    compile: bool | None = None
    checkpointing: bool | None = None
    reentrant: bool | None = None
    offload: bool | None = None
    liger: bool | None = None
    max_grad_norm: float | None = None
    said: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def ours(self) -> bool:
        """Whether the optimizer is one of ours."""
        return self.optim in ALL_METHODS

    @property
    def zeroth(self) -> str | None:
        """The name of the optimizer, where it is one that makes no backward pass."""
        return self.optim if self.optim in ZEROTH else None

    @property
    def asked(self) -> str | None:
        """The first field that asks something of us, with its value; None where none does."""
        return next((self.say(f) for f in ("optim", "tiers", "matmul", "budget") if self._asks(f)), None)

    def _asks(self, fact: str) -> bool:
        return self.ours if fact == "optim" else getattr(self, fact) is not None

    def say(self, fact: str) -> str:
        """A fact as the user wrote it."""
        if fact == "passed":
            return str(self.passed)
        if fact == "zeroth":
            return self.say("optim")
        if fact in self.said:
            return self.said[fact]
        name = {
            "tiers": "lowmem_activations",
            "budget": "lowmem_budget",
            "in_backward": "lowmem_step_in_backward",
            "stochastic": "lowmem_activations_stochastic",
            "host": "lowmem_offload",
            "chunk": "lowmem_stream_chunk",
            "pieces": "parallelism_config",
            "matmul": "lowmem_matmul",
            "matmul_least": "lowmem_matmul_least",
            "sample": "lowmem_sample",
            "schedule": "lowmem_schedule",
            "scheduler": "lr_scheduler_type",
        }.get(fact, fact)
        return f"{name}={getattr(self, fact)!r}"

    def knowing(self, said: Mapping[str, str] | None = None, **facts: Any) -> Self:
        """The same run, of which more is known; facts that are None here say nothing."""
        known = {name: value for name, value in facts.items() if value is not None}
        return replace(self, said={**self.said, **(said or {})}, **known)

    def asking(self, other: "Run") -> Self:
        """A copy of this run with the fields, tiers, optimizer and budget of `other`, and nothing else of it."""
        asks = ("optim", "fields", "spec", "tiers", "stochastic", "chunk", "host", "matmul", "matmul_least")
        asks += ("sample", "schedule", "in_backward", "budget")
        said = {name: words for name, words in other.said.items() if name in asks}
        return self.knowing(said, **{name: getattr(other, name) for name in asks})

    @classmethod
    def from_fields(cls, args: Any) -> Self:
        """Facts that fields of any config or a LowMemPlugin say, before HuggingFace's own checks have run."""
        named = {f"lowmem_{name}": getattr(args, f"lowmem_{name}", None) for name in OPTIMIZER_FIELDS}
        in_backward = bool(getattr(args, "lowmem_step_in_backward", False))
        named["lowmem_step_in_backward"] = in_backward or None
        named["lowmem_accumulation"] = getattr(args, "lowmem_accumulation", None)
        named["lowmem_max_skipped_steps"] = getattr(args, "lowmem_max_skipped_steps", None)
        checkpointing = next(
            (n for n in ("gradient_checkpointing", "activation_checkpointing") if getattr(args, n, None)), None
        )
        asked, optim = deepspeed_asked(args), getattr(args, "optim", None)
        automatic = getattr(args, "lowmem", None) == "auto"
        scheduler = getattr(args, "lr_scheduler_type", None)
        scheduler = getattr(scheduler, "value", scheduler)
        return cls(
            optim=None if optim is None else str(getattr(optim, "value", optim)),
            fields={name: value for name, value in named.items() if value is not None},
            tiers=getattr(args, "lowmem_activations", None),
            stochastic=getattr(args, "lowmem_activations_stochastic", None),
            host=getattr(args, "lowmem_offload", None),
            chunk=getattr(args, "lowmem_stream_chunk", None),
            matmul=getattr(args, "lowmem_matmul", None),
            matmul_least=getattr(args, "lowmem_matmul_least", None),
            sample=getattr(args, "lowmem_sample", None),
            schedule=getattr(args, "lowmem_schedule", None),
            scheduler=None if scheduler in (None, "linear") else str(scheduler),
            in_backward=in_backward,
            budget=getattr(args, "lowmem_budget", None) or ("auto" if automatic else None),
            engine="deepspeed" if asked else None,
            checkpointing=checkpointing is not None,
            offload=bool(getattr(args, "activation_offloading", False)),
            liger=bool(getattr(args, "use_liger_kernel", False)),
            said={
                "engine": asked,
                "checkpointing": f"{checkpointing}=True",
                "offload": "activation_offloading=True",
                "liger": "use_liger_kernel=True",
                **({"budget": "lowmem='auto'"} if automatic else {}),
            },
        )

    @classmethod
    def from_arguments(cls, args: Any) -> Self:
        """Facts of training arguments, once HuggingFace has settled its own. Without its fields: as `from_fields`."""
        run = cls.from_fields(args)
        spec = args.lowmem_optim_spec() if run.ours and hasattr(args, "lowmem_optim_spec") else None
        if not hasattr(args, "world_size"):  # no TrainingArguments
            return run.knowing(spec=spec)
        fsdp, engine = fsdp_asked(args), run.engine
        sharded: Mapping[str, object] = getattr(args, "fsdp_config", None) or {}
        if engine is None:
            engine = "fsdp" if fsdp else "ddp" if args.world_size > 1 else "single"
        version, wrote = _fsdp_version(args) if engine == "fsdp" else (None, "")
        said = {
            "fsdp_version": wrote,
            "processes": f"world_size={args.world_size!r}",
            "precision": "fp16=True" if args.fp16 else "bf16=True",
            "accumulation": f"gradient_accumulation_steps={args.gradient_accumulation_steps!r}",
            "compile": f"torch_compile={args.torch_compile!r}",
            "reentrant": f"gradient_checkpointing_kwargs={args.gradient_checkpointing_kwargs!r}",
        }
        if engine == "fsdp" and _true(sharded.get("activation_checkpointing")) and not run.checkpointing:
            run = run.knowing(
                checkpointing=True, said={"checkpointing": "fsdp_config['activation_checkpointing']=True"}
            )
        plugin = getattr(args, "deepspeed_plugin", None)
        kwargs: Mapping[str, object] = args.gradient_checkpointing_kwargs or {}
        if engine == "fsdp" and (offloads := _offloads(args, sharded)) is not None:
            run = run.knowing({"cpu_offload": offloads}, cpu_offload=True)
        return run.knowing(
            said,
            spec=spec,
            engine=engine,
            fsdp_version=version,
            zero=plugin.deepspeed_config if engine == "deepspeed" and plugin is not None else None,
            processes=args.world_size,
            n_gpu=args.n_gpu,
            pieces=_pieces(vars(getattr(args, "parallelism_config", None) or _Launched())),
            precision="fp16" if args.fp16 else "bf16" if args.bf16 else "no",
            accumulation=args.gradient_accumulation_steps,
            compile=bool(args.torch_compile),
            reentrant=bool(kwargs.get("use_reentrant")),
            max_grad_norm=args.max_grad_norm,
        )

    def with_accelerator(self, accelerator: Any) -> Self:
        """The facts that an Accelerator has set up, which counts where the fields say something else."""
        kind = accelerator.distributed_type.value
        engine = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed", "NO": "single"}.get(kind, "ddp")
        precision = accelerator.mixed_precision
        said = {
            "engine": "DeepSpeed",
            "processes": f"num_processes={accelerator.num_processes!r}",
            "precision": f"mixed_precision={precision!r}",
        }
        state, run = accelerator.state, self
        if engine == "fsdp":
            version = state.fsdp_plugin.fsdp_version
            run = run.knowing({"fsdp_version": f"fsdp_version={version!r}"}, fsdp_version=version)
            if isinstance(getattr(state.fsdp_plugin, "cpu_offload", None), CPUOffloadPolicy):
                run = run.knowing({"cpu_offload": "fsdp_offload_params=True"}, cpu_offload=True)
            if getattr(state.fsdp_plugin, "activation_checkpointing", False):
                run = run.knowing({"checkpointing": "fsdp_activation_checkpointing=True"}, checkpointing=True)
        zero = getattr(state.deepspeed_plugin, "deepspeed_config", {}) if engine == "deepspeed" else None
        backend = getattr(getattr(state, "dynamo_plugin", None), "backend", None)
        compiled = str(getattr(backend, "value", None) or "NO").upper()
        if compiled != "NO":
            run = run.knowing({"compile": f"dynamo_backend={compiled!r}"}, compile=True)
        return run.knowing(
            said,
            engine=engine,
            zero=zero,
            processes=accelerator.num_processes,
            precision=precision,
            pieces=_pieces(vars(getattr(accelerator, "parallelism_config", None) or _Launched())) or run.pieces,
        )

    def with_model(self, model: Any) -> Self:
        """The facts that the model says of itself."""
        compiled = getattr(model, "_orig_mod", None)  # of torch.compile
        if compiled is None:
            return self
        return self.knowing({"compile": f"torch.compile({type(compiled).__name__})"}, compile=True)

    def with_yaml(self, settings: Mapping[str, Any], zero: Mapping[str, Any] | None = None) -> Self:
        """The facts that accelerate's launcher is told. `settings`: its options by name; `zero`: DeepSpeed's."""
        kind = str(settings.get("distributed_type") or "NO").upper()
        processes = settings.get("num_processes", 1)
        fallback = "ddp" if processes > 1 else "single"
        engine = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(kind, fallback)
        version = settings.get("fsdp_version", default_fsdp_version()) if engine == "fsdp" else None
        checkpointed = engine == "fsdp" and _true(settings.get("fsdp_activation_checkpointing"))
        backend = str(settings.get("dynamo_backend") or "NO").upper()
        precision = settings.get("mixed_precision")
        accumulation = settings.get("gradient_accumulation_steps")
        return self.knowing(
            {
                "engine": f"distributed_type: {kind}",
                "fsdp_version": f"fsdp_version: {version}",
                "processes": f"num_processes={processes}",
                "precision": f"mixed_precision: {precision}",
                "accumulation": f"gradient_accumulation_steps: {accumulation}",
                "compile": f"dynamo_backend: {backend}",
                "checkpointing": "fsdp_activation_checkpointing: true",
                "cpu_offload": "fsdp_offload_params: true",
            },
            engine=engine,
            fsdp_version=version,
            zero=zero if engine == "deepspeed" else None,
            processes=processes,
            precision=precision,
            accumulation=accumulation,
            compile=backend != "NO",
            checkpointing=checkpointed or None,
            cpu_offload=(engine == "fsdp" and _true(settings.get("fsdp_offload_params"))) or None,
            pieces=_pieces({name: settings.get(f"parallelism_config_{name}") for name in PIECES}),
        )

    def with_plan(self, world_size: int, parallel: str | None) -> Self:
        """The processes that a plan supposes; see `hf_lowmem.planner.plan`."""
        if parallel is None:
            return self
        said = {"processes": f"world_size={world_size!r}", "fsdp_version": f"parallel={parallel!r}"}
        version = 2 if parallel == "fsdp2" else None
        return self.knowing(said, engine="fsdp" if version else "ddp", fsdp_version=version, processes=world_size)


def fsdp_asked(args: Any) -> bool:
    """Whether these arguments, or accelerate's launcher, will shard the model."""
    return _true(os.environ.get("ACCELERATE_USE_FSDP")) or bool(getattr(args, "fsdp", None))


def deepspeed_asked(args: Any) -> str:
    """The field or the launcher that asks for DeepSpeed, as the user wrote it. Empty: nothing does."""
    value = getattr(args, "deepspeed", None)
    if value:
        return f"deepspeed={value!r}"
    variable = "ACCELERATE_USE_DEEPSPEED"
    return f"{variable}={os.environ[variable]}" if _true(os.environ.get(variable)) else ""


@cache
def default_fsdp_version() -> str:
    """FSDP's version where accelerate is not told one."""
    from accelerate.commands.launch import launch_command_parser

    parser = cast(ArgumentParser, launch_command_parser())
    return str(parser.get_default("fsdp_version"))


def _fsdp_version(args: Any) -> tuple[int | str, str]:
    """FSDP's version under these arguments, and who says so: their own field counts, else accelerate's launcher."""
    if not getattr(args, "fsdp", None):
        version = os.environ.get("FSDP_VERSION") or default_fsdp_version()
        return version, f"FSDP_VERSION={version}"
    config: Mapping[str, int | str] = args.fsdp_config or {}
    if config.get("xla"):
        return "XLA", "fsdp_config['xla']=True"
    plugin_args: Mapping[str, int | str] = getattr(args, "fsdp_plugin_args", None) or {}
    version = plugin_args.get("fsdp_version") or config.get("version", 2)
    return version, f"fsdp_config['version']={version!r}"


def _offloads(args: object, sharded: Mapping[str, object]) -> str | None:
    """The setting by which FSDP keeps shards in host memory, as it was written; None where none does."""
    if getattr(args, "fsdp", None):
        return "fsdp_config['cpu_offload']=True" if _true(sharded.get("cpu_offload")) else None
    return "FSDP_OFFLOAD_PARAMS=true" if _true(os.environ.get("FSDP_OFFLOAD_PARAMS")) else None


def _pieces(sizes: Mapping[str, int | str | None]) -> dict[str, int]:
    """Processes among which rows are cut, by the name of the setting, where they are more than one."""
    return {name: size for name in PIECES if (size := int(sizes.get(name) or 1)) > 1}


class _Launched:
    """ParallelismConfig's sizes as accelerate's launcher hands them down."""

    def __init__(self) -> None:
        on = _true(os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG"))
        for name in PIECES if on else ():
            setattr(self, name, os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}"))


def _true(value: Any) -> bool:
    return str(value).lower() in TRUE
