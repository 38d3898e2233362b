"""Checks with the loaded models, on a few rollouts of the student: the numbers that a run would start from, and the consistency
of student, engine and teacher."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from kibitz.batching import group, pack
from kibitz.data import apart, joined
from kibitz.engines import Engine
from kibitz.evaluate.evaluate import accuracy, grade
from kibitz.losses.chunked import Criterion
from kibitz.losses.criteria import Divergence, PolicyGradient
from kibitz.methods import token_loss
from kibitz.models import LanguageModel
from kibitz.models.rotary import rotations_vary
from kibitz.preflight.finding import Finding
from kibitz.report.formats import many
from kibitz.signals import Sampled, Scored, Signal, Spans, TopK
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import LocalScorer
from kibitz.training.setup import Setup
from kibitz.types import Rollout

LARGE_GAP, HUGE_GAP = 0.02, 0.2
"""Nats between engine and trainer: bf16 gives 0.005 to 0.02 on average at a large vocabulary, other weights give more."""


@torch.no_grad()
def values_of(
    student: LanguageModel, rollouts: Sequence[Rollout], signals: Sequence[Signal], criterion: Criterion, tokens: int
) -> dict[str, Tensor]:
    """Return a criterion's values, by name, at the tokens with weight above 0: tensors [T] on the CPU, in the batches' order."""
    found: dict[str, list[Tensor]] = {}
    for indices in group(rollouts, tokens):
        batch = pack([Scored(rollouts[i], rollouts[i].weight_T(), signals[i]) for i in indices], student.device)
        _, values = token_loss(student, batch, criterion, None)
        for name, value_T in values.items():
            found.setdefault(name, []).append(value_T[batch.tokens.weight_T > 0].cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def write(setup: Setup, num_prompts: int) -> list[Rollout]:
    """Sample one response of the student to each of the first prompts, as the run would, and grade it."""
    return write_with(setup, setup.engine, num_prompts)


def write_with(setup: Setup, engine: Engine, num_prompts: int) -> list[Rollout]:
    """Sample and grade one response to each of the first prompts with the given engine."""
    sampling = replace(setup.parts.sampling, num_samples=1, seed=setup.parts.recipe.seed)
    prompts = setup.stream.prompts[:num_prompts]
    rollouts = joined(prompts, engine.generate(apart(prompts), sampling))
    return grade(setup.grader, setup.parts.student, rollouts)


def itself(setup: Setup, rollouts: Sequence[Rollout], model: LanguageModel | None = None) -> Finding:
    """Check that the student's reverse KL to itself is 0: token shift, masks, vocabulary and precision are then right."""
    tokens = setup.parts.recipe.optim.tokens_per_micro_batch
    signals = LocalScorer(model or setup.parts.student, ScoreRequest(tokens_per_micro_batch=tokens)).score(rollouts)
    kl_T = values_of(setup.parts.student, rollouts, signals, Divergence(), tokens)["reverse_kl"]
    most = kl_T.abs().max().item()
    if most == 0.0:
        return Finding("student against itself", "green", "reads 0 at every token", {"reverse_kl": 0.0})
    text = f"reads {most:.1e} nats where it must read 0: scoring depends on the shape of a batch, or on the precision"
    return Finding("student against itself", "amber" if most < 1e-4 else "red", text, {"reverse_kl": most})


def engine_gap(setup: Setup, rollouts: Sequence[Rollout]) -> Finding:
    """Check that engine and trainer give the sampled tokens the same log-probabilities, in nats."""
    sampling = setup.parts.sampling
    if sampling.temperature != 1 or sampling.top_p < 1 or sampling.top_k or sampling.epsilon:
        return Finding(
            "engine against trainer", "green", "not compared: rollouts are not from the student's own distribution"
        )
    tokens = setup.parts.recipe.optim.tokens_per_micro_batch
    signals = LocalScorer(setup.parts.student, ScoreRequest("sampled", tokens_per_micro_batch=tokens)).score(rollouts)
    gaps = torch.cat([(s.logp_T.cpu() - r.logp_T).abs() for s, r in zip(signals, rollouts, strict=True)])  # type: ignore
    mean, most = gaps.mean().item(), gaps.max().item()
    text = f"log-probabilities differ by {mean:.1e} nats on average, {most:.1e} at most"
    light = "green" if mean < LARGE_GAP else "amber" if mean < HUGE_GAP else "red"
    if light == "amber":
        text += ": write method.policy_loss=truncated, or sample and train in the same precision"
    if light == "red":
        text += ": the engine has other weights, another temperature or another model"
    if light != "green" and rotations_vary(setup.parts.student.model):
        text += (
            ". This student's rotary factors depend on length: the trainer takes those of the longest text of the run, and a "
            "server those of its --max-model-len"
        )
    return Finding("engine against trainer", light, text, {"mean": mean, "max": most})


def teacher_gap(remote: Sequence[Signal], local: Sequence[Signal]) -> Finding:
    """Compare a server with a local copy of its model: the sampled tokens' log-probabilities, in nats."""
    gaps = torch.cat([(a.logp_T.cpu() - b.logp_T.cpu()).abs() for a, b in zip(remote, local, strict=True)])  # type: ignore
    mean, most = gaps.mean().item(), gaps.max().item()
    text = f"log-probabilities differ by {mean:.1e} nats on average, {most:.1e} at most"
    light = "green" if mean < LARGE_GAP else "amber" if mean < HUGE_GAP else "red"
    if light == "red":
        text += ": the server has other weights, or applies a temperature"
    return Finding("server against local teacher", light, text, {"mean": mean, "max": most})


