"""Facts that a model says of its parameters, which some rules need: which is the head, where a row is an output.

A method names the facts that it needs (`Method.FACTS`), and `parameter_groups` gives parameters that differ in one of
them groups of their own. A fact is a plain value in its group, for the reasons in optim/groups.py.

    role      "head": the output head, or what is tied to it; "embedding": of nn.Embedding; "linear": nn.Linear, GPT-2's
              Conv1D and fused experts; "other"
    experts   whether a parameter of three dimensions is a batch of matrices
    outputs   the dimension of the outputs: -2 of nn.Linear, -1 of Conv1D and of experts that are the other way round
    head      rows of one attention head, of a projection to queries or keys; None elsewhere
    splits    sizes along the outputs of matrices that were fused into one; None for one matrix
    bias      whether a parameter is one

Roles are read off modules, not off parts of names: "key" is in "monkey". But for two things no module says more than
what it calls its children, so these names are listed here: which of the projections inside a module with a `head_dim`
make queries and keys, and which are fused. A module of one's own says the latter by an attribute `split_sizes`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from hf_lowmem.optim.names import named_modules
from hf_lowmem.optim.state import Group
from hf_lowmem.specs import check_choice, check_flag, check_integer
from hf_lowmem.weights.forwards import is_conv1d

__all__ = ["CHECKS", "DEFAULTS", "ROLES", "facts_of", "linear_parameters"]

ROLES = ("linear", "embedding", "head", "other")

# Of bare parameters and groups that say nothing: matrices are linear weights.
DEFAULTS: Group = {
    "role": "linear",
    "experts": False,
    "outputs": -2,
    "head": None,
    "splits": None,
    "bias": False,
}

QUERIES_AND_KEYS = ("q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "wq", "wk")
HEAD_SIZES = ("head_dim", "attention_head_size", "dim_per_head")
FUSED_GATE = "gate_up_proj"

# What modules of fused experts call their number: nearly all of transformers' say `num_experts`, LongCat's and
# Inkling's the last three, others' code the rest.
COUNTS_OF_EXPERTS = (
    "num_experts",
    "n_experts",
    "num_local_experts",
    "num_routed_experts",
    "total_experts",
    "n_shared_experts",
)


def _check_role(label: str, value: object) -> None:
    check_choice(label, value, ROLES)


def _check_outputs(label: str, value: object) -> None:
    if value not in (-2, -1):
        raise ValueError(f"{label}={value!r}: must be -2, where a row is an output, or -1, where a column is.")


def _check_head(label: str, value: object) -> None:
    if value is not None:
        check_integer(label, value, low=1)


def _check_splits(label: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple):
        raise TypeError(f"{label}={value!r}: expected the sizes of what was fused, such as [64, 32, 32], or None.")
    for i, size in enumerate(cast(Sequence[object], value)):
        check_integer(f"{label}[{i}]", size, low=1)


CHECKS: dict[str, Callable[[str, object], None]] = {
    "role": _check_role,
    "experts": check_flag,
    "outputs": _check_outputs,
    "head": _check_head,
    "splits": _check_splits,
    "bias": check_flag,
}


def is_experts(module: nn.Module, p: Tensor) -> bool:
    """Whether a parameter of a module is a batch of matrices, one for each expert, and not any other three dimensions.

    The module must say so: it has the number of its experts, and that is the parameter's first dimension. Position
    embeddings, query tokens, convolutions (weight-normed ones too) and heads split off a projection have no such
    number. A module of one's own says it by an attribute `num_experts`.
    """
    if p.ndim != 3 or min(p.shape) < 2 or isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Bilinear):
        return False
    return any(getattr(module, count, None) == p.shape[0] for count in COUNTS_OF_EXPERTS)


def is_transposed(module: nn.Module) -> bool:
    """Whether fused experts are (inputs, outputs) each, as in GPT-OSS, and not (outputs, inputs) as nn.Linear is.

    transformers' experts say it by an attribute. Of those that do not (Llama 4's) the shapes do: what goes into the
    second matrix is half of what comes out of the first, gate and up.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    first, second = (getattr(module, name, None) for name in (FUSED_GATE, "down_proj"))
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim == second.ndim == 3):
        return False
    return first.shape[-1] == 2 * second.shape[-2] and first.shape[-2] == second.shape[-1]


