"""A model without weights: its config from wherever the user has it, its modules inside a fake mode."""

import contextlib
import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.matmul import code_frozen
from hf_lowmem.matmul.spec import MatmulSpec
from hf_lowmem.planner.four_bit import quantize, state_of
from hf_lowmem.weights import at_rest

__all__ = [
    "DTYPES",
    "Shape",
    "find_config",
    "layer_count",
    "make_model",
    "meta_model",
    "period_of",
    "shapes_of",
    "sharing_of",
    "token_maker",
    "with_depth",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """One parameter: the number of its decoder layer or None, its shape, bytes a value, trained or not; and the bytes
    that are kept beside it: the scales of a 4-bit weight, which has half a byte a value, or of one at rest in int8."""

    layer: int | None
    shape: tuple[int, ...]
    itemsize: float
    trained: bool
    beside: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return round(self.numel * self.itemsize) + self.beside

    def shard(self, world: int) -> int:
        """Values of the largest shard."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // world) * (self.numel // max(rows, 1))


def shapes_of(model: Any, stack: str) -> list[Shape]:
    """The parameters of a model; `stack`: name of its list of decoder layers."""
    made = []
    for name, p in model.named_parameters():
        number = name.removeprefix(f"{stack}.").partition(".")[0]
        layer = int(number) if name.startswith(f"{stack}.") and number.isdigit() else None
        if (rest := at_rest(p)) is not None:  # its parameter has one value
            beside = rest.scale.nbytes + p.element_size()
            made.append(Shape(layer, tuple(p.shape), rest.codes.element_size(), p.requires_grad, beside))
            continue
        kept = state_of(p)
        beside = sum(t.untyped_storage().nbytes() for t in kept)
        shape = p.quant_state.shape if kept else p.shape
        itemsize = p.numel() * p.element_size() / math.prod(shape) if kept else p.element_size()
        made.append(Shape(layer, tuple(shape), itemsize, p.requires_grad, beside))
    return made


def find_config(
    model: str | Path | PreTrainedConfig, init: Mapping[str, Any] | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a model folder, of a config.json, or of a hub id in the local cache; of a config, a copy.

    Nothing is downloaded. `init`: what `model_init_kwargs` changes of it, as in `from_pretrained`. The names of the
    model's own code are left out unless that is trusted.

    Raises:
        ValueError: where there is none, or of a kind that transformers does not know.
    """
    made = copy.deepcopy(model) if isinstance(model, PreTrainedConfig) else _read_config(model, trust_remote_code)
    if not trust_remote_code:
        vars(made).pop("auto_map", None)
    for name, value in (init or {}).items():
        if name == "experts_implementation":
            made._experts_implementation = value
        elif name not in ("dtype", "attn_implementation", "quantization_config") and hasattr(made, name):
            setattr(made, name, value)
    return made


def _read_config(model: str | Path, trust_remote_code: bool) -> PreTrainedConfig:
    path = Path(model)
    if path.is_file():
        values = json.loads(path.read_text())
        kind = values.pop("model_type", None)
        if kind is None:
            raise ValueError(f"model={str(model)!r} has no model_type: it is not the config.json of a model.")
        try:
            return AutoConfig.for_model(kind, **values)
        except (KeyError, ValueError) as error:
            raise ValueError(f"model={str(model)!r}: model_type {kind!r} is not one of transformers'.") from error
    try:
        return AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"model={str(model)!r} is no folder with a config.json, no such file, and no hub id in the local cache. "
            "The plan needs the config alone: `hf download ID config.json` puts it there."
        ) from error


def make_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, quantization: Any = None) -> Any:
    """The causal language model of `config`, in train mode, its weights of `dtype`, or of 4 bits where `quantization`
    says so. Call it inside a fake mode.

    The flash kernels need a GPU and their packages; sdpa keeps the same for backward and stands for them.

    Raises:
        ValueError: for a model that is no causal language model, or that sdpa cannot stand in for.
    """
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is None and not hasattr(config, "auto_map"):
        raise ValueError(
            f"model_type {config.model_type!r} has no causal language model in transformers, which is what is planned."
        )
    if attention not in (None, "eager"):
        if not getattr(cls, "_supports_sdpa", True):
            raise ValueError(
                f"attn_implementation={attention!r} cannot be planned for model_type {config.model_type!r}, which has "
                "no sdpa that could stand for it. Leave it unset, or plan with 'eager'."
            )
        attention = "sdpa"
    with _default(dtype):
        # A copy: a trainer writes its tokenizer's ids into its model's config.
        model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=hasattr(config, "auto_map"),
        )
    return (model if quantization is None else quantize(model, quantization)).train()


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Make modules of `dtype`. Cast afterwards, a fake parameter would have to be swapped for another, which fake
    parameters cannot be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def meta_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    peft_config: Any,
    quantization: Any = None,
    matmul: MatmulSpec | None = None,
) -> Any:
    """The whole model without even fake weights: its parameters' names, shapes and dtypes.

    matmul: products in 8 bits, of which a frozen model keeps codes alone; None where it keeps its weights.
    """
    with torch.device("meta"), _default(dtype):
        model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype,
            attn_implementation="eager",  # a config may name a kernel of the hub's, which would be fetched and run
            trust_remote_code=hasattr(config, "auto_map"),
        )
    if quantization is not None:
        model = quantize(model, quantization)
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"), _default(dtype):
            model = get_peft_model(model, copy.deepcopy(peft_config))
    if quantization is not None:
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16) if p.requires_grad else p.data  # as TRL casts adapters of 4-bit weights
    if matmul is not None and peft_config is not None:
        code_frozen(linears_of_layers(model), matmul, model)
    return model


def layer_count(config: PreTrainedConfig) -> int:
    """Raises ValueError for a config that does not say how many layers there are."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise ValueError(f"model_type {config.model_type!r}: its config has no num_hidden_layers.")
    return count


def _per_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The lists of a config that have an entry for each layer."""
    count = layer_count(config)
    values = vars(config.get_text_config())
    return {k: list(v) for k, v in values.items() if isinstance(v, list | tuple) and len(v) == count}


def period_of(config: PreTrainedConfig) -> int:
    """Number of layers after which their kinds repeat: 1 where all are alike, 6 for Gemma 3."""
    count, lists = layer_count(config), list(_per_layer(config).values())
    return next(p for p in range(1, count + 1) if all(v[i] == v[i - p] for v in lists for i in range(p, count)))


def sharing_of(activations: str | None) -> list[int]:
    """Numbers of layers that share one input, in each part of `lowmem_activations` that says so."""
    return [int(n) for n in re.findall(r"/\s*(\d+)", activations or "")]


def with_depth(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config of a model with the first `layers` layers only."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for name, values in _per_layer(config).items():
        setattr(text, name, values[:layers])
    text.num_hidden_layers = layers
    return made


def token_maker() -> Any:
    """The least that TRL's trainers accept for a tokenizer. The planned batch is made of ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
