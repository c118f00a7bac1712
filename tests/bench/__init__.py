"""Benchmarks of the design's budgets: `python -m tests.bench` prints them in one table."""
