"""Supervised fine-tuning in less memory.

    python scripts/train_sft.py --config integrations/trl/sft_apollo_mini.yaml --output_dir out

Every field of trl's ScriptArguments and ModelConfig and of LowMemSFTConfig is a flag and a key of the YAML file; an
unknown one is an error. Under `accelerate launch` as well.
"""

from _training import load_splits, load_tokenizer, run, set_model_kwargs
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hf_lowmem import LowMemCallback, LowMemSFTConfig, LowMemSFTTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, LowMemSFTConfig, ModelConfig))  # type: ignore[arg-type]
    script_args, training_args, model_args = parser.parse_args_and_config()
    set_model_kwargs(training_args, model_args)
    tokenizer = load_tokenizer(training_args, model_args)
    train, test = load_splits(script_args, training_args)
    trainer = LowMemSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[LowMemCallback()],
    )
    run(trainer)


if __name__ == "__main__":
    main()
