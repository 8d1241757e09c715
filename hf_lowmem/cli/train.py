"""Training from the command line: from flags, or a YAML file, to a trained, saved model."""

from collections.abc import Sequence
from typing import Any

import transformers
from datasets import load_dataset
from packaging.version import Version
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hf_lowmem.training.callbacks import LowMemCallback


def train(
    config_class: Any,
    trainer_class: Any,
    first_stage: Any = None,
    *,
    arguments: Sequence[str] | None = None,
    command: str | None = None,
) -> None:
    """Parse, load, train (from a checkpoint if one is named), report and save.

    Args:
        config_class, trainer_class: what makes the arguments, and trains.
        first_stage: a dataclass of more flags, whose `run` takes the keyword arguments of a trainer and gives back the
            model to go on from.
        arguments: of the command line. Default: the process's.
        command: what the usage line calls it. Default: the process's name.

    Raises:
        ValueError: where a flag or a key of the YAML file is unknown, or settings do not go together.
    """
    classes: Any = (ScriptArguments, config_class, ModelConfig, *filter(None, (first_stage,)))
    parser = TrlParser(classes, prog=command)
    given_arguments = None if arguments is None else list(arguments)
    script_args, training_args, model_args, *stages = parser.parse_args_and_config(given_arguments)
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is not set: give a model's name on the hub, or its folder.")
    # TRL loads the model, by these and what `model_init_kwargs` says beside or against them.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    train, test = load_splits(script_args, training_args)
    given: dict[str, Any] = {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }
    for stage in stages:
        given["model"] = stage.run(**given)
    trainer = trainer_class(**given, callbacks=[LowMemCallback()])
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()


def load_splits(script_args: ScriptArguments, training_args: Any) -> tuple[Any, Any]:
    """The training split, and the test split where `eval_strategy` asks for evaluation.

    `dataset_name` is whatever `datasets.load_dataset` reads: a name on the hub, or a folder with `train.jsonl`.
    """
    if not script_args.dataset_name:
        raise ValueError("dataset_name is not set: give a dataset's name on the hub, or a folder with train.jsonl.")
    dataset: Any = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
    wanted = {"dataset_train_split": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        wanted["dataset_test_split"] = script_args.dataset_test_split
    for field, split in wanted.items():
        if split not in dataset:
            raise ValueError(f"{field}={split!r}: {script_args.dataset_name} has only {', '.join(dataset)}.")
    splits = [dataset[split] for split in wanted.values()]
    return splits[0], splits[1] if len(splits) > 1 else None
