"""Collapse guards: each watches the numbers of a run for one way to go wrong, and says what helps.

    guards = Guards(recipe.guards)
    for alarm in guards.watch_step(row):  # a row of metrics.jsonl
        print(alarm.name, alarm.symptom, alarm.remedy)

A guard compares medians of windows, never single steps: the last `window` steps with the first `early` ones, or with
the best window since. It speaks when the change exceeds both its own threshold and the noise of the series, once per
problem, and again only after the problem has been gone for a whole window. A number that a run does not log switches
off the guards that need it.
"""

from kibitz.training.guards.rollouts import repetition, rollout_metrics
from kibitz.training.guards.watch import GUARDS, Alarm, Guards

__all__ = ["GUARDS", "Alarm", "Guards", "repetition", "rollout_metrics"]
