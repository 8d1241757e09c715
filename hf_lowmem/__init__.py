"""hf_lowmem: full-parameter training of HuggingFace models in less memory, by switching fields on.

Names are loaded when they are first used, so `import hf_lowmem` costs nothing and needs neither trl nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_lowmem.moved import find_moved

if TYPE_CHECKING:
    from hf_lowmem.optim import make_optimizer
    from hf_lowmem.training.arguments import LowMemArguments, LowMemTrainingArguments
    from hf_lowmem.training.callbacks import LowMemCallback, MemoryReportCallback
    from hf_lowmem.training.dpo import LowMemDPOConfig, LowMemDPOTrainer
    from hf_lowmem.training.mixin import LowMemTrainer, LowMemTrainerMixin
    from hf_lowmem.training.plugin import LowMemPlugin
    from hf_lowmem.training.sft import LowMemSFTConfig, LowMemSFTTrainer
    from hf_lowmem.training.wrap import with_lowmem

__version__ = "0.1.0"

_HOME = {
    "LowMemArguments": "training.arguments",
    "LowMemCallback": "training.callbacks",
    "LowMemDPOConfig": "training.dpo",
    "LowMemDPOTrainer": "training.dpo",
    "LowMemPlugin": "training.plugin",
    "LowMemSFTConfig": "training.sft",
    "LowMemSFTTrainer": "training.sft",
    "LowMemTrainer": "training.mixin",
    "LowMemTrainerMixin": "training.mixin",
    "LowMemTrainingArguments": "training.arguments",
    "MemoryReportCallback": "training.callbacks",
    "make_optimizer": "optim",
    "with_lowmem": "training.wrap",
}

__all__ = [
    "LowMemArguments",
    "LowMemCallback",
    "LowMemDPOConfig",
    "LowMemDPOTrainer",
    "LowMemPlugin",
    "LowMemSFTConfig",
    "LowMemSFTTrainer",
    "LowMemTrainer",
    "LowMemTrainerMixin",
    "LowMemTrainingArguments",
    "MemoryReportCallback",
    "make_optimizer",
    "with_lowmem",
]


find_moved()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_lowmem' has no attribute {name!r}")
    return getattr(import_module(f"hf_lowmem.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
