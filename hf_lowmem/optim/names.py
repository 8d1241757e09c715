"""Names of parameters as the model's author gave them, without what wrappers put into them.

torch.compile calls what it wraps `_orig_mod`, DDP `module`, checkpoint_wrapper `_checkpoint_wrapped_module`. A name
starts a parameter's stream of random numbers and is compared when a state is loaded, and the same model must be the
same with and without a wrapper. But a model may have a submodule of its own that is called `module`. So where the
model is at hand a component is left out if a wrapper's class made it (`named_modules`), and where only names are
(`without_wrappers`), if nobody else gives such a name. What would make two names equal is never left out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from torch import nn

__all__ = ["named_modules", "named_parameters", "same_names", "stream_name", "without_wrappers"]

# What a wrapper calls the module inside, the names of the wrappers' classes, and the packages that have them.
WRAPPERS: dict[str, tuple[str, ...]] = {
    "_orig_mod": ("OptimizedModule",),
    "_checkpoint_wrapped_module": ("ActivationWrapper",),
    "_fsdp_wrapped_module": ("FullyShardedDataParallel",),
    "module": ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"),
}
PACKAGES = ("torch", "deepspeed")
# Those that no model has for a submodule of its own.
PRIVATE = tuple(name for name in WRAPPERS if name.startswith("_"))


def _wraps(module: nn.Module, child: str) -> bool:
    """Whether `module` is a wrapper that calls what is inside `child`. By name: to import torch._dynamo takes long."""
    return child in WRAPPERS and any(
        cls.__name__ in WRAPPERS[child] and cls.__module__.split(".")[0] in PACKAGES for cls in type(module).__mro__
    )


def named_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(path, name, module) of a model and all its submodules, each once: as torch names it, and without wrappers."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, path: str, name: str) -> Iterator[tuple[str, str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield path, name, module
        for child, inner in module.named_children():
            yield from walk(inner, _join(path, child), name if _wraps(module, child) else _join(name, child))

    return walk(model, "", "")


def named_parameters(model: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """(path, name, parameter) of each parameter of a model, a tied one once; the names are all different."""
    found: dict[int, tuple[str, str, nn.Parameter]] = {}
    for path, name, module in named_modules(model):
        for own, p in module.named_parameters(recurse=False):
            if id(p) not in found:
                found[id(p)] = _join(path, own), _join(name, own), p
    paths, names = [path for path, _, _ in found.values()], [name for _, name, _ in found.values()]
    kept = _distinct(paths, names)
    return [(path, name, p) for (path, _, p), name in zip(found.values(), kept, strict=True)]


def without_wrappers(names: Sequence[str]) -> list[str]:
    """Names of which nothing else is known, without the components that only torch's wrappers give."""
    return _distinct(names, [_without(name, PRIVATE) for name in names])


def stream_name(name: str, others: Sequence[str]) -> str:
    """Name from which a parameter's random numbers are derived: without DDP's `module.`, if all names begin with it."""
    depth = 0
    while all(other.startswith("module." * (depth + 1)) for other in others):
        depth += 1
    return name[len("module.") * depth :]


def same_names(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether both name the same parameters, in the same order, with or without wrappers."""
    ways: tuple[Callable[[Sequence[str]], list[str]], ...] = (
        list,
        without_wrappers,
        lambda names: [stream_name(name, names) for name in without_wrappers(names)],
        lambda names: _distinct(names, [_without(name, tuple(WRAPPERS)) for name in names]),
    )
    return any(way(ours) == way(theirs) for way in ways)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _without(name: str, components: tuple[str, ...]) -> str:
    return ".".join(part for part in name.split(".") if part not in components)


def _distinct(full: Sequence[str], short: Sequence[str]) -> list[str]:
    """The short names, but the full ones of those that would be equal; all full ones if that does not help."""
    count = Counter(short)
    mixed = [b if count[b] == 1 and b else a for a, b in zip(full, short, strict=True)]
    return mixed if len(set(mixed)) == len(mixed) else list(full)
