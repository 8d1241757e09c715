"""Parts of kernel_targets.py: every kernel compiled for GPUs that are not there."""
