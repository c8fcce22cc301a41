"""Benchmarks. Each runs its baseline beside it in the same run: `python -m bench.NAME [--json]`."""
