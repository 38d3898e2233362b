"""PPO of stable-baselines3 with a teacher's term in its loss, by the hooks that it offers: a policy class and a buffer class.

PPO's loss is  L_clip + c_v L_V - c_e mean(entropy)  on each mini-batch, where the policy's `evaluate_actions` says what the
entropy is. `TaughtPolicy` says  c_e H - lambda term  there, and PPO is told c_e = 1:

    L = L_clip + c_v L_V - c_e mean(H) + lambda mean(term)

which is RPD's (2503.05833), on every mini-batch of every epoch. No line of PPO is written again. The teacher is asked once for
each observation of an iteration. Without the reward (`opd`, `bc`) all advantages are 0, and so is L_clip; with `bc` it is the
teacher who acts.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from kibitz.config import RecipeError
from kibitz.control import terms
from kibitz.control.environments import Shape, vectorised
from kibitz.control.recipe import RPDRecipe, TaughtConfig
from kibitz.control.teachers import Answer, Teacher


@dataclass
class Lesson:
    """What the policy hears in a mini-batch. `weight` is lambda at the moment; `batch` the teacher's answers on the mini-batch,
    and `old_logp_B` what the acting policy gave the action that was taken."""

    method: TaughtConfig
    teacher: Teacher | None
    discrete: bool
    clip: float
    entropy: float
    weight: float = 0.0
    batch: Answer | None = None
    old_logp_B: np.ndarray | None = None
    heard: list[float] = field(default_factory=list)

    @property
    def loss(self) -> str:
        return self.method.loss or ("cross_entropy" if self.discrete else "mse")

    def term(self, distribution: Any, logp_B: torch.Tensor) -> torch.Tensor:
        """The teacher's term of each observation, [B], without lambda."""
        assert self.batch is not None and self.old_logp_B is not None, "a mini-batch comes from the buffer first"
        found = self._divergence(distribution.distribution, distribution)
        if self.loss == "kl":
            ratio_B = (logp_B - torch.from_numpy(self.old_logp_B)).exp()
            found = terms.proximal(found, ratio_B, self.clip)
        self.heard.append(float(found.detach().mean()))
        return found

    def _divergence(self, ours: Any, distribution: Any) -> torch.Tensor:
        action = torch.as_tensor(self.batch.action, dtype=torch.long if self.discrete else torch.float32)
        reverse = self.method.direction == "reverse"
        match self.loss:
            case "mse":
                return terms.squared(ours.mean, action)
            case "l1":
                return terms.absolute(ours.mean, action)
            case "bc":
                return -distribution.log_prob(action)
            case "cross_entropy":
                if self.batch.logp_BK is None:
                    return -distribution.log_prob(action)
                return terms.cross_entropy(ours.logits, torch.as_tensor(self.batch.logp_BK, dtype=torch.float32))
        if self.discrete:
            pair = (ours.logits, torch.as_tensor(self.batch.logp_BK, dtype=torch.float32))
            return terms.categorical_kl(*(pair if reverse else pair[::-1]))
        std_BA = torch.as_tensor(self.batch.std_BA, dtype=torch.float32)
        pairs = ((ours.mean, ours.stddev), (action, std_BA))
        first, second = pairs if reverse else pairs[::-1]
        return terms.gaussian_kl(*first, *second)


def check(lesson: Lesson, shape: Shape, answer: Answer | None) -> None:
    """RecipeError for a term that these actions, or this teacher, do not have. `answer` is the teacher's to a first question."""
    kind = "discrete" if shape.discrete else "continuous"
    allowed = ("cross_entropy", "kl", "bc") if shape.discrete else ("mse", "l1", "bc", "kl")
    if lesson.loss not in allowed:
        raise RecipeError(f"method.loss: {lesson.loss} is not for {kind} actions: write {', '.join(allowed)}")
    if lesson.loss == "kl" and answer is not None and answer.std_BA is None and answer.logp_BK is None:
        raise RecipeError(
            "method.loss: kl needs a distribution, and this teacher says actions only: write teacher.samples: 8, or another loss"
        )


class TaughtPolicy(ActorCriticPolicy):
    """SB3's actor-critic policy, which listens to a lesson while it learns."""

    def __init__(self, *args: Any, lesson: Lesson, **kwargs: Any):
        self.lesson, self.spoken = lesson, None
        super().__init__(*args, **kwargs)

    def forward(self, obs: torch.Tensor, deterministic: bool = False):
        """Action, value and log-probability; where the teacher plays, the teacher's action."""
        if self.lesson.method.type != "bc":
            return super().forward(obs, deterministic)
        assert self.lesson.teacher is not None
        actions = torch.as_tensor(self.lesson.teacher.answer(obs.cpu().numpy()).action)
        actions = actions.to(torch.long if self.lesson.discrete else torch.float32)
        values, logp_B, _ = super().evaluate_actions(obs, actions)
        return actions, values, logp_B

    def _get_action_dist_from_latent(self, latent_pi: torch.Tensor):
        self.spoken = super()._get_action_dist_from_latent(latent_pi)
        return self.spoken

    def evaluate_actions(self, obs: torch.Tensor, actions: torch.Tensor):
        """Values, log-probabilities, and what PPO takes for the entropy: c_e H - lambda term."""
        values, logp_B, entropy_B = super().evaluate_actions(obs, actions)
        assert entropy_B is not None, "Gaussians and categoricals have one"
        told_B = self.lesson.entropy * entropy_B
        if self.lesson.weight:
            told_B = told_B - self.lesson.weight * self.lesson.term(self.spoken, logp_B)
        return values, logp_B, told_B


