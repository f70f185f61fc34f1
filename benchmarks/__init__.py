"""Measurements behind the tables of README.md and docs/results.md; ``python -m benchmarks`` explains itself."""
