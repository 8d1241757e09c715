"""Does as test_imported.py says."""

import os
import signal
import sys

if __name__ == "__main__":
    if sys.argv[1] == "fail":
        raise ValueError("as it was told")
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print(*sys.argv[1:], os.environ.get("TOLD"), os.getcwd())
