"""hf_lowmem as a plugin of axolotl: its optimizers and its saved activations, by a section of axolotl's YAML.

```yaml
plugins: [hf_lowmem_axolotl.HfLowmemPlugin]
hf_lowmem:
  optim: adamw
  lowmem_state: 8bit
  lowmem_weights: bf16_sr
  lowmem_activations: checkpoint_fp8
```

Put this folder on PYTHONPATH. The section holds the fields of `hf_lowmem.LowMemPlugin`; learning rate, weight decay and
seed come from axolotl's own settings, and setting them here as well is an error.
"""

import os
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from hf_lowmem import rules
from hf_lowmem.activations import convert
from hf_lowmem.optim import ALL_METHODS
from hf_lowmem.rules import deepspeed
from hf_lowmem.rules.run import default_fsdp_version
from hf_lowmem.training.plugin import LowMemPlugin

THEIRS = ("learning_rate", "weight_decay")


class Settings(LowMemPlugin):
    """The fields of the section."""

    PROGRAM = "axolotl"


class HfLowmemArgs(BaseModel):
    """What axolotl's configuration accepts beside its own keys."""

    hf_lowmem: dict[str, Any] | None = None


def settings(cfg: Any, **theirs: Any) -> LowMemPlugin | None:
    """The section as a plugin, checked; None where there is none."""
    section = dict(getattr(cfg, "hf_lowmem", None) or {})
    if not section:
        return None
    for name in THEIRS:
        if name in section:
            raise ValueError(
                f"hf_lowmem: {name}={section[name]!r}: axolotl has a setting of that name, which is used. Set it there."
            )
    plugin = Settings.from_section("hf_lowmem", section | theirs)
    rules.check(facts(cfg, plugin), "hf_lowmem")
    return plugin


def facts(cfg: Any, plugin: LowMemPlugin) -> rules.Run:
    """What axolotl's configuration says of the run."""

    def get(name: str) -> Any:
        return getattr(cfg, name, None)

    sharded, zero, processes = get("fsdp_config") or {}, get("deepspeed"), int(os.environ.get("WORLD_SIZE", "1"))
    engine = "deepspeed" if zero else "fsdp" if get("fsdp") or sharded else "ddp" if processes > 1 else "single"
    version = get("fsdp_version") or sharded.get("fsdp_version") or default_fsdp_version()
    if isinstance(zero, str):
        zero = deepspeed.from_yaml("hf_lowmem", {"deepspeed_config": {"deepspeed_config_file": zero}})
    names = ("gradient_checkpointing", "gradient_accumulation_steps", "max_grad_norm", "torch_compile", "fp16", "bf16")
    said = {name: f"{name}={get(name)!r}" for name in names}
    return rules.Run.from_arguments(plugin).knowing(
        {
            "engine": f"deepspeed={get('deepspeed')!r}",
            "fsdp_version": f"fsdp_version={version!r}",
            "processes": f"WORLD_SIZE={processes}",
            "precision": said["fp16" if get("fp16") else "bf16"],
            "accumulation": said["gradient_accumulation_steps"],
            "compile": said["torch_compile"],
            "checkpointing": said["gradient_checkpointing"],
            "reentrant": f"gradient_checkpointing_kwargs={get('gradient_checkpointing_kwargs')!r}",
            "liger": "liger's plugin",
            "pieces": f"context_parallel_size={get('context_parallel_size')!r}",
        },
        clips="axolotl",
        engine=engine,
        fsdp_version=version if engine == "fsdp" else None,
        zero=zero or None,
        processes=processes,
        pieces={"cp_size": pieces} if (pieces := get("context_parallel_size") or 1) > 1 else None,
        precision="fp16" if get("fp16") else "bf16" if get("bf16") else None,
        accumulation=get("gradient_accumulation_steps"),
        compile=bool(get("torch_compile")),
        checkpointing=bool(get("gradient_checkpointing")),
        reentrant=bool((get("gradient_checkpointing_kwargs") or {}).get("use_reentrant")),
        offload=bool(get("activation_offloading")),
        liger=any("liger" in str(name).lower() for name in get("plugins") or ()),
        max_grad_norm=get("max_grad_norm"),
    )


class HfLowmemPlugin(BasePlugin):
    """Registers itself through `plugins:` in axolotl's YAML."""

    def get_input_args(self) -> str:
        return f"{__name__}.HfLowmemArgs"

    def register(self, cfg: Any) -> None:
        """Every error of the section, before a model is loaded."""
        settings(cfg)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        plugin = settings(cfg)
        spec = None if plugin is None else plugin.lowmem_activation_spec()
        if spec is not None:
            convert(model, spec)

    def create_optimizer(self, cfg: Any, trainer: Any) -> Any:
        asked, args = settings(cfg), trainer.args
        if asked is None or asked.optim not in ALL_METHODS:
            return None
        plugin: Any = settings(cfg, learning_rate=args.learning_rate, weight_decay=args.weight_decay)
        plugin.seed = args.seed
        return plugin.make_optimizer(trainer.model)
