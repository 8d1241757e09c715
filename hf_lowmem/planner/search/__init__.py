"""A budget: the fastest settings that fit in it, and the longest sequence that does.

fastest    search(), longest()
space      what may be chosen: the settings that the user left open
ranking    candidates in their order of preference, planned until one fits
estimate   an estimate for each of thousands of combinations, from a few simulations
updates    an optimizer's update apart from the rest of the step
cost       how long a combination takes on a nominal device
losses     what choices were measured to cost in loss, and the bound of `lowmem="auto"`
rested     weights at rest in int8, in an estimate
cache      searches by what they were asked
explain    the answer in sentences
auto       the answer in five lines
budget     `lowmem_budget` and `lowmem="auto"` in a trainer
"""

from hf_lowmem.planner.search.explain import NothingFits
from hf_lowmem.planner.search.fastest import longest, prepare, search
from hf_lowmem.planner.search.ranking import Found

__all__ = ["Found", "NothingFits", "longest", "prepare", "search"]
