"""Evaluation: accuracy with intervals, both models' thoughts on every token, outside benchmarks, and a chat."""

from kibitz.evaluate.evaluate import Evaluator, evaluate_model

__all__ = ["Evaluator", "evaluate_model"]
