"""Recipes of `kibitz control`: what is played, who teaches, what is learnt. Checked before anything is loaded; no torch here."""

from typing import Literal

from pydantic import Field, model_validator

from kibitz.config import Section

TeacherKind = Literal["sb3", "run", "python", "url"]
TEACHER_KINDS: tuple[TeacherKind, ...] = ("sb3", "run", "python", "url")


class EnvConfig(Section):
    """A Gymnasium environment, vectorised in one process."""

    id: str = Field(description="Such as Pendulum-v1, CartPole-v1, Reacher-v5; or package.module:Name-v0.")
    num_envs: int = Field(8, ge=1, description="Copies that are stepped together. 8: stable-baselines3's zoo.")
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Arguments of gymnasium.make."
    )
    sparse_above: float | None = Field(
        None, description="Sparse reward: 1 where what is looked at is at least this, else 0."
    )
    sparse_info: str | None = Field(
        None, description="What sparse_above looks at: a key of the step's info; without it the reward itself."
    )

    @model_validator(mode="after")
    def _sparse(self) -> "EnvConfig":
        if self.sparse_info is not None and self.sparse_above is None:
            raise ValueError(
                "sparse_info says what is looked at: write sparse_above, the value that it must reach, too"
            )
        return self


class PolicyTeacherConfig(Section):
    """Who says what it would have done: one of sb3, run, python, url."""

    sb3: str | None = Field(None, description="A file of stable-baselines3.")
    algorithm: Literal["A2C", "DQN", "DDPG", "PPO", "SAC", "TD3"] = Field("PPO", description="That wrote the sb3 file.")
    trust: bool = Field(
        False,
        description="Of sb3 and python: run the code that they hold. A file of stable-baselines3 has pickles in it.",
    )
    run: str | None = Field(None, description="Run folder of `kibitz control rpd` or `distil`.")
    python: str | None = Field(None, description="module:function, from observations [B, O] to actions [B, A] or [B].")
    url: str | None = Field(
        None, description='A server: POST of {"observations": [B, O]} is answered by {"actions": [B, A] or [B]}.'
    )
    samples: int = Field(
        1,
        ge=1,
        description="Of a teacher without a distribution: answers that a Gaussian or shares are fitted to (RPD).",
    )
    noise: float = Field(0.0, ge=0, description="Deviation of Gaussian noise on its actions, in units of their range.")
    seed: int = Field(0, description="Of noise and samples.")
    batch: int = Field(256, ge=1, description="Observations in one request.")
    per_second: float | None = Field(None, gt=0, description="Requests a second at most. null: as they come.")
    timeout: float = Field(10.0, gt=0, description="Seconds for an answer; a teacher that is slower ends the run.")
    retries: int = Field(2, ge=0, description="Of a request that found no server.")
    cache: bool = Field(True, description="Ask url and python once for each observation of one run.")

    @model_validator(mode="after")
    def _one(self) -> "PolicyTeacherConfig":
        given = [kind for kind in TEACHER_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a teacher is one of {', '.join(TEACHER_KINDS)}; this one has {', '.join(given) or 'none'}"
            )
        if given[0] in ("sb3", "python") and not self.trust:
            raise ValueError(f"{given[0]} runs code that stands in the file: write trust: true if you trust it")
        return self

    @property
    def kind(self) -> TeacherKind:
        return next(kind for kind in TEACHER_KINDS if getattr(self, kind) is not None)


