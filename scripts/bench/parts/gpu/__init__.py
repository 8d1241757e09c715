"""Parts of gpu.py and plan_vs_cuda.py: what only a CUDA device can show."""
