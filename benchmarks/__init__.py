"""Measurements behind the tables of README.md; ``python -m benchmarks`` explains itself."""
