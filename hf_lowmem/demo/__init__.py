"""The demo: what low-memory training keeps and what it costs, on a real model and real text.

``data`` reads Shakespeare, ``model`` the pretrained weights, ``worker`` trains one run in a process of its
own, ``score`` is the referee that all runs share, ``report``, ``plot`` and ``card`` show the result,
``run`` is the order of it all. Everything comes from installed packages: no hub, no download.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

# peft imports bitsandbytes, which on a CPU recommends an optional package each time it is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def package_folder(package: str, remedy: str) -> Path:
    """The folder of an installed package, found without executing it.

    Both packages that the demo reads are data to it. Their own code imports a stack of other things (an
    inference engine, an HTML renderer) that a training demo does not need, so it is never run.

    Raises:
        ModuleNotFoundError: the package is not installed; the message carries ``remedy``.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo reads the package {package!r}, which is not installed: {remedy}")
    return Path(spec.submodule_search_locations[0])
