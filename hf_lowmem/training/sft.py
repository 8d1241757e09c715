"""Supervised fine-tuning: TRL's SFTTrainer with the fields.

TRL's fused head gives per-token log-probabilities without building logits, and its loss follows the
`num_items_in_batch` rule; both are used as they are.
"""

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from hf_lowmem.training.arguments import LowMemArguments
from hf_lowmem.training.head import BlockedHead
from hf_lowmem.training.mixin import LowMemTrainerMixin


@dataclass
class LowMemSFTConfig(LowMemArguments, SFTConfig):
    """`trl.SFTConfig` with the fields of `LowMemArguments`."""


class LowMemSFTTrainer(LowMemTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` for `LowMemSFTConfig`: same constructor, same loss, our optimizers.

    ```python
    args = LowMemSFTConfig("out", optim="apollo_mini", lowmem_state="int8", learning_rate=1e-4)
    LowMemSFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer).train()
    ```
    """

    CONFIG = SFTConfig
    HEAD = BlockedHead
