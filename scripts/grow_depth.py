"""Grow a trained model in depth by stacking its layers: G_stack, arXiv 2405.15319.

    python scripts/grow_depth.py MODEL --factor 2 --output GROWN

Layers 1 .. L of MODEL become 1 .. L, 1 .. L, ..., `factor` times; embeddings, the last norm and the output head stay,
tied ones tied. So does the dtype. In the config, num_hidden_layers and every list with an entry a layer (layer_types,
for one) grow with them. GROWN is a model's folder that loads like any other, with a grow.json that says where it is
from; MODEL may be a Trainer's checkpoint, of which the model alone is read.

It is the start of a training, not its end: the grown model computes another function, and its loss jumps where it is
made. Warm the learning rate up anew, with a new optimizer. In the paper growth saves pre-training compute: factors of 2
to 4, grown after a small part of the tokens that are meant in all.

Not for fine-tuning: a model that you got trained loses by being grown, and a task's data are too few to win that back.
Not for models of which layers know their place (a rate or a window that depends on their number, indices of layers in
the config, shared keys and values): what would not be the same layer twice is refused by name.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

GROW = "grow.json"
PLACE = {"layer_idx", "layer_id", "training"}  # of what a layer is made of, what may differ from layer to layer


def grown_config(config: PreTrainedConfig, factor: int) -> PreTrainedConfig:
    """The config of the deeper model."""
    layers = config.num_hidden_layers
    lists = {
        name: [*value] * factor
        for name, value in config.to_dict().items()
        if "layer" in name and isinstance(value, list) and len(value) == layers
    }
    # By the constructor, which makes other fields from the depth where a model has such.
    kept = {name: value for name, value in config.to_diff_dict().items() if name != "model_type"}
    return type(config).from_dict(kept | lists | {"num_hidden_layers": factor * layers})


def layers_of(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList]:
    """Name and list of a decoder's layers. Raises ValueError where there is not one list of them."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    outer = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found if other != n)]
    if len(outer) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(outer)} lists of {depth} modules, where one list of layers was expected. "
            "Give a decoder of one kind of blocks."
        )
    return outer[0]


def stacked(state: dict[str, Tensor], prefix: str, depth: int, factor: int) -> dict[str, Tensor]:
    """The tensors of the deeper model, each its own copy."""
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(f"{prefix}."):
            made[name] = tensor
            continue
        number, rest = name.removeprefix(f"{prefix}.").split(".", 1)
        for turn in range(factor):
            made[f"{prefix}.{int(number) + turn * depth}.{rest}"] = tensor.clone()
    return made


def settings(layer: nn.Module) -> dict[str, object]:
    """What a layer is beside its tensors: classes, and plain attributes, by name."""
    found: dict[str, object] = {}
    for name, module in layer.named_modules():
        found[f"{name}: class"] = type(module).__name__
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | None)}
        found |= {f"{name}.{k}".lstrip("."): v for k, v in plain.items() if k not in PLACE}
    return found


def check_alike(layers: nn.ModuleList, depth: int) -> None:
    """Raise ValueError where a layer is not the one again of which it has the weights."""
    for i in range(depth, len(layers)):
        first, again = settings(layers[i % depth]), settings(layers[i])
        odd = [name for name in {**first, **again} if first.get(name) != again.get(name)]
        if odd:
            raise ValueError(
                f"layer {i} would have the weights of layer {i % depth}, but is not like it: {odd[0]} is "
                f"{again.get(odd[0])!r} and not {first.get(odd[0])!r}. This model's layers know their place, and "
                "cannot be stacked."
            )


def grow(source: str, factor: int) -> PreTrainedModel:
    """The deeper model, with weights, in memory beside the one that it is made from."""
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantised. Grow the plain model, and quantise the grown one.")
    if (Path(source) / "adapter_config.json").exists():
        raise ValueError(f"{source} holds an adapter. Merge it into its model first: PEFT's merge_and_unload().")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    depth = getattr(model.config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise ValueError(f"{type(model).__name__}'s config has no num_hidden_layers. Give a plain decoder.")
    prefix, _ = layers_of(model, depth)
    try:
        deeper = grown_config(model.config, factor)
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(deeper, dtype=model.dtype)
        check_alike(layers_of(made, factor * depth)[1], depth)
        made.load_state_dict(stacked(model.state_dict(), prefix, depth, factor), strict=True, assign=True)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{type(model).__name__} cannot be grown by {factor}: {error}") from error
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Grow what the command line names; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder, or its name on the hub")
    parser.add_argument("--factor", type=int, default=2, help="how often the layers are stacked; default: 2")
    parser.add_argument("--output", type=Path, required=True, help="a folder that there is not yet")
    asked = parser.parse_args(arguments)
    try:
        if asked.factor < 2:
            raise ValueError(f"--factor {asked.factor}: expected a whole number of at least 2.")
        if asked.output.exists():
            raise ValueError(f"--output {asked.output} is there already. Name a new folder.")
        made = grow(asked.model, asked.factor)
        made.save_pretrained(asked.output)
        if not Path(asked.model).is_dir() or any(Path(asked.model).glob("tokenizer*")):
            AutoTokenizer.from_pretrained(asked.model).save_pretrained(asked.output)
    except (ValueError, OSError) as error:
        print(f"grow_depth: {error}", file=sys.stderr)
        return 2
    depth, values = made.config.num_hidden_layers, made.num_parameters()
    (asked.output / GROW).write_text(json.dumps({"from": Path(asked.model).name, "factor": asked.factor}) + "\n")
    print(f"{asked.output}: {depth} layers in the place of {depth // asked.factor}, {values:,} parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
