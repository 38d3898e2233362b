"""One command per table: `python -m benchmarks.NAME`. benchmarks/README.md says how to read each."""
