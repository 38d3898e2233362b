"""Policies instead of texts: a student that acts in an environment, and a teacher that says what it would have done there.

The idea is that of the other rooms, the student's own states and a teacher's word on each of them; no language model is known
here. Two things are made of it:

- `kibitz control rpd`: refined policy distillation, PPO with the teacher's action as a further term (`taught`), to go beyond a
  mediocre teacher; the same loop without the reward is on-policy distillation, without the student behaviour cloning.
- `kibitz control distil`: a tree, a linear rule or a formula that a person can read, by DAgger and VIPER (`viper`).

Shapes: `_B` observations of a batch, `_O` numbers of an observation, `_A` numbers of a continuous action, `_K` discrete actions.
It needs kibitz[control]; nothing of that is imported before a command begins.
"""

import importlib.util


def require() -> None:
    """Raise ValueError, with the command that helps, where the extra is not installed."""
    names = ("stable_baselines3", "gymnasium", "sklearn")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'kibitz[control]'")
