"""Parts of gpu_once.py, gpu_report.py and plan_vs_cuda.py: what only a CUDA device can show."""
