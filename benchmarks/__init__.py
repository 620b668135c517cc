"""Benchmarks: each prints ratios against a plain reference that runs in the same process, in turn with Esper."""
