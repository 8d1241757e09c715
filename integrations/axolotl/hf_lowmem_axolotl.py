"""hf_lowmem as a plugin of axolotl: its optimizers and its saved activations, by a section of axolotl's YAML.

```yaml
plugins: [hf_lowmem_axolotl.HfLowmemPlugin]
hf_lowmem:
  optim: adamw
  lowmem_state: 8bit
  lowmem_weights: bf16_sr
  lowmem_activations: checkpoint_fp8
```

Put this folder on PYTHONPATH. The section holds the fields of `hf_lowmem.plugin.LowMemPlugin`; learning rate, weight
decay and seed come from axolotl's own settings, and setting them here as well is an error.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from hf_lowmem.activations import convert
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.plugin import LowMemPlugin

THEIRS = ("learning_rate", "weight_decay")


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
    return LowMemPlugin.from_section("hf_lowmem", section | theirs)


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
        if spec is None:
            return
        if getattr(cfg, "gradient_checkpointing", None):
            raise ValueError(
                f"gradient_checkpointing={cfg.gradient_checkpointing!r} cannot be combined with hf_lowmem: "
                f"lowmem_activations={spec.tiers!r}: nothing would be left to compress. Leave it out; 'checkpoint_fp8' "
                "is a tier."
            )
        convert(model, spec)

    def create_optimizer(self, cfg: Any, trainer: Any) -> Any:
        args = trainer.args
        plugin = settings(cfg, learning_rate=args.learning_rate, weight_decay=args.weight_decay)
        if plugin is None or plugin.optim not in OPTIMIZERS:
            return None
        if plugin.lowmem_step_in_backward:
            raise ValueError(
                "hf_lowmem: lowmem_step_in_backward=True is not supported under axolotl, which clips gradients "
                "after the backward pass. Leave it unset."
            )
        plugin.seed = args.seed
        return plugin.make_optimizer(trainer.model)
