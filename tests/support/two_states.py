"""An environment of two states: it shows which one it is in, pays for one action in each, and an episode has one step."""

import os
from typing import ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

RIGHT = (1, 0)
"""The action that is paid for in each state."""


class TwoStates(gymnasium.Env):
    observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.state = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(2))
        return self._seen(), {}

    def step(self, action):
        return self._seen(), float(action == RIGHT[self.state]), True, False, {}

    def _seen(self) -> np.ndarray:
        return np.eye(2, dtype=np.float32)[self.state]


class Aborting(TwoStates):
    """Ends the whole process when it is to draw itself."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 1}

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        os.abort()


class Goal(TwoStates):
    """Shows a goal beside what it sees, as robots' tasks do; 0 where the action is not the goal, else -1."""

    observation_space = spaces.Dict(
        {name: spaces.Box(0.0, 1.0, (1,), np.float32) for name in ("achieved_goal", "desired_goal", "observation")}
    )

    def step(self, action):
        return self._seen(), float(action != self.state) - 1.0, False, False, {}

    def _seen(self):
        goal = np.array([self.state], np.float32)
        return {"achieved_goal": 1 - goal, "desired_goal": goal, "observation": goal}


gymnasium.register("Goal-v0", entry_point=Goal, max_episode_steps=10)
gymnasium.register("TwoStates-v0", entry_point=TwoStates, max_episode_steps=10)
gymnasium.register("Aborting-v0", entry_point=Aborting, max_episode_steps=10)


def oracle(seen_BO: np.ndarray) -> np.ndarray:
    """A teacher that is right."""
    return np.array(RIGHT)[seen_BO.argmax(-1)]


def still(seen_BO: np.ndarray) -> np.ndarray:
    """A teacher of two joints that moves none."""
    return np.zeros((len(seen_BO), 2))


ASKED = [0]


def tiring(seen_BO: np.ndarray) -> np.ndarray:
    """A teacher that raises when it is asked the third time."""
    ASKED[0] += 1
    if ASKED[0] >= 3:
        raise RuntimeError("enough")
    return oracle(seen_BO)
