"""bitsandbytes' 4-bit base weights, on tensors without memory: what QLoRA holds.

transformers' own replacement of linear layers runs, and so do bitsandbytes' quantisation and its autograd Function: its
operators have shape rules. Two things are exchanged:

- `Params4bit` is a subclass of Tensor, which cannot be made of a fake tensor, which is one itself. A plain parameter
  with the same attributes stands for it. Nothing that a step runs asks for the class.
- Its matrix product is one operator to the outside, which dequantises the whole weight inside; `product_in_steps` is
  the same with the temporaries in the open. On CUDA that is what runs above 1,536 tokens; for fewer there may be a
  fused kernel, and the plan is up to one dequantised weight too high.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from hf_lowmem.memory.count import tensors_in

__all__ = ["HAS_BITSANDBYTES", "SEEN_THROUGH", "parameter_like", "quantization_of", "quantize", "state_of"]

# Whoever plans nothing of its need not have it.
HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None
NESTED_BLOCK = 256  # of bitsandbytes' second quantisation, that of the scales
# Of Params4bit, with its defaults.
ATTRIBUTES: dict[str, Any] = {
    "blocksize": 64,
    "compress_statistics": True,
    "quant_type": "fp4",
    "quant_state": None,
    "quant_storage": torch.uint8,
    "bnb_quantized": False,
    "module": None,
}


def quantization_of(config: PreTrainedConfig, given: Any) -> BitsAndBytesConfig | None:
    """The 4-bit settings: those given, else those that the config names, else None.

    Raises:
        ValueError: for any other kind of quantised weights.
    """
    where = "quantization_config" if given is not None else "the model's config: quantization_config"
    found = given if given is not None else getattr(config, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    if not values.get("load_in_4bit"):
        kind = "bitsandbytes' 8 bits" if values.get("load_in_8bit") else repr(values.get("quant_method"))
        raise ValueError(
            f"{where} asks for {kind}: of quantised base weights, only bitsandbytes' 4 bits can be planned. Plan with "
            "load_in_4bit, or, for a model that is dequantised when it is loaded, with a config without this entry."
        )
    return BitsAndBytesConfig(**values) if isinstance(found, dict) else found


def quantize(model: Any, quantization: BitsAndBytesConfig) -> Any:
    """`model`, fake or on the meta device, as `from_pretrained(quantization_config=...)` would have loaded it."""
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    quantizer = Bnb4BitHfQuantizer(quantization)
    skipped = quantizer.get_modules_to_not_convert(
        model, quantization.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    before = {name: m for name, m in model.named_modules() if getattr(m, "weight", None) is not None}
    with _stand_ins():
        replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=quantization)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            _fill(module, before[name])
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer = quantizer
    return model


def _fill(module: Any, plain: Any) -> None:
    """A Linear4bit with the quantised weight of `plain`, an nn.Linear or GPT-2's transposed Conv1D."""
    from bitsandbytes.functional import quantize_4bit

    empty = module.weight
    weight = plain.weight.detach()
    packed, state = quantize_4bit(
        weight if isinstance(plain, nn.Linear) else weight.T,
        blocksize=empty.blocksize,
        compress_statistics=empty.compress_statistics,
        quant_type=empty.quant_type,
        quant_storage=empty.quant_storage,
    )
    module.weight = _stand_in(packed, **_attributes(empty) | {"quant_state": state, "bnb_quantized": True})
    module.quant_state = state
    if plain.bias is not None:
        module.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)


def _stand_in(data: Tensor, requires_grad: bool = False, **attributes: Any) -> nn.Parameter:
    made = nn.Parameter(data, requires_grad=requires_grad)
    for name, value in (ATTRIBUTES | attributes).items():
        setattr(made, name, value)
    return made


def _attributes(p: Any) -> dict[str, Any]:
    return {name: getattr(p, name) for name in ATTRIBUTES}


def parameter_like(p: Tensor, data: Tensor) -> nn.Parameter:
    """A parameter of `data` that is 4-bit where `p` is."""
    if state_of(p):
        return _stand_in(data, **_attributes(p))
    return nn.Parameter(data, p.requires_grad)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    from bitsandbytes.nn import modules

    with mock.patch.object(modules, "Params4bit", _stand_in):
        yield


def state_of(p: Tensor) -> list[Tensor]:
    """The tensors that are kept beside a 4-bit weight: scales and tables. Empty for any other."""
    return list(tensors_in(getattr(p, "quant_state", None)))


def product_in_steps(
    x: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """x (*, k) times the transpose of a 4-bit weight of `shape` (n, k), by way of the whole weight in x's dtype."""
    operators: Any = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        assert absmax_code is not None
        assert absmax_offset is not None
        scales = operators.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, NESTED_BLOCK, torch.float32)
        absmax = scales + absmax_offset
        del scales
    weight = operators.dequantize_4bit.default(packed, absmax, blocksize, kind, shape, x.dtype)
    return nn.functional.linear(x, weight, bias)


# Operators whose temporaries count, and what shows them; on a CPU there are more, see accelerator.py.
SEEN_THROUGH: dict[object, Callable[..., object]] = {}
if HAS_BITSANDBYTES:
    import_module("bitsandbytes")  # which registers its operators
    SEEN_THROUGH[torch.ops.bitsandbytes.gemm_4bit.default] = product_in_steps
