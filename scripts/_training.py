"""What the two training scripts share: arguments to data, model settings, the run itself."""

from typing import Any

import transformers
from datasets import load_dataset
from packaging.version import Version
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments


def load_splits(script_args: ScriptArguments, training_args: Any) -> tuple[Any, Any]:
    """The training split, and the test split where `eval_strategy` asks for evaluation.

    `dataset_name` is whatever `datasets.load_dataset` reads: a name on the hub, or a folder with `train.jsonl`.
    """
    if not script_args.dataset_name:
        raise ValueError("dataset_name is not set: give a dataset's name on the hub, or a folder with train.jsonl.")
    dataset: Any = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
    for split in (script_args.dataset_train_split, script_args.dataset_test_split):
        wanted = split == script_args.dataset_train_split or training_args.eval_strategy != "no"
        if wanted and split not in dataset:
            raise ValueError(
                f"{script_args.dataset_name} has no split {split!r}, only {', '.join(dataset)}. Set "
                "dataset_train_split or dataset_test_split."
            )
    test = dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None
    return dataset[script_args.dataset_train_split], test


def set_model_kwargs(training_args: Any, model_args: ModelConfig) -> None:
    """Hand the model's settings to TRL, which loads the model; those under `model_init_kwargs` win."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def load_tokenizer(training_args: Any, model_args: ModelConfig) -> Any:
    """The model's tokenizer."""
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is not set: give a model's name on the hub, or its folder.")
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )


def run(trainer: Any) -> None:
    """Train, from a checkpoint if one was named, and save."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model(trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()
