"""QLoRA, then DPO, in one command, as OpenBezoar was made (arXiv 2404.12195): both stages train adapters on 4 bits.

    python scripts/train_qlora_dpo.py --model_name_or_path MODEL --dataset_name DATA --output_dir OUT --load_in_4bit \
        --use_peft --lora_target_modules all-linear --sft_epochs 1 --sft_learning_rate 2e-4 --learning_rate 5e-6

    1. SFT on prompt + chosen: adapters on the model in 4 bits                      OUT/sft/adapter
    2. those adapters are merged into the model in its own dtype, on the CPU        OUT/sft
    3. DPO from there, in 4 bits again, with new adapters                           OUT

The reference of DPO is the policy without its adapters, so no second model is loaded. Why not merge into the 4-bit
weights: they would be rounded to 4 bits once more, and the adapter, which is smaller than that rounding, with them.
Merging here rounds the sum to 4 bits in stage 3 alone, and both the policy and its reference start from it; what that
costs is in the first evaluation of stage 3 (`--eval_on_start`), beside the last of stage 1. Stage 2 needs the host
memory of the whole model once.

DATA has columns prompt, chosen and rejected. A setting of both stages is given once; `--loss_type` and the rest of
`hf-lowmem dpo` are for stage 3. A run that is resumed goes on in stage 3.

Not for you when the model fits unquantised: `hf-lowmem dpo --sft_first --use_peft` is this without the rounding. Nor
for data of another kind in the SFT stage: then run `hf-lowmem sft` by itself. Quality was not measured here.
"""

import copy
import gc
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hf_lowmem import LowMemDPOConfig, LowMemDPOTrainer, LowMemSFTTrainer
from hf_lowmem.cli.dpo import FirstStage, answered
from hf_lowmem.cli.train import train
from hf_lowmem.cli.wrong import WrongCommand
from hf_lowmem.training.callbacks import LowMemCallback


@dataclass
class QuantisedStage(FirstStage):
    """Flags of the SFT stage, and what is done before DPO.

    Raises:
        WrongCommand: where the run is not QLoRA, or a resumed run's first stages are not there.
    """

    sft_first: bool = field(default=True, metadata={"help": "Always so in this script."})

    def run(self, *, model: str, args: LowMemDPOConfig, **given: object) -> str:
        """The folder of the merged model."""
        wanted = {"--load_in_4bit": given["quantization_config"], "--use_peft": given["peft_config"]}
        wanted["--sft_first True"] = self.sft_first or None
        if missing := [flag for flag, value in wanted.items() if value is None]:
            raise WrongCommand(f"QLoRA, then DPO, needs {', '.join(missing)}. Add it, or run `hf-lowmem dpo`.")
        if getattr(args, "fsdp", None):
            raise WrongCommand(f"fsdp={args.fsdp!r}: adapters of sharded weights are not merged here. Leave it unset.")
        assert args.output_dir is not None
        folder = Path(args.output_dir) / "sft"
        if args.resume_from_checkpoint:
            if not (folder / "config.json").is_file():
                raise WrongCommand(
                    f"resume_from_checkpoint={args.resume_from_checkpoint!r}: {folder}, from which that run's DPO "
                    "started, is not there. Give its output_dir, or start anew."
                )
            return str(folder)
        self.learn(model, args, folder, given)
        return str(folder)

    def learn(self, model: str, args: LowMemDPOConfig, folder: Path, given: dict[str, object]) -> None:
        """SFT on the quantised model, then the plain model with the adapter merged into it; no memory is kept."""
        test = given["eval_dataset"]
        trainer = LowMemSFTTrainer(
            model,
            args=self.arguments(args, folder / "adapter"),
            train_dataset=answered(given["train_dataset"]),
            eval_dataset=None if test is None else answered(test),
            processing_class=given["processing_class"],
            quantization_config=given["quantization_config"],
            peft_config=copy.deepcopy(given["peft_config"]),  # peft writes the model's name into it
            callbacks=[LowMemCallback()],
        )
        trainer.train()
        trainer.save_model()
        first, wait = trainer.is_world_process_zero(), trainer.accelerator.wait_for_everyone
        trainer.accelerator.free_memory()
        del trainer  # the trainer is part of reference cycles
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if first:
            settings, tokenizer = args.model_init_kwargs or {}, given["processing_class"]
            assert not isinstance(settings, str), settings  # a command line's has been read by now
            assert isinstance(tokenizer, PreTrainedTokenizerBase)
            merge(model, folder / "adapter", folder, settings)
            tokenizer.save_pretrained(folder)
        wait()


def merge(model: str, adapter: Path, folder: Path, settings: dict[str, object]) -> None:
    """Write the plain model with the adapter merged into it."""
    given = {name: value for name, value in settings.items() if value is not None and name != "device_map"}
    plain = AutoModelForCausalLM.from_pretrained(model, **given)
    PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload(safe_merge=True).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(train(LowMemDPOConfig, LowMemDPOTrainer, QuantisedStage))
