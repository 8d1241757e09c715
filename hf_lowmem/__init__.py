"""hf_lowmem: full-parameter training of HuggingFace models in less memory, by switching fields on.

Names are loaded when they are first used, so `import hf_lowmem` costs nothing and needs neither trl nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lowmem.arguments import LowMemArguments, LowMemTrainingArguments
    from hf_lowmem.callbacks import LowMemCallback, MemoryReportCallback
    from hf_lowmem.dpo import LowMemDPOConfig, LowMemDPOTrainer
    from hf_lowmem.optim import make_optimizer
    from hf_lowmem.plugin import LowMemPlugin
    from hf_lowmem.sft import LowMemSFTConfig, LowMemSFTTrainer
    from hf_lowmem.trainer import LowMemTrainer, LowMemTrainerMixin
    from hf_lowmem.wrap import with_lowmem

__version__ = "0.1.0"

_HOME = {
    "LowMemArguments": "arguments",
    "LowMemCallback": "callbacks",
    "LowMemDPOConfig": "dpo",
    "LowMemDPOTrainer": "dpo",
    "LowMemPlugin": "plugin",
    "LowMemSFTConfig": "sft",
    "LowMemSFTTrainer": "sft",
    "LowMemTrainer": "trainer",
    "LowMemTrainerMixin": "trainer",
    "LowMemTrainingArguments": "arguments",
    "MemoryReportCallback": "callbacks",
    "make_optimizer": "optim",
    "with_lowmem": "wrap",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_lowmem' has no attribute {name!r}")
    return getattr(import_module(f"hf_lowmem.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
