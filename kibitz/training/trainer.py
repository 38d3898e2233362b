"""The loop: prompts, rollouts, teacher, loss, step. It does not know which method runs.

A run is a folder: recipe.yaml, run.json, metrics.jsonl, evals.jsonl, rollouts.jsonl, checkpoints/, report.html.
"""

import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from kibitz import graders, methods
from kibitz.batching import micro_batches, pack, settled
from kibitz.config import Recipe
from kibitz.evaluate.annotate import annotate
from kibitz.evaluate.evaluate import grade
from kibitz.files import in_words
from kibitz.graders import Grader
from kibitz.ledger import Ledger, highest
from kibitz.optim import Optimizer, lr_factor
from kibitz.parallel.fsdp import copy_weights, reduce_gradients
from kibitz.signals import Scored
from kibitz.training import checkpoint, timeline
from kibitz.training.ahead import Ahead, supply_for
from kibitz.training.guards import Alarm, Guards, rollout_metrics
from kibitz.training.means import means_of, num_measured, sums_of
from kibitz.training.memory import Gauge
from kibitz.training.progress import bar_if_watched
from kibitz.training.saving import Saver
from kibitz.training.setup import Setup, prepare
from kibitz.training.stopping import BetweenSteps
from kibitz.training.trackers import Tracked
from kibitz.types import Prompt, Rollout, Stateful, Step, Writer, share_of_teacher


