"""Benchmarks: each measures, returns rows, and compares within one run."""
