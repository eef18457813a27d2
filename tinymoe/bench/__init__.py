"""Benchmarks: ratios against peers and bare matrix products, taken in one process, alternating, as medians."""
