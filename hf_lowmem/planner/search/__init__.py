"""A budget: the fastest settings that fit in it, and the longest sequence that does.

fastest    search(), longest()
space      what may be chosen: the settings that the user left open
ranking    candidates in their order of preference, planned until one fits
estimate   an estimate for each of thousands of combinations, from a few simulations
updates    an optimizer's update apart from the rest of the step
cost       how long a combination takes on a nominal device
explain    the answer in sentences
budget     `lowmem_budget` in a trainer
"""

from hf_lowmem.planner.search.explain import NothingFits
from hf_lowmem.planner.search.fastest import longest, prepare, search
from hf_lowmem.planner.search.ranking import Found

__all__ = ["Found", "NothingFits", "longest", "prepare", "search"]
