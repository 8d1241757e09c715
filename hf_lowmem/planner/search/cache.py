"""Searches of this process by what they were asked, so that the same question costs nothing again.

The key is all that a plan may depend on: the model's config, every field of the arguments but those that only say where
a run writes and how it is called, and which of them are open. In doubt a field is in it, and the search is made again.
"""

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping

from transformers import PreTrainedConfig

from hf_lowmem.planner.search.ranking import Search
from hf_lowmem.training.sft import LowMemSFTConfig

__all__ = ["cached", "key_of"]

MOST = 4  # searches that are kept
PASSING = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "lowmem_budget")
_searches: OrderedDict[str, Search] = OrderedDict()


def key_of(config: PreTrainedConfig, args: LowMemSFTConfig, asked: Mapping[str, object]) -> str:
    """A digest of a question; `asked`: the other arguments of `prepare`."""
    values = {f.name: _plain(getattr(args, f.name)) for f in dataclasses.fields(args) if f.name not in PASSING}
    question = {
        "config": [type(config).__qualname__, _plain(config)],
        "class": type(args).__qualname__,
        "values": values,
        "open": sorted(args.lowmem_open - set(PASSING)),
        "asked": {name: _plain(value) for name, value in asked.items() if name != "progress"},
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def cached(key: str, make: Callable[[], Search]) -> Search:
    """The search under a key, made where there is none."""
    if key not in _searches:
        _searches[key] = make()
    _searches.move_to_end(key)
    while len(_searches) > MOST:
        _searches.popitem(last=False)
    return _searches[key]


def _plain(value: object) -> str:
    to_dict = getattr(value, "to_dict", None)
    return f"{type(value).__qualname__} {to_dict()}" if to_dict is not None else repr(value)
