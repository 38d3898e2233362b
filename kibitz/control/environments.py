"""Environments of Gymnasium: made, vectorised, with sparse reward; what their actions may be; episodes played with fixed seeds.

The one place that imports gymnasium.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import Error as GymnasiumError
from gymnasium.error import NameNotFound
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from kibitz.control.recipe import EnvConfig

Act = Callable[[np.ndarray], np.ndarray]
"""From observations [B, O] to actions, [B, A] or, of a discrete environment, [B]."""
TOGETHER = 20
"""Episodes that are played side by side."""


@dataclass(frozen=True)
class Shape:
    """What an environment takes and gives. `num_actions` is 0 of continuous actions, whose bounds are `low_A` and `high_A`."""

    num_observed: int
    num_actions: int
    low_A: np.ndarray
    high_A: np.ndarray

    @property
    def discrete(self) -> bool:
        return self.num_actions > 0

    @property
    def num_outputs(self) -> int:
        """Numbers that a policy computes: one for each discrete action, or for each number of a continuous one."""
        return self.num_actions or len(self.low_A)


class SparseReward(gymnasium.Wrapper):
    """Reward 1 where the dense reward, or a number of the step's info, is at least a threshold, else 0."""

    def __init__(self, env: gymnasium.Env, above: float, key: str | None):
        super().__init__(env)
        self.above, self.key = above, key

    def step(self, action: Any):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.key is not None and self.key not in info:
            raise ValueError(
                f"env.sparse_info: a step's info has no {self.key!r}; it has {', '.join(info) or 'nothing'}"
            )
        value = float(reward) if self.key is None else float(info[self.key])
        return observation, float(value >= self.above), terminated, truncated, info


def make(config: EnvConfig, **options: Any) -> gymnasium.Env:
    """One environment; ValueError for one that does not exist or that kibitz cannot play."""
    try:
        env = gymnasium.make(config.id, **config.options, **options)
    except (GymnasiumError, ImportError, TypeError) as error:
        words = " ".join(str(error).split())
        if isinstance(error, NameNotFound) and "Did you mean" not in words:
            words += " One of another package is named with it, such as gymnasium_robotics:FetchReach-v4."
        raise ValueError(f"env.id: {config.id} cannot be made: {words}") from None
    if isinstance(env.observation_space, spaces.Dict):  # as of robots with a goal: what is seen, what is wanted
        env = gymnasium.wrappers.FlattenObservation(env)
    if config.sparse_above is not None:
        env = SparseReward(env, config.sparse_above, config.sparse_info)
    shape_of(env, config.id)
    return env


def shape_of(env: Any, name: str) -> Shape:
    """The shape of an environment; ValueError for observations that are no vector and actions of another kind."""
    observed, action = env.observation_space, env.action_space
    if not isinstance(observed, spaces.Box) or len(observed.shape) != 1:
        raise ValueError(
            f"env.id: {name} shows {observed}, and kibitz plays with vectors of numbers only: choose another environment, or "
            "wrap it by gymnasium.wrappers.FlattenObservation and register that"
        )
    if isinstance(action, spaces.Discrete) and action.start == 0:
        return Shape(observed.shape[0], int(action.n), np.empty(0), np.empty(0))
    bounded = isinstance(action, spaces.Box) and len(action.shape) == 1 and action.is_bounded()
    if not bounded:
        raise ValueError(f"env.id: {name} takes {action}, and kibitz plays Discrete or a bounded Box of one dimension")
    return Shape(observed.shape[0], 0, action.low.astype(np.float64), action.high.astype(np.float64))


def vectorised(config: EnvConfig) -> VecMonitor:
    """Copies in one process, as stable-baselines3 wants them, with the return of each episode noted."""
    return VecMonitor(DummyVecEnv([lambda: make(config) for _ in range(config.num_envs)]))


@dataclass(frozen=True)
class Visit:
    """A step of an episode: the observation, the action that was taken, the reward, and the number of the episode."""

    episode: int
    observation_O: np.ndarray
    action: Any
    reward: float


def visits(act: Act, config: EnvConfig, seeds: Sequence[int]) -> Iterator[list[Visit]]:
    """Play an episode for each seed, many side by side, and give the steps of all at a moment. An episode depends on its seed
    and the actions alone."""
    for first in range(0, len(seeds), TOGETHER):
        chunk = seeds[first : first + TOGETHER]
        envs = [make(config) for _ in chunk]
        now = {place: envs[place].reset(seed=int(seed))[0] for place, seed in enumerate(chunk)}
        while now:
            places = list(now)
            actions = act(np.stack([now[place] for place in places]))
            moment = []
            for place, action in zip(places, actions, strict=True):
                seen, reward, terminated, truncated, _ = envs[place].step(action)
                moment.append(Visit(first + place, now[place], action, float(reward)))
                now[place] = seen
                if terminated or truncated:
                    del now[place]
            yield moment
        for env in envs:
            env.close()


def returns(act: Act, config: EnvConfig, seeds: Sequence[int]) -> np.ndarray:
    """The sum of rewards of each episode, [number of seeds]."""
    total = np.zeros(len(seeds))
    for moment in visits(act, config, seeds):
        for visit in moment:
            total[visit.episode] += visit.reward
    return total


def seeds_of(name: str, seed: int, num: int) -> list[int]:
    """Seeds of episodes for one purpose; those of different names and seeds share none but by chance."""
    words = np.random.SeedSequence([seed, *name.encode()]).generate_state(num)
    return [int(word) for word in words]