class TaughtBuffer(RolloutBuffer):
    """SB3's rollout buffer, which has the teacher's answers beside the observations and hands them out with a mini-batch."""

    def __init__(self, *args: Any, lesson: Lesson, **kwargs: Any):
        self.lesson = lesson
        self.answers: Answer | None = None
        super().__init__(*args, **kwargs)

    def ask(self) -> None:
        """Ask the teacher about all observations, in the order in which mini-batches are drawn from them."""
        assert self.lesson.teacher is not None
        self.answers = self.lesson.teacher.answer(self.swap_and_flatten(self.observations))

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None):
        if self.answers is not None:
            rows = (self.answers.action, self.answers.std_BA, self.answers.logp_BK)
            self.lesson.batch = Answer(*(None if row is None else row[batch_inds] for row in rows))  # pyright: ignore[reportArgumentType]
            self.lesson.old_logp_B = self.log_probs[batch_inds].flatten()
        return super()._get_samples(batch_inds, env)


class Episodes(BaseCallback):
    """The returns of the episodes that ended since the last look."""

    def __init__(self):
        super().__init__()
        self.ended: list[float] = []

    def _on_step(self) -> bool:
        self.ended.extend(float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info)
        return True


class TaughtPPO(PPO):
    """PPO whose buffer asks the teacher between playing and learning. `seconds` are those of the last iteration."""

    def __init__(self, recipe: RPDRecipe, teacher: Teacher | None, env: Any, shape: Shape):
        ppo, method = recipe.ppo, recipe.method
        self.lesson = Lesson(method, teacher, shape.discrete, ppo.clip, ppo.entropy)
        self.rewarded = method.type in ("ppo", "rpd")
        self.seconds: dict[str, float] = {}
        super().__init__(
            TaughtPolicy, env, learning_rate=ppo.lr, n_steps=ppo.num_steps, batch_size=ppo.batch, n_epochs=ppo.epochs,
            gamma=ppo.gamma, gae_lambda=ppo.gae_lambda, clip_range=ppo.clip, ent_coef=1.0,
            vf_coef=ppo.value if self.rewarded else 0.0, max_grad_norm=ppo.max_grad_norm, target_kl=ppo.target_kl,
            policy_kwargs={**architecture(recipe), "lesson": self.lesson}, seed=recipe.seed, device="cpu",
            rollout_buffer_class=TaughtBuffer, rollout_buffer_kwargs={"lesson": self.lesson},
        )  # fmt: skip

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        begun = time.perf_counter()
        went_on = super().collect_rollouts(*args, **kwargs)
        played = time.perf_counter()
        if self.lesson.weight:
            self.rollout_buffer.ask()
        if not self.rewarded:
            self.rollout_buffer.advantages[:] = 0.0
        self.seconds = {"sampling": played - begun, "scoring": time.perf_counter() - played}
        return went_on

    def train(self) -> None:
        begun = time.perf_counter()
        self.lesson.heard.clear()
        super().train()
        self.seconds["training"] = time.perf_counter() - begun


def architecture(recipe: RPDRecipe) -> dict[str, Any]:
    return {"net_arch": list(recipe.ppo.hidden), "log_std_init": recipe.ppo.log_std}


def plain(recipe: RPDRecipe, env: Any) -> PPO:
    """PPO of stable-baselines3 as anybody would make it, for a file that needs no kibitz to be loaded."""
    ppo = recipe.ppo
    return PPO(
        "MlpPolicy", env, learning_rate=ppo.lr, n_steps=ppo.num_steps, batch_size=ppo.batch, n_epochs=ppo.epochs,
        gamma=ppo.gamma, gae_lambda=ppo.gae_lambda, clip_range=ppo.clip, ent_coef=ppo.entropy, vf_coef=ppo.value,
        max_grad_norm=ppo.max_grad_norm, target_kl=ppo.target_kl, policy_kwargs=architecture(recipe), device="cpu",
    )  # fmt: skip


def load_policy(folder: Path) -> PPO:
    """The policy of a run; of its file only weights are read, no pickle."""
    from kibitz.config import load_as
    from kibitz.control.folder import newest

    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"there is no run of `kibitz control` at {folder}")
    recipe, checkpoint = load_as(RPDRecipe, folder / "recipe.yaml"), newest(folder)
    if checkpoint is None:
        raise ValueError(f"{folder} holds no checkpoint of a policy: let its run go on by --resume")
    model = plain(recipe, vectorised(recipe.env))
    model.set_parameters(str(checkpoint / "policy.zip"), device="cpu")
    return model
