"""Streamed layers at work on a CPU: how much a long sequence takes, and how long a step."""
