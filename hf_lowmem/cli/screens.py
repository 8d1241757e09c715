"""Help that fits a screen, for the commands whose own parsers have hundreds of flags.

`hf-lowmem sft --help` says what one needs to begin, with an example; `hf-lowmem sft --help-all` is the parser's list.
"""

__all__ = ["AGAINST", "EXAMPLES", "SCREENS"]

AGAINST = "hf-lowmem compare --against baseline --model_name_or_path MODEL --dataset_name DATA --lowmem balanced"

# An example of each command, which is the end of its help.
EXAMPLES = {
    "demo": "hf-lowmem demo --quick",
    "sft": "hf-lowmem sft --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name trl-lib/Capybara \\\n"
    "      --lowmem balanced --output_dir out",
    "dpo": "hf-lowmem dpo --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\\n"
    "      --dataset_name trl-lib/ultrafeedback_binarized --loss_type asft --lowmem balanced --output_dir out",
    "launch": "hf-lowmem launch --config_file fsdp2.yaml train.py",
    "plan": "hf-lowmem plan --model meta-llama/Meta-Llama-3-8B --dtype bfloat16 --max_length 2048 --lowmem balanced",
    "doctor": "hf-lowmem doctor",
    "card": "hf-lowmem card out",
    "compare": "hf-lowmem compare out/adamw out/apollo --plot memory.png",
}

_TRAINING = """\
  --model_name_or_path  a model: a name on the hub, or a folder
  --dataset_name        data: a name on the hub, or a folder with train.jsonl
  --output_dir          where checkpoints, the model, a report and a card are written
  --config              a YAML file of any of these fields; a flag counts more
  --dtype               of the weights: bfloat16, float32
  --use_peft            train LoRA adapters
"""

_LOWMEM = """\
  --lowmem              one word for the fields below: light, balanced, smallest; or auto
  --optim               adamw, lion, apollo, apollo_mini, galore, ..., or one of HuggingFace's
  --lowmem_state        what stores the optimizer's moments: 8bit, int8, fp8, int4
  --lowmem_activations  what layers keep for backward: exact, fp8, fp8_recompute, checkpoint_fp8
  --lowmem_matmul       layers' products in 8 bits: fp8_row, fp8_tensor, int8_row
  --lowmem_step_in_backward
                        update each weight during backward, and free its gradient
  --lowmem_budget       memory of one device, such as 24GiB: what is left open is searched
"""

_BODIES = {
    "sft": (
        "Fine-tune a model on texts or conversations, as TRL's SFTTrainer does, in less memory.",
        _TRAINING + "\n" + _LOWMEM,
        "Every field of TRL's SFTConfig, ModelConfig and ScriptArguments is a flag",
    ),
    "dpo": (
        "Train a model on pairs of answers (columns prompt, chosen, rejected) in less memory.",
        "  --loss_type           asft, orpo, simpo, cpo (no reference model), or TRL's: sigmoid, ipo, ...\n"
        "  --sft_first           learn the chosen answers first, in the same process\n"
        + _TRAINING
        + "\n"
        + _LOWMEM
        + "  --lowmem_reference    for a loss that needs one: precomputed, adapter, quantized, full, auto\n"
        "  --lowmem_share_prompt run each pair's prompt once\n",
        "Every field of TRL's DPOConfig, ModelConfig and ScriptArguments is a flag",
    ),
    "launch": (
        "`accelerate launch` with a section hf_lowmem_config in the file, for scripts that stay unchanged.",
        "  --config_file         accelerate's YAML, with our section; see integrations/accelerate\n"
        "  SCRIPT                and its own arguments\n",
        "Every option of `accelerate launch` is taken",
    ),
    "plan": (
        "Predict what a training step takes in memory, by running the real trainer on tensors without memory.",
        "  --model               a model's folder, its config.json, or a hub id whose config is cached\n"
        "  --max_length          tokens of a sequence; with --budget also auto, for the longest that fits\n"
        "  --per_device_train_batch_size\n"
        "                        sequences of a step\n"
        "  --dtype               of the weights: bfloat16, float32\n"
        "  --budget              memory of one device, such as 24GiB: search the fastest settings that fit\n"
        "  --method              the trainer: sft, dpo\n"
        "  --advise TOKENS       also a learning rate and a batch for pre-training on so many tokens, such as 20B\n"
        "  --device              cuda or cpu\n"
        "  --json, --plot FILE   one JSON object; memory over the step as a PNG\n\n" + _LOWMEM,
        "Every field of the trainer's config is a flag, and --config takes the file that trains",
    ),
}


def _screen(command: str) -> str:
    about, flags, rest = _BODIES[command]
    usage = (
        f"usage: hf-lowmem {command} [--help] [--help-all] {'...' if command == 'launch' else '[--FIELD VALUE ...]'}"
    )
    end = f"{rest}.\n`hf-lowmem {command} --help-all` lists them."
    return f"{usage}\n\n{about}\n\n{flags}\n{end}\n\nexample:\n  {EXAMPLES[command]}"


SCREENS = {command: _screen(command) for command in _BODIES}