def head_weights(head: nn.Module) -> Iterator[Tensor]:
    """The weights of an output head: its own, and the copies that PEFT keeps of it for each adapter, active or not."""
    weight = dict(head.named_parameters(recurse=False)).get("weight")
    if weight is not None:
        yield weight
    inside = [getattr(head, name, None) for name in ("original_module", "base_layer", "token_adapter")]
    copies = getattr(head, "modules_to_save", None)
    for module in (*inside, *(copies.values() if isinstance(copies, nn.ModuleDict) else ())):
        if isinstance(module, nn.Module):
            yield from head_weights(module)


def lookups(model: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the weights of embeddings and of output heads; a tied one is in both."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    heads: set[int] = set()
    for module in model.modules():  # a PEFT or DDP wrapper keeps the method on the model inside
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            heads |= {id(weight) for weight in head_weights(head)}
    return embeddings, heads


def linear_parameters(model: nn.Module) -> Iterator[tuple[str, str, str, nn.Module, nn.Parameter]]:
    """(path, name, parameter's own name, module, weight) of nn.Linear, transformers' Conv1D and fused 3-D experts.

    The output head and anything tied to an embedding are left out, of every adapter.
    """
    left = set[int]().union(*lookups(model))
    for path, name, module in named_modules(model):
        for own, p in module.named_parameters(recurse=False):
            linear = (isinstance(module, nn.Linear) or is_conv1d(module)) and own == "weight" and p.ndim == 2
            if (linear or is_experts(module, p)) and id(p) not in left:
                yield path, name, own, module, p


def facts_of(model: nn.Module) -> dict[int, Group]:
    """The facts of each of a model's parameters, by its id."""
    found: dict[int, Group] = {}
    for module in model.modules():
        for own, p in module.named_parameters(recurse=False):
            bias = own.endswith("bias")
            experts = is_experts(module, p)
            found.setdefault(id(p), DEFAULTS | {"role": "other", "bias": bias, "experts": experts})
    for _, _, own, module, p in linear_parameters(model):
        across = is_transposed(module) if p.ndim == 3 else is_conv1d(module)
        facts = found[id(p)]
        facts |= {"role": "linear", "outputs": -1 if across else -2}
        if p.ndim == 3 and own == FUSED_GATE and getattr(module, "is_concatenated", False) is True:
            facts["splits"] = _equal(p.shape[-1 if across else -2], 2)
    for parent in model.modules():
        for own, child in parent.named_children():
            weight = dict(child.named_parameters(recurse=False)).get("weight")
            if weight is not None and found[id(weight)]["role"] == "linear" and weight.ndim == 2:
                dim: int = found[id(weight)]["outputs"]
                outputs = weight.shape[dim]
                found[id(weight)] |= {
                    "head": _head(parent, own, outputs),
                    "splits": _splits(parent, own, child, outputs),
                }
    embeddings, heads = lookups(model)
    for ident in (embeddings | heads) & found.keys():
        found[ident]["role"] = "head" if ident in heads else "embedding"
    return found


def _head(parent: nn.Module, name: str, outputs: int) -> int | None:
    """Outputs of one head, where a child makes queries or keys."""
    if name not in QUERIES_AND_KEYS:
        return None
    sizes = [getattr(parent, size, None) for size in HEAD_SIZES]
    return next((size for size in sizes if isinstance(size, int) and size > 0 and outputs % size == 0), None)


def _splits(parent: nn.Module, name: str, child: nn.Module, outputs: int) -> list[int] | None:
    """Sizes of what was fused into a child's outputs, one after the other: queries, keys and values, or gate and up.

    What lies otherwise than one after the other (GPT-NeoX's heads of three) is one matrix here.
    """
    said = getattr(child, "split_sizes", None)
    if said is not None:
        if sum(said) != outputs:
            raise ValueError(
                f"split_sizes={said!r} of a {type(child).__name__} with {outputs} outputs: they must add up to these."
            )
        return [int(size) for size in said]
    if name == FUSED_GATE:
        return _equal(outputs, 2)
    if name == "c_attn" and outputs == 3 * getattr(parent, "split_size", 0):  # GPT-2's
        return _equal(outputs, 3)
    config, head = getattr(parent, "config", None), getattr(parent, "head_dim", None)
    if name == "qkv_proj" and isinstance(head, int):  # Phi-3's
        queries, keys = (getattr(config, f"num_{n}_heads", 0) * head for n in ("attention", "key_value"))
        if keys and queries + 2 * keys == outputs:
            return [queries, keys, keys]
    return None


def _equal(outputs: int, parts: int) -> list[int] | None:
    return [outputs // parts] * parts if outputs % parts == 0 else None
