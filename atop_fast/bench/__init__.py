"""Benchmarks against peers and plain PyTorch: `atop-fast bench`; docs/benchmarks.md states the method."""
