"""Training from the command line: from flags, or a YAML file, to a trained, saved model.

What a user can put right is answered in words, with exit status 2: whatever is wrong with flags, files, settings, model
or data before training begins, and what hf_lowmem refuses later. Other errors keep their traceback.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from packaging.version import Version
from transformers import AutoTokenizer, Trainer
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

import hf_lowmem
from hf_lowmem.cli.parsing import Parser
from hf_lowmem.cli.wrong import WrongCommand
from hf_lowmem.training.callbacks import LowMemCallback

Given = dict[str, Any]  # keyword arguments of a trainer


def train(
    config_class: type,
    trainer_class: Callable[..., Trainer],
    first_stage: type | None = None,
    *,
    arguments: Sequence[str] | None = None,
    command: str | None = None,
    save: bool = True,
) -> int:
    """Parse, load, train (from a checkpoint if one is named), report and save; the exit status.

    Args:
        config_class, trainer_class: what makes the arguments, and trains.
        first_stage: a dataclass of more flags, whose `run` takes the keyword arguments of a trainer and gives back the
            model to go on from.
        arguments: of the command line. Default: the process's.
        command: what the usage line calls it. Default: the process's name.
        save: whether the model is saved, and pushed where that is asked for.
    """
    parser = Parser(tuple(filter(None, (ScriptArguments, config_class, ModelConfig, first_stage))), prog=command)
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        parser.set_defaults(bf16=False)  # TRL's own default, which transformers refuses without a GPU
    try:
        _train(parser, trainer_class, arguments, save=save)
    except WrongCommand as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def answered_in_words(*, begun: bool = False) -> Iterator[None]:
    """Turn errors that a user can put right into WrongCommand.

    Args:
        begun: training has begun, so it is those alone that hf_lowmem raises, with their remedies. Before it, those of
            model and data as well.
    """
    try:
        yield
    except WrongCommand:
        raise
    except (OSError, TypeError, ValueError) as error:
        if not _is_ours(error) and (begun or isinstance(error, TypeError)):
            raise
        raise WrongCommand(str(error)) from error


@contextmanager
def _named(field: str, value: str) -> Iterator[None]:
    """Errors of what loads something begin with the field that asked for it."""
    try:
        yield
    except (
        OSError,
        ValueError,
        StopIteration,
        DatasetGenerationError,
    ) as error:  # of no rows, of rows that are no JSON
        found = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        first = ["it has no rows."] if isinstance(error, StopIteration) else str(found).strip().splitlines()
        raise ValueError(
            f"{field}={value!r}: {first[0] if first else type(error).__name__} Give a name on the hub, or a folder."
        ) from error


def _is_ours(error: Exception) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and Path(place.tb_frame.f_code.co_filename).is_relative_to(Path(hf_lowmem.__file__).parent)


def _train(
    parser: Parser, trainer_class: Callable[..., Trainer], arguments: Sequence[str] | None, *, save: bool
) -> None:
    script_args, training_args, model_args, *stages = parser.read(arguments)
    asked = training_args.resume_from_checkpoint  # whose words for a switch no parser knows
    training_args.resume_from_checkpoint = {"true": True, "false": None}.get(str(asked).lower(), asked)
    with answered_in_words():
        given = _loaded(script_args, training_args, model_args)
    with answered_in_words(begun=True):
        for stage in stages:
            given["model"] = stage.run(**given)
    with answered_in_words():
        trainer = _made(trainer_class, given)
    with answered_in_words(begun=True):
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if save:
        trainer.save_model(training_args.output_dir)
        if training_args.push_to_hub:
            trainer.push_to_hub()
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()


def _made(trainer_class: Callable[..., Trainer], given: Given) -> Trainer:
    """The trainer. Raises ValueError for data without a column that it reads, or conversations without a template."""
    try:
        return trainer_class(**given, callbacks=[LowMemCallback()])
    except ValueError as error:
        if "chat_template is not set" not in str(error):
            raise
        field = hasattr(given["args"], "chat_template_path")
        raise ValueError(
            f"the data are conversations, and the tokenizer of {given['model']} has no chat template: it is a base "
            "model's. Take its instruct variant"
            + (", or another model's template by --chat_template_path MODEL" if field else "")
            + f", or data of plain text ({'text, or prompt and completion' if field else 'prompt, chosen, rejected'})."
        ) from error
    except KeyError as error:
        columns = getattr(given["train_dataset"], "column_names", None) or []
        if not error.args or error.args[0] in columns:
            raise
        raise ValueError(
            f"the data has no column {error.args[0]!r}; it has {', '.join(columns)}. `hf-lowmem dpo` reads chosen and "
            "rejected, with or without prompt; `hf-lowmem sft` text, messages, or prompt and completion."
        ) from error


def _loaded(script_args: ScriptArguments, training_args: Any, model_args: ModelConfig) -> Given:
    """The keyword arguments of a trainer."""
    if not model_args.model_name_or_path:
        raise ValueError(
            "model_name_or_path is not set: give a model's name on the hub, or its folder: --model_name_or_path MODEL."
        )
    # TRL loads the model, by these and what `model_init_kwargs` says beside or against them.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    with _named("model_name_or_path", model_args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    train, test = load_splits(script_args, training_args)
    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def load_splits(script_args: ScriptArguments, training_args: Any) -> tuple[Any, Any]:
    """The training split, and the test split where `eval_strategy` asks for evaluation.

    `dataset_name` is whatever `datasets.load_dataset` reads: a name on the hub, or a folder with `train.jsonl`.
    """
    if not script_args.dataset_name:
        raise ValueError(
            "dataset_name is not set: give a dataset's name on the hub, or a folder with train.jsonl: "
            "--dataset_name DATA."
        )
    with _named("dataset_name", script_args.dataset_name):
        dataset: Any = load_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    wanted = {"dataset_train_split": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        wanted["dataset_test_split"] = script_args.dataset_test_split
    for field, split in wanted.items():
        if split not in dataset:
            rest = ", or leave eval_strategy unset" if field == "dataset_test_split" else ""
            raise ValueError(
                f"{field}={split!r}: {script_args.dataset_name} has only {', '.join(dataset)}. Set --{field} to one of "
                f"them{rest}."
            )
    splits = [dataset[split] for split in wanted.values()]
    return splits[0], splits[1] if len(splits) > 1 else None
