"""Counts in HuggingFace's own fields, which transformers and TRL take as they are: to fail in words of a data loader,
or to train on nothing."""

from hf_lowmem.specs import check_integer, check_number

__all__ = ["check_counts"]

COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length")


def check_counts(args: object) -> None:
    """Check the fields of arguments that count sequences, tokens and steps, those that they have.

    Raises:
        TypeError, ValueError: naming the field and its value.
    """
    for name in COUNTS:
        if (value := getattr(args, name, None)) is not None:
            check_integer(name, value, low=1)
    if getattr(args, "max_steps", 1) <= 0 and (epochs := getattr(args, "num_train_epochs", None)) is not None:
        check_number("num_train_epochs", epochs, low=0.0, low_open=True)
