"""`python -m hf_lowmem.cli.trial METHOD FLAGS`: a training of which the report is kept and no model; see `against`."""

import sys

from hf_lowmem.cli.train import train

if __name__ == "__main__":
    method, *flags = sys.argv[1:]
    if method == "dpo":
        from hf_lowmem.training.dpo import LowMemDPOConfig, LowMemDPOTrainer

        status = train(LowMemDPOConfig, LowMemDPOTrainer, arguments=flags, command="hf-lowmem dpo", save=False)
    else:
        from hf_lowmem.training.sft import LowMemSFTConfig, LowMemSFTTrainer

        status = train(LowMemSFTConfig, LowMemSFTTrainer, arguments=flags, command="hf-lowmem sft", save=False)
    sys.exit(status)
