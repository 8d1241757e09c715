"""Step products: whole training steps with products in 8 bits beside bf16, at 2,048, 8,192 and 16,384 tokens.

Eight decoder layers of a Llama-3-8B and its head, forward, backward and update. The update, AdamW with 8-bit states in
backward, is the same for all ways. torchao's recipes are for torch.compile, which their layers get here as ours do not.
"""

import dataclasses
from collections.abc import Iterator
from importlib import import_module

import torch
from transformers import LlamaForCausalLM

from hf_lowmem.activations.linears import linears_of_layers
from hf_lowmem.matmul import OwnedProducts
from hf_lowmem.matmul.spec import MatmulSpec
from parts.gpu.steps import Case
from parts.gpu.training import EIGHT_BIT, head, whole
from parts.record import Row
from parts.shapes import LLAMA_8B, TOY_SHAPE

WAYS = ("bf16", "fp8_row", "fp8_tensor", "int8_row")
THEIRS = ("torchao rowwise", "torchao tensorwise")


def multiply(model: LlamaForCausalLM, way: str) -> None:
    """Let the linears of a model's layers multiply as `way` says."""
    if way.startswith("torchao"):
        float8 = import_module("torchao.float8")
        emulate = model.device.type == "cpu"
        config = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(way.split()[1]), emulate=emulate)
        for layer in model.model.layers:
            float8.convert_to_float8_training(layer, config=config)
            if not emulate:
                layer.compile()
    elif way != "bf16":
        OwnedProducts(linears_of_layers(model), MatmulSpec(recipe=way, least=0))


def cases(device: torch.device, toy: bool, theirs: bool = False) -> Iterator[Case]:
    """Each length with all ways."""
    shape, layers, repeats = (TOY_SHAPE, 2, 1) if toy else (LLAMA_8B, 8, 4)
    for tokens in (32, 48) if toy else (2048, 8192, 16384):
        for way in THEIRS if theirs else WAYS:
            what = {"case": f"{layers} layers, 1 x {tokens} tokens", "way": way, "head": head()}
            spec: Row = {"way": "HuggingFace", "ours": {"name": "adamw", **EIGHT_BIT}, "in_backward": True}
            spec["multiply"] = lambda model, way=way: multiply(model, way)

            def measure(spec: Row = spec, tokens: int = tokens) -> Row:
                try:
                    return whole(spec, shape, layers, tokens, device, repeats)
                finally:
                    torch.compiler.reset()

            yield Case(what, measure, theirs=theirs)
