"""The weight of a training step before it runs.

```python
from hf_lowmem.planner import plan, search

args = LowMemSFTConfig("out", max_length=2048, per_device_train_batch_size=1, optim="apollo_mini")
print(plan("path/to/config.json", args, dtype="bfloat16"))
print(search("path/to/config.json", LowMemSFTConfig("out"), budget="24GiB", dtype="bfloat16").why)
```

    search      a budget: the fastest settings that fit, and the longest sequence
    simulate    plan(): the question, and the answer as a Plan
    step        the real trainer, taking two steps on fake tensors
    allocations the log of every storage: when it is born, when it dies
    again       updates that are alike, logged once
    quiet       a simulated run leaves no trace in the process
    parts       what each storage is, and the bytes of each part over time
    moments     the step as a list of moments; deep models from shallow ones
    parallel    several processes, as a formula
    accelerator how fake CPU tensors stand for a GPU's
    methods     SFT: which trainer, what batch
    modelled    what a plan would be wrong about, and so is refused
    models      configs, and models without weights
    words       an answer in words
"""

from hf_lowmem.planner.allocations import CannotSimulate
from hf_lowmem.planner.search.explain import NothingFits
from hf_lowmem.planner.search.fastest import longest, search
from hf_lowmem.planner.search.ranking import Found
from hf_lowmem.planner.simulate import Plan, Point, plan

__all__ = ["CannotSimulate", "Found", "NothingFits", "Plan", "Point", "longest", "plan", "search"]