def opinions(setup: Setup, rollouts: Sequence[Rollout], signals: Sequence[Signal]) -> list[Finding]:
    """Report the distance between the two models on the student's text, and check the teacher's overlap and entropy."""
    values = values_of(
        setup.parts.student, rollouts, signals, criterion_for(signals), setup.parts.recipe.optim.tokens_per_micro_batch
    )
    means = {name: value_T.mean().item() for name, value_T in values.items()}
    findings = [_distance(means)]
    if "top_k_overlap" in means:
        share, mass = means["top_k_overlap"], means["overlap_mass"]
        text = f"{share:.0%} of the likeliest 16 tokens are shared; they hold {mass:.1%} of the student's probability"
        weak = mass < 0.8
        if weak:
            text += ": the teacher has little to say about such text; begin with method.type=sft source=teacher, or skd"
        findings.append(Finding("overlap", "amber" if weak else "green", text, {"share": share, "mass": mass}))
    if "teacher_entropy" in means:
        findings.append(_sharpness(means["teacher_entropy"], means["student_entropy"]))
    return findings


def criterion_for(signals: Sequence[Signal]) -> Criterion:
    match signals[0]:
        case Sampled() | Spans():
            return PolicyGradient()
        case TopK() as signal:
            return Divergence(support="teacher", temperature=signal.temperature)
        case _:
            return Divergence()


def _distance(means: dict[str, float]) -> Finding:
    kl, teacher_logp, student_logp = means["reverse_kl"], means["teacher_logp"], means["student_logp"]
    text = (
        f"reverse KL {kl:.3g} nats a token; a token of the student's has a mean log-probability of {student_logp:.3g} nats "
        f"under the student and {teacher_logp:.3g} under the teacher"
    )
    numbers = {"reverse_kl": kl, "student_logp": student_logp, "teacher_logp": teacher_logp}
    if kl > 5:
        return Finding(
            "distance", "red", text + ": the teacher reads something else; compare tokenizers and templates", numbers
        )
    if kl < 1e-4:
        return Finding("distance", "amber", text + ": there is nothing to learn; are the two the same model?", numbers)
    return Finding("distance", "amber" if kl > 2 else "green", text, numbers)


def _sharpness(teacher: float, student: float) -> Finding:
    numbers = {"teacher_entropy": teacher, "student_entropy": student}
    text = f"entropy {teacher:.3g} nats a token, the student's {student:.3g}"
    if teacher < 1e-3 * max(student, 1e-6):
        return Finding(
            "teacher's temperature",
            "amber",
            text + ": as sharp as at temperature 0; does it apply one?",
            numbers,
        )
    return Finding("teacher's temperature", "green", text, numbers)


def loss_temperature(first: TopK, second: TopK) -> Finding:
    """Compare a teacher's top k at temperatures 1 and 2. Log-ratios between two tokens must halve, for every k, because
    log-probabilities are logits minus a constant. A server that ignores the temperature, or applies it twice, fails."""
    ratios = [signal.logp_TK - signal.logp_TK[:, :1] for signal in (first, second)]
    gap = (ratios[0] / 2 - ratios[1]).abs().max().item()
    if gap < 1e-3:
        return Finding("loss temperature", "green", "the teacher applies the one it is asked for", {"gap": gap})
    text = f"at temperature 2 the teacher's log-ratios are up to {gap:.2g} nats from half of those at 1: it does not apply it"
    return Finding("loss temperature", "red", text, {"gap": gap})


def task(setup: Setup, teacher_rollouts: Sequence[Rollout] | None, rollouts: Sequence[Rollout]) -> Finding | None:
    """Compare the teacher's accuracy with the student's on the task; None if nothing can be graded."""
    if setup.grader is None or all(rollout.reward is None for rollout in rollouts):
        return None
    ours = accuracy(rollouts)
    if teacher_rollouts is None:
        return Finding(
            "task",
            "green",
            f"the student solves {ours['accuracy']:.0%} of {many(ours['num'], 'prompt')}",
            {"student": ours},
        )
    theirs = accuracy(teacher_rollouts)
    numbers = {"student": ours, "teacher": theirs}
    text = f"the student solves {ours['accuracy']:.0%} of {many(ours['num'], 'prompt')}, the teacher {theirs['accuracy']:.0%}"
    if theirs["accuracy"] > ours["accuracy"]:
        sure = theirs["low"] > ours["high"]
        return Finding("task", "green", text + ("" if sure else "; too few to be sure, see --prompts"), numbers)
    if theirs["high"] < ours["low"]:
        return Finding(
            "task", "red", text + ": it has nothing to teach here; choose another, or look at its template", numbers
        )
    return Finding("task", "amber", text + ": no gain is to be expected here, or the prompts are too few", numbers)


def endings(rollouts: Sequence[Rollout], limit: int) -> Finding:
    """Report the mean length of the responses, in tokens, and the share that is cut off."""
    cut, mean = fmean(r.cut_off for r in rollouts), fmean(r.num_tokens for r in rollouts)
    numbers = {"mean": mean, "cut_off": cut}
    text = f"{mean:.0f} tokens on average, {cut:.0%} cut off at {limit}"
    if cut > 0.3:
        return Finding("responses", "amber", f"{text}: raise rollout.max_tokens, or see whether it ever ends", numbers)
    return Finding("responses", "green", text, numbers)