class Progress(Protocol):
    """Watches a run: a progress bar, a tracker, or nothing."""

    def start(self, recipe: Recipe, first_step: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class NullProgress:
    """Watches nothing. A subclass writes anew the methods that it cares for."""

    def start(self, recipe: Recipe, first_step: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Run:
    """A finished (or stopped) run: its folder, and what stands in it."""

    folder: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    checkpoint: Path | None


def train(
    recipe: "str | Path | dict | Recipe",
    overrides: Sequence[str] = (),
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    grader: Grader | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Run:
    """Run a recipe: a YAML file, a dict or a `Recipe`, with `a.b=value` overrides.

    `loss` replaces the divergence: `(student_CS, teacher_CS) -> loss_C`, log-probabilities over one support.
    `grader` replaces the recipe's: `(prompt, text) -> reward`.
    `resume` goes on from the last checkpoint of `output`; `overwrite` throws away what is there.
    `progress` watches the run; without one a terminal or notebook shows a bar, unless `quiet`.
    Mistakes in the recipe or the data raise ValueError before any weights load.
    """
    Gauge(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")).reset()  # loading begins
    with bar_if_watched(quiet) if progress is None else nullcontext(progress) as shown:
        more = {} if shown is None else {"told": shown.phase}
        setup = prepare(recipe, overrides, loss=loss, grader=grader, resume=resume, overwrite=overwrite, **more)
        watcher = Tracked((shown if setup.parts.ranks.is_main else None) or NullProgress())
        try:
            Trainer(setup, watcher).run()
        finally:
            watcher.close()
    return setup.folder.as_run(Run)


@dataclass
class Trainer:
    setup: Setup
    progress: Progress
    ledger: Ledger = field(init=False)
    optimizer: Optimizer = field(init=False)
    saver: Saver = field(init=False)
    stop: BetweenSteps = field(init=False)
    """Knows the signal that asked this process to stop."""
    stop_signal: int = 0
    """The signal for which all processes stop, 0 before."""
    stopped_by: Alarm | None = None

    def __post_init__(self) -> None:
        self.recipe, self.student, self.folder = self.setup.parts.recipe, self.setup.parts.student, self.setup.folder
        self.method = methods.build(self.setup.parts)
        self.learner, self.ranks = self.setup.learner, self.setup.parts.ranks
        in_parts = self.learner is self.student  # of whose gradients no process has room for whole ones
        self.reduces_each = in_parts or self.recipe.parallel.reduce_gradients == "micro_batch"
        rounded = self.learner.model.dtype != self.student.model.dtype
        self.optimizer = Optimizer(self.learner.model, self.recipe.optim, keep_weights=rounded)
        assert "optimizer" not in self.setup.parts.stateful, "that is the name of the student's own"
        self.stateful: dict[str, Stateful] = {**self.setup.parts.stateful, "optimizer": self.optimizer}
        self.done, self.ledger = 0, self.setup.parts.ledger
        self.supply = supply_for(self.recipe, self.setup, self._write)
        self.stateful |= {"ahead": self.supply} if isinstance(self.supply, Ahead) else {}
        self.guards = Guards(self.recipe.guards)
        self.stop = BetweenSteps(lambda text: self.progress.note(text))
        if self.setup.resumed_from is not None:
            state = checkpoint.load_state(self.setup.resumed_from, self.stateful)
            self.done = state["step"]
            self.setup.stream.go_to(state["position"])
            self.ledger.resume(state["ledger"])
            self.guards = Guards(self.recipe.guards, state["guards"])
        self.ledger.note_peaks("loading")
        self.saved = self.done
        self.saver = Saver(self.folder.path, self.recipe.save, self.ranks)
        self.ranks.gather(None)  # all have loaded what an overwritten run may hold
        self.ranks.first(lambda: self.folder.begin(self.done, self.student, self.setup.parts.teacher))

    def run(self) -> None:
        """Train to the last step or to what stops the run; `run.json` says which, and what it was if the run dies. A signal that
        comes again changes nothing until all that is written."""
        with self.stop:
            try:
                self._run()
                peaks = highest(self.ranks.gather(self.ledger.total))
                self.folder.finish(*self._end(), peaks)
                self.ranks.gather(None)  # the files are whole, for all to read
            except BaseException as error:
                with suppress(Exception, KeyboardInterrupt):  # the first error says it
                    self.saver.wait()
                with suppress(OSError):  # of a full disk, the first error says it
                    status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                    self.folder.finish(status, in_words(error), {})
                raise
            finally:
                self.setup.close()
                self.folder.lock.release()
        if self.stop_signal and self.done < self.recipe.steps:
            raise KeyboardInterrupt(self.stop_signal)

    def _run(self) -> None:
        recipe = self.recipe
        self.progress.start(recipe, self.done)
        about_rewards = graders.describe(recipe.data.grader, self.setup.grader, self.setup.stream.prompts)
        for text in (*self.folder.notes, *about_rewards):
            self.progress.note(text)
        if self.ranks.first(lambda: not self.folder.evals.read()):
            self.evaluate()
        while self.done < recipe.steps and not self._stopping():
            self.step()
            self.saver.check()
            if _due(recipe.eval.every, self.done) or self.done == recipe.steps:
                self.evaluate()
            if _due(recipe.save.every, self.done):
                self.save(last=self.done == recipe.steps)
        if self.saved < self.done:
            self.save()
        self.saver.wait()

    def _end(self) -> tuple[str, str]:
        """The status of the run and what ended it."""
        if self.done == self.recipe.steps:
            return "finished", f"all {self.recipe.steps} steps are done" if self.done > 1 else "its one step is done"
        if self.stop_signal:
            return "stopped", f"{signal.Signals(self.stop_signal).name} after step {self.done}"
        alarm = self.stopped_by
        return "stopped", "another process" if alarm is None else f"the guard {alarm.name}: {alarm.symptom}"

    def _stopping(self) -> bool:
        """Return whether all processes stop now: a signal may have reached one of them only. One that comes while they
        tell each other is heard at the next step."""
        said = self.ranks.gather((self.stop.number, self.stopped_by is not None))
        self.stop_signal = max(number for number, _ in said)
        return bool(self.stop_signal) or any(alarmed for _, alarmed in said)

    def step(self) -> None:
        """One update of the student: write, score, learn."""
        recipe, ledger = self.recipe, self.ledger
        step = self._step(self.done)
        factor = lr_factor(self.done, recipe.steps, recipe.optim)
        self.progress.phase("rollouts")
        with ledger.timed("sampling"):
            rollouts = self._graded(self.supply.take(self.done))
        rollouts, share_masked = self.guards.mask(rollouts)
        self.progress.phase("teacher")
        with ledger.timed("scoring"):
            scored = self.method.signal(self.ranks.share(rollouts), step)
        self.progress.phase("student")
        with ledger.timed("training"):
            means, num_tokens, signal_bytes = self._accumulate(scored)
        with ledger.timed("sampling"):
            self.supply.settle()
        with ledger.timed("training"):
            norm = self.optimizer.step(factor)
        with ledger.timed("sampling"):
            copy_weights(self.learner, self.student)
            self.setup.engine.sync(self.student)
            if self.setup.parts.teacher is not None:
                self.setup.parts.teacher.sync(self.student)
        self.done += 1
        if recipe.rollout.store:
            self.folder.store(self.done, [r for r in rollouts if not r.objective])
        more = {
            "grad_norm": norm,
            "lr": recipe.optim.lr * factor,
            "signal_bytes": signal_bytes,
            "masked": share_masked,
        }
        more |= self.supply.metrics()
        self._write_metrics(rollouts, means, num_tokens, more)

    def _step(self, number: int) -> Step:
        return Step(number, self.recipe.steps, self.recipe.seed * 1_000_003 + number)

    def _write(self, prompts: Sequence[Prompt], number: int) -> list[Rollout]:
        return self.method.rollout(prompts, self._step(number))

    def _graded(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the rollouts with the reward of each that the student wrote in. Where responses were shortened there are
        none: a beginning has no reward, and the responses that ended earlier are not typical."""
        if any(r.shortened for r in rollouts):
            return rollouts
        places = [place for place, r in enumerate(rollouts) if r.has_tokens_of(Writer.STUDENT)]
        graded = grade(self.setup.grader, self.student, [rollouts[place] for place in places], self.ranks)
        found = dict(zip(places, graded, strict=True))
        return [found.get(place, r) for place, r in enumerate(rollouts)]

    def _accumulate(self, scored: list[Scored]) -> tuple[dict[str, float], int, float]:
        """Gradients of the mean over all tokens of the step, whatever the micro-batches; and the mean of each value, the number
        of tokens, the bytes of signals. Where there are several objectives, each is the mean over its own tokens."""
        counts: Counter[str] = Counter()
        for one in scored:
            counts[one.objective] += int((one.weight_T > 0).sum())
        counts = self.ranks.add({"tokens": counts})["tokens"]
        sums: dict[str, Any] = defaultdict(Counter)  # whose counts are of nats
        batches = micro_batches(scored, self.recipe.optim.tokens_per_micro_batch)
        own, passed, signal_bytes = [[scored[i] for i in indices] for indices in batches], 0.0, 0
        for number, (members, last) in enumerate(self.ranks.in_step(own, self._settled), 1):
            batch = pack(members, self.student.device, num_measured(self.student.vocab_size))
            reduce_gradients(self.learner, last or self.reduces_each)
            total, values = self.method.loss(self.learner, batch)
            if number <= len(own):  # the others keep this process in step with the rest, and are padding
                passed += self.student.pass_flops([one.rollout for one in members])
                signal_bytes += sum(one.signal_bytes for one in members)
            if total.requires_grad:
                (total / max(1, counts[batch.objective])).backward()
            for name, value in sums_of(values, batch.tokens).items():
                sums[name][batch.objective] += value
        # Forward; backward to the activations, and to the weights that learn.
        learns = self.student.num_trainable / self.student.num_parameters
        self.ledger.spend("student_training", (2 + learns) * passed)
        return means_of(self.ranks.add(sums), counts), counts.total(), float(sum(self.ranks.gather(signal_bytes)))

    def _settled(self, members: list[Scored]) -> list[Scored]:
        with self.ledger.timed("scoring"):
            return settled(members)

    def _write_metrics(
        self, rollouts: list[Rollout], means: dict[str, float], num_tokens: int, more: dict[str, float]
    ) -> None:
        rollouts = [r for r in rollouts if not r.objective]
        noted = dict(self.ledger.metrics)
        costs = self.ledger.close_step(lambda spent: self.ranks.add({"flops": spent})["flops"])
        rewards = [r.reward for r in rollouts if r.reward is not None]
        row: dict[str, Any] = {"step": self.done, **means, **noted, **more, "num_tokens": num_tokens}
        row |= {"reward": fmean(rewards)} if rewards else {}
        row |= {
            "response_tokens": fmean(r.num_tokens for r in rollouts),
            "longest_response": max(r.num_tokens for r in rollouts),
            "cut_off": fmean(r.cut_off for r in rollouts),
            "shortened": fmean(r.shortened for r in rollouts),
            "teacher_written": share_of_teacher(rollouts),
            **rollout_metrics(rollouts, self.recipe.guards),
            "tokens_per_second": num_tokens / sum(costs["seconds"].values()),
            "seconds": costs["seconds"],
            "flops": costs["flops"],
            **highest(self.ranks.gather(costs)),
        }
        row |= timeline.told(self.setup.engine, self.setup.parts.teacher, self.ledger, self.ranks)
        self.folder.metrics.append(row)
        self.progress.step(row)
        self._sound(self.guards.watch_step(row))

    def _sound(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self.folder.alarms.append(alarm.as_row())
            self.progress.note(f"step {alarm.step}: {alarm.name}: {alarm.symptom}. {alarm.remedy}")
            if alarm.action == "stop":
                self.stopped_by = alarm

    def evaluate(self) -> None:
        if self.setup.evaluator is None:
            return
        self.progress.phase("evaluation")
        with self.ledger.watched("evaluation"):
            row, rollouts = self.setup.evaluator.run()
            row = {"step": self.done, **row}
            self.folder.evals.append(row)
            shown = self.ranks.first(lambda: self.folder.choose_shown(rollouts, self.recipe.eval.heatmaps))
            self.folder.write_rollouts(self.done, annotate(self.student, self.setup.evaluator.teacher, shown))
        self.folder.beat()
        self.progress.evaluated(row)
        if self.setup.evaluator.held_out:
            self._sound(self.guards.watch_eval(row))

    def save(self, last: bool = True) -> None:
        """Save all that a run needs to go on; where it is not the `last`, perhaps in the background."""
        self.progress.phase("checkpoint")
        self.folder.sync()
        self.folder.beat()
        position, ledger, guards = self.setup.stream.position, self.ledger.total, self.guards.state()
        state = {
            "position": position,
            "ledger": ledger,
            "guards": guards,
            "fingerprint": self.setup.fingerprint,
        }
        with self.ledger.watched("saving"):
            self.saver.save(self.done, self.student, self.stateful, state, last)
        self.saved = self.done


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
