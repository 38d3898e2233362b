"""Evaluation: accuracy with intervals, both models' thoughts on every token, outside benchmarks, and a chat."""
