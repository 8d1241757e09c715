"""`python -m tests.house.write [private] [public] [counts]`: bring the lists of this folder up to date; all by default.

Read the difference afterwards: it is what a reviewer is asked to agree with.
"""

import sys
from importlib import import_module

LISTS = {"private": "tests.house.private", "public": "tests.house.public", "counts": "tests.house.counts"}

if __name__ == "__main__":
    for name in sys.argv[1:] or LISTS:
        import_module(LISTS[name]).write()
