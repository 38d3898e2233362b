"""The comparison of methods at equal student steps and rollouts, each at its best learning rate."""

from kibitz.experiments.design import TOY, Arm, Experiment, merged

ROLLOUTS = 64  # of each step, whoever writes them
GROUPS_OF_8 = {"prompts_per_step": ROLLOUTS // 8, "samples_per_prompt": 8}
SAMPLED = {"type": "opd", "support": "sampled"}


def _opd(name: str, about: str, **settings) -> Arm:
    return Arm(name, about, {"method": {"type": "opd", **settings}})


def _skd(top_k: int, divergence: str, short: str) -> Arm:
    method = {"type": "skd", "accept_top_k": top_k, "divergence": divergence}
    return Arm(
        f"skd-k{top_k}-{short}", f"speculative KD, K={top_k}, {divergence.replace('_kl', ' KL')}", {"method": method}
    )


ARMS = (
    _opd("opd", "reverse KL, full vocabulary"),
    _opd("opd-fkl", "forward KL, full vocabulary", divergence="forward_kl"),
    _opd("opd-jsd", "JSD(½), full vocabulary", divergence="jsd"),
    _opd("opd-topk", "reverse KL, the student's 4 likeliest and a tail", support="top_k", top_k=4),
    _opd("opd-tip", "reverse KL on the half of the tokens that TIP chooses", token_weight="tip"),
    _opd("opd-prefix", "reverse KL on beginnings that grow from 8 tokens", prefix_tokens=8),
    _opd("opd-seeded", "the teacher writes the first 8 tokens, fewer by and by", seed_tokens=8, seed_decays=True),
    _opd("opd-sampled", "policy gradient on the sampled token", support="sampled"),
    _opd(
        "opd-sampled-clip",
        "policy gradient on the sampled token, advantage within ±3",
        support="sampled",
        clip_advantage=3,
    ),
    _opd(
        "opd-sampled-baseline",
        "policy gradient on the sampled token, vOPD's baseline",
        support="sampled",
        baseline=True,
    ),
    Arm(
        "opd-reward",
        "sampled token, baseline, and the group-centred reward, 8 samples a prompt",
        {"method": {**SAMPLED, "baseline": True, "reward_coef": 1.0}, "rollout": GROUPS_OF_8},
    ),
    _opd(
        "opd-stable",
        "reverse KL, 0.05 KL to the start, cross-entropy on gold solutions of a quarter of the prompts",
        reference_kl=0.05,
        replay=0.25,
    ),
    _opd("exopd", "policy gradient that goes past the teacher, λ=1.25", support="sampled", extrapolation=1.25),
    Arm("ammd", "moments of an adversary's action values, half on the teacher's text", {"method": {"type": "ammd"}}),
    Arm(
        "gad",
        "a judge of the text as the reward, after a third on the teacher's text, 8 samples a prompt",
        {"method": {"type": "gad", "source": "teacher"}, "rollout": GROUPS_OF_8},
    ),
    Arm(
        "minillm",
        "KL of whole responses by policy gradient, text of a mixture with the teacher",
        {"method": {"type": "minillm"}},
    ),
    Arm(
        "distillm2",
        "skewed KL, forward on the teacher's text and reverse on the student's, one of each for 32 prompts",
        {"method": {"type": "distillm2"}, "rollout": {"prompts_per_step": ROLLOUTS // 2}},
    ),
    Arm(
        "kdrl",
        "reward, and a fading reverse KL beside it, 8 samples a prompt",
        {"method": {"type": "kdrl"}, "rollout": GROUPS_OF_8},
    ),
    Arm("grpo", "reward only, 8 samples a prompt", {"method": {"type": "grpo"}, "rollout": GROUPS_OF_8}),
    Arm("sft-data", "cross-entropy on right solutions from the data", {"method": {"type": "sft"}}),
    Arm("sft-teacher", "cross-entropy on the teacher's text", {"method": {"type": "sft", "source": "teacher"}}),
    Arm(
        "kd-fkl",
        "forward KL on the teacher's text",
        {"method": {"type": "gkd", "on_policy": 0, "source": "teacher", "divergence": "forward_kl"}},
    ),
    Arm(
        "kd-rkl",
        "reverse KL on the teacher's text",
        {"method": {"type": "gkd", "on_policy": 0, "source": "teacher", "divergence": "reverse_kl"}},
    ),
    Arm(
        "gkd",
        "JSD(½), half of the steps on the teacher's text",
        {"method": {"type": "gkd", "on_policy": 0.5, "source": "teacher"}},
    ),
    *(_skd(k, "forward_kl", "fkl") for k in (1, 2, 3)),
    *(_skd(k, "reverse_kl", "rkl") for k in (1, 2, 3)),
    Arm(
        "self-sft",
        "cross-entropy on the untrained student's own text: nothing to learn",
        {"method": {"type": "sft", "source": "teacher"}, "teacher": {"model": "student"}},
    ),
)


def _compared(name: str, world: str, steps: int, max_tokens: int, arms: tuple[Arm, ...]) -> Experiment:
    return Experiment(
        name=name,
        question=(
            f"The world {world}, {steps} steps of {ROLLOUTS} rollouts for everybody, each at its own best learning rate: "
            "which method brings the student nearest to the teacher, and at what cost?"
        ),
        world=world,
        recipe=merged(TOY, {"rollout": {"prompts_per_step": ROLLOUTS, "max_tokens": max_tokens}, "steps": steps}),
        rates=(5e-4, 1e-3, 2e-3),
        reference="opd",
        quick_arms=("sft-teacher", "opd", "grpo"),
        arms=arms,
    )


METHODS = _compared("methods", "arithmetic", 40, 64, ARMS)

NAVIGATION = _compared(
    "methods-navigation", "navigation", 100, 24, tuple(arm for arm in ARMS if arm.name not in ("opd-topk", "opd-tip"))
)
