"""Workloads that measure the running platform: `python -m benchmarks.<name> --json`."""
