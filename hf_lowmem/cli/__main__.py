"""`python -m hf_lowmem.cli ...` is `hf-lowmem ...`."""

import sys

from hf_lowmem.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
