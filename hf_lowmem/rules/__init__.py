"""Settings that do not go together: the facts of a run, and one table of rules that every door asks.

A door is whatever takes settings: training arguments and their `lowmem_replace`, trainers, the callback, LowMemPlugin,
`hf-lowmem launch`, the planner, the glue for axolotl and LLaMA-Factory. Each says what it knows of the run (`Run`), and
calls `check`; the answer is the same sentence everywhere.
"""

from hf_lowmem.rules.run import Run
from hf_lowmem.rules.table import RULES, Rule, check

__all__ = ["RULES", "Rule", "Run", "check"]