class TaughtConfig(Section):
    """What the policy learns from. Each arm is the same loop with parts left out."""

    type: Literal["ppo", "bc", "opd", "rpd"] = Field(
        "rpd",
        description="ppo: reward alone; bc: the teacher plays, no reward; opd: the student plays, no reward; rpd: both.",
    )
    loss: Literal["mse", "l1", "bc", "kl", "cross_entropy"] | None = Field(
        None,
        description="The teacher's term. null: mse of continuous actions (RPD 2503.05833), cross_entropy of discrete ones.",
    )
    weight: float = Field(1.0, ge=0, description="Lambda. 1: RPD.")
    anneal: float | None = Field(
        None, gt=0, le=1, description="Share of the steps over which lambda falls to 0 by a cosine, then stays (RPD)."
    )
    direction: Literal["reverse", "forward"] = Field(
        "reverse",
        description="Of kl. reverse: KL(student, teacher), as in RPD; forward: as in PPD's code (2407.15134).",
    )

    @model_validator(mode="after")
    def _fits(self) -> "TaughtConfig":
        if self.type == "ppo" and (self.loss is not None or self.anneal is not None):
            raise ValueError("ppo hears no teacher: leave out loss and anneal, or write type: rpd")
        return self


class PPOConfig(Section):
    """Of stable-baselines3's PPO; its defaults, where nothing else is said."""

    lr: float = Field(3e-4, gt=0, description="Adam. 3e-4: PPO (1707.06347), RPD.")
    num_steps: int = Field(256, ge=2, description="Of each environment in an iteration. 256 x 8 = 2,048, SB3's.")
    batch: int = Field(256, ge=2, description="Mini-batch. 256: 8 of them, as an iteration has in SB3's zoo.")
    epochs: int = Field(10, ge=1, description="10: SB3.")
    gamma: float = Field(0.99, gt=0, le=1, description="0.99: SB3; RPD 0.8 with dense, 0.99 with sparse reward.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="0.95: SB3; RPD 0.9.")
    clip: float = Field(0.2, gt=0, lt=1, description="0.2: PPO.")
    entropy: float = Field(0.0, ge=0, description="Coefficient of the entropy. 0: SB3, RPD.")
    value: float = Field(0.5, ge=0, description="Coefficient of the value's loss. 0.5: SB3, RPD.")
    max_grad_norm: float = Field(0.5, gt=0, description="0.5: SB3, RPD.")
    target_kl: float | None = Field(None, gt=0, description="An iteration ends beyond 1.5 times this. RPD 0.2.")
    hidden: list[int] = Field(default=[64, 64], min_length=1, description="Widths of policy and value. SB3's.")
    log_std: float = Field(0.0, description="Of the Gaussian at first. 0: SB3.")


class PlayConfig(Section):
    """Evaluation by fresh episodes, deterministic actions."""

    every: int = Field(5, ge=1, description="Iterations between two evaluations; a checkpoint is written at each.")
    episodes: int = Field(20, ge=1, description="Fresh ones each time, the same for every run.")
    last: int = Field(100, ge=1, description="Episodes of the last evaluation.")
    teacher: bool = Field(
        True, description="rpd: the teacher plays the episodes of the last evaluation, too, at the start."
    )
    frames: int = Field(6, ge=0, description="Pictures of one episode, before and after; 0: none.")


class Played(Section):
    """What the two recipes have in common."""

    env: EnvConfig
    eval: PlayConfig = PlayConfig()
    seed: int = Field(0, ge=0, description="Of environments, weights and sampling.")
    threads: int | None = Field(1, ge=1, description="torch threads; 1 makes runs repeat bit for bit.")
    output: str = Field("runs/control", description="Folder of the run.")


class RPDRecipe(Played):
    """`kibitz control rpd`: PPO, cloning, on-policy distillation, or refined policy distillation."""

    teacher: PolicyTeacherConfig | None = None
    method: TaughtConfig = TaughtConfig()
    ppo: PPOConfig = PPOConfig()
    steps: int = Field(100_000, ge=1, description="Steps of the environment, all copies together.")
    stop_at: float | None = Field(None, description="End when an evaluation's mean return reaches this.")

    @model_validator(mode="after")
    def _teacher(self) -> "RPDRecipe":
        if (self.method.type == "ppo") != (self.teacher is None):
            raise ValueError(
                "ppo hears no teacher: leave teacher out, or write method.type: rpd"
                if self.teacher is not None
                else f"method {self.method.type} needs a teacher: write teacher: {{run: folder}}, or method.type: ppo"
            )
        if self.ppo.num_steps * self.env.num_envs % self.ppo.batch:
            raise ValueError(
                f"ppo.batch {self.ppo.batch} does not divide the {self.ppo.num_steps * self.env.num_envs} steps of an "
                "iteration (ppo.num_steps x env.num_envs)"
            )
        return self


class StudentConfig(Section):
    """A policy that a person can read."""

    type: Literal["tree", "linear", "polynomial", "symbolic"] = Field(
        "tree",
        description="tree: CART of scikit-learn; linear: least squares, or logistic for discrete actions; polynomial: sparse; "
        "symbolic: a formula that is searched for.",
    )
    depth: int | None = Field(None, ge=1, description="Of a tree. null: 3, or as leaves allow.")
    leaves: int | None = Field(None, ge=2, description="Of a tree, at most.")
    degree: int = Field(2, ge=1, le=5, description="Of a polynomial's monomials.")
    terms: int = Field(8, ge=1, description="Monomials of a polynomial at most, for each output.")
    search: Literal["gplearn", "operon"] = Field(
        "gplearn", description="Of a formula. operon: pyoperon, faster, and its constants are fitted."
    )
    nodes: int = Field(30, ge=3, description="Of a formula of operon, at most. 50 is operon's.")
    population: int = Field(500, ge=10, description="Formulas of a generation. 1,000 is gplearn's.")
    generations: int = Field(15, ge=1, description="20 is gplearn's.")
    parsimony: float = Field(
        0.002, ge=0, description="Of gplearn: price of a node, in the unit of the loss. 0.001 is gplearn's."
    )
    functions: list[Literal["add", "sub", "mul", "div", "abs", "max", "min"]] = Field(
        default=["add", "sub", "mul"], min_length=1, description="A formula is made of these."
    )

    @model_validator(mode="after")
    def _own(self) -> "StudentConfig":
        own = {
            "tree": {"depth", "leaves"}, "linear": set(), "polynomial": {"degree", "terms"},
            "symbolic": {"search", "nodes", "population", "generations", "parsimony", "functions"},
        }  # fmt: skip
        fields = type(self).model_fields
        changed = {
            name for name in fields if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        }
        for name in sorted(changed - {"type"} - own[self.type]):
            owner = next(kind for kind, names in own.items() if name in names)
            raise ValueError(f"{name} is a setting of {owner}: leave it out, or write type: {owner}")
        if other := changed & ({"nodes"} if self.search == "gplearn" else {"parsimony"}):
            raise ValueError(
                f"{min(other)} is no setting of search {self.search}: leave it out, or choose the other search"
            )
        if self.search == "operon" and (odd := set(self.functions) - {"add", "sub", "mul"}):
            raise ValueError(f"functions: operon searches with add, sub and mul, not {min(odd)}: write search: gplearn")
        return self


class LoopConfig(Section):
    """Who visits the states that the student is fitted to, and how they are weighed."""

    type: Literal["bc", "dagger", "viper"] = Field(
        "viper",
        description="bc: the teacher's states alone; dagger: the student's too, relabelled; viper: and weighed by what a wrong "
        "action costs (1805.08328).",
    )
    iterations: int = Field(10, ge=1, description="Fits. VIPER's code takes 80 on Atari, 20 on CartPole.")
    steps: int = Field(1000, ge=1, description="States that are added in an iteration.")
    most: int = Field(50_000, ge=1, description="States that a fit sees; of more it takes a sample.")
    validation: int = Field(20, ge=1, description="Fresh episodes that choose the best iterate.")


class DistilRecipe(Played):
    """`kibitz control distil`: a student that a person can read, from any teacher."""

    teacher: PolicyTeacherConfig
    student: StudentConfig = StudentConfig()
    method: LoopConfig = LoopConfig()
