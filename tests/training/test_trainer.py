"""The loop on tiny random models: what must hold whatever is learnt."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import language_model, make_model
from support.runs import Interrupt, crash, recipe, timeless
from transformers import AutoModelForCausalLM, AutoTokenizer

import kibitz
from kibitz.training import checkpoint
from kibitz.training.trainer import NullProgress


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_opd_lowers_the_reverse_kl_and_leaves_the_files_of_a_run(models, tmp_path):
    run = kibitz.train(recipe(*models, tmp_path / "run", steps=12, optim={"lr": 5e-3}))
    assert run.metrics[-1]["reverse_kl"] < 0.7 * run.metrics[0]["reverse_kl"]
    assert run.evals[-1]["reverse_kl"] < 0.7 * run.evals[0]["reverse_kl"]
    assert [row["step"] for row in run.metrics] == list(range(1, 13))
    assert [row["step"] for row in run.evals] == [0, 12]
    assert {path.name for path in run.folder.iterdir()} >= {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "evals.jsonl",
        "rollouts.jsonl",
    }
    row = run.metrics[0]
    assert row["flops"]["student_training"] == pytest.approx(3 * row["flops"]["student_sampling"])
    assert row["flops"]["teacher_scoring"] > row["flops"]["student_sampling"]
    assert json.loads((run.folder / "run.json").read_text())["status"] == "finished"


def test_evaluations_are_no_part_of_the_cost(models, tmp_path):
    often, never = (
        kibitz.train(recipe(*models, tmp_path / str(every), steps=2, eval={"every": every})).metrics for every in (1, 0)
    )
    assert [row["flops"] for row in often] == [row["flops"] for row in never]


def test_a_student_that_equals_its_teacher_reads_zero_and_stays(models, tmp_path):
    student, _ = models
    run = kibitz.train(recipe(student, student, tmp_path / "run", optim={"lr": 1e-2}))
    assert all(abs(row["reverse_kl"]) < 1e-6 for row in run.metrics)
    before, after = weights(student), weights(run.checkpoint)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [{"support": "top_k", "top_k": 4}, {"support": "sampled"}, {"divergence": "jsd"}])
def test_equal_models_read_zero_with_every_signal(models, tmp_path, method):
    student, _ = models
    run = kibitz.train(recipe(student, student, tmp_path / "run", steps=1, method={"type": "opd", **method}))
    assert abs(run.metrics[0]["reverse_kl"]) < 1e-6


@pytest.mark.parametrize("method", ["opd", "sft", "grpo"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(models, tmp_path, method):
    student, teacher = models
    runs = [
        kibitz.train(
            recipe(student, teacher, tmp_path / name, method={"type": method}),
            grader=lambda p, text: float(len(text) % 2),
        )
        for name in ("a", "b")
    ]
    assert timeless(runs[0].metrics) == timeless(runs[1].metrics)
    first, second = weights(runs[0].checkpoint), weights(runs[1].checkpoint)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = kibitz.train(recipe(student, teacher, tmp_path / "c", method={"type": method}, seed=1))
    assert timeless(other.metrics) != timeless(runs[0].metrics)


@pytest.mark.parametrize(
    "method", [{"type": "opd"}, {"type": "opd", "support": "sampled"}, {"type": "grpo"}, {"type": "sft"}]
)
def test_the_loss_does_not_depend_on_the_micro_batch_or_the_chunk(models, tmp_path, method):
    def losses(name: str, **optim) -> list[float]:
        run = kibitz.train(
            recipe(*models, tmp_path / name, method=method, steps=3, optim={"lr": 1e-3, **optim}),
            grader=lambda prompt, text: float(len(text) % 3),
        )
        return [value for row in run.metrics for value in (row["loss"], row["grad_norm"])]

    whole = losses("whole")
    assert losses("micro", tokens_per_micro_batch=50) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert losses("single", tokens_per_micro_batch=1, chunk_tokens=3) == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_grpo_learns_to_please_a_grader(models, tmp_path):
    """The grader likes short answers; the mean reward moves by far more than its noise."""
    student, _ = models
    tree = recipe(
        student, None, tmp_path / "run", method={"type": "grpo"}, steps=25, optim={"lr": 1e-2, "schedule": "constant"}
    )
    run = kibitz.train(tree, ["rollout.samples_per_prompt=8"], grader=lambda prompt, text: float(len(text) <= 3))
    assert run.metrics[-1]["reward"] > run.metrics[0]["reward"] + 0.3


def test_sft_learns_the_demonstrations_and_the_teachers_text(models, tmp_path):
    student, teacher = models
    for source in ("dataset", "teacher"):
        tree = recipe(
            student, teacher, tmp_path / source, method={"type": "sft", "source": source}, steps=20, optim={"lr": 5e-3}
        )
        run = kibitz.train(tree)
        assert run.metrics[-1]["loss"] < run.metrics[0]["loss"] - 0.3
        assert ("teacher_sampling" in run.metrics[0]["flops"]) == (source == "teacher")
        assert "student_sampling" not in run.metrics[0]["flops"]


def test_a_custom_loss_replaces_the_divergence(models, tmp_path):
    calls = []

    def squared(student_CS, teacher_CS):
        calls.append(student_CS.shape[-1])
        return (student_CS - teacher_CS).square().sum(-1)

    run = kibitz.train(recipe(*models, tmp_path / "run", steps=1), loss=squared)
    assert calls
    assert run.metrics[0]["loss"] != pytest.approx(run.metrics[0]["reverse_kl"])


def test_the_checkpoint_is_a_plain_folder_that_writes_the_same_text(models, tmp_path):
    from kibitz.data import load_prompts
    from kibitz.engines.torch import TorchEngine
    from kibitz.models.load import stop_ids
    from kibitz.types import Sampling

    run = kibitz.train(recipe(*models, tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(run.checkpoint)
    tok = AutoTokenizer.from_pretrained(run.checkpoint)
    student = language_model(run.checkpoint)
    prompts = load_prompts(run.recipe.data, tok)[:5]
    ours = TorchEngine(student).generate(
        prompts, Sampling(max_tokens=12, temperature=0.0, stop_ids=stop_ids(student, []))
    )
    for prompt, rollout in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False)[0, len(prompt.ids) :]
        assert rollout.response_ids == theirs.tolist()


def test_resume_goes_on_bit_for_bit(models, tmp_path):
    whole = kibitz.train(recipe(*models, tmp_path / "whole", steps=6, save={"every": 2}))

    tree = recipe(*models, tmp_path / "part", steps=6, save={"every": 2})
    with pytest.raises(KeyboardInterrupt):
        kibitz.train(tree, progress=Interrupt())
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "part")][-1] == "step-000003"
    run = kibitz.train(tree, resume=True)
    assert timeless(run.metrics) == timeless(whole.metrics)
    first, second = weights(whole.checkpoint), weights(run.checkpoint)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_after_a_crash_forgets_what_came_after_the_checkpoint(models, tmp_path):
    tree = recipe(*models, tmp_path / "run", steps=6, save={"every": 2})
    crash(tree, step=5)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    run = kibitz.train(tree, resume=True)
    whole = kibitz.train(recipe(*models, tmp_path / "whole", steps=6))
    assert timeless(run.metrics) == timeless(whole.metrics)


def test_a_full_disk_leaves_the_older_checkpoint_whole(models, tmp_path, monkeypatch):
    tree = recipe(*models, tmp_path / "run", steps=4, save={"every": 2, "keep": 1})
    real, saved = checkpoint.save_file, []

    def full(tensors, path):
        if saved:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved.append(path)
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device.*older checkpoints are untouched"):
        kibitz.train(tree)
    (kept,) = checkpoint.checkpoints(tmp_path / "run")
    assert kept.name == "step-000002"
    AutoModelForCausalLM.from_pretrained(kept)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert kibitz.train(tree, resume=True).metrics[-1]["step"] == 4


def test_only_the_last_checkpoints_are_kept(models, tmp_path):
    kibitz.train(recipe(*models, tmp_path / "run", steps=4, save={"every": 1, "keep": 2}))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000003", "step-000004"]


def test_an_output_folder_is_not_overwritten_by_chance(models, tmp_path):
    tree = recipe(*models, tmp_path / "run", steps=1)
    kibitz.train(tree)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(kibitz.RecipeError, match="--resume.*--overwrite.*output=ANOTHER"):
        kibitz.train(tree)
    with pytest.raises(kibitz.RecipeError, match="made with another optim"):
        kibitz.train(tree, ["optim.lr=0.1"], resume=True)
    kibitz.train(tree, overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_gradient_that_is_not_finite_changes_nothing(models, tmp_path):
    notes = []

    class Notes(NullProgress):
        def note(self, text):
            notes.append(text)

    tree = recipe(*models, tmp_path / "run", steps=2)
    run = kibitz.train(tree, loss=lambda s, t: (s - t).sum(-1) * float("inf"), progress=Notes())
    before, after = weights(models[0]), weights(run.checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("not_finite" in note for note in notes)


def test_a_grader_that_raises_stops_the_run_and_names_the_prompt(models, tmp_path):
    def broken(prompt, text):
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="the grader failed on prompt"):
        kibitz.train(recipe(*models, tmp_path / "run"), grader=broken)


@pytest.mark.parametrize("reward", [float("nan"), float("-inf"), None, "1", 10**400, torch.ones(2), 1j])
def test_a_reward_that_is_no_finite_number_is_named(reward, models, tmp_path):
    with pytest.raises(RuntimeError, match=r"the grader gave .* of prompt '.*': a reward is a finite number"):
        kibitz.train(recipe(*models, tmp_path / "run"), grader=lambda prompt, text: reward)


def test_rows_without_an_answer_go_ungraded_where_no_reward_is_needed(models, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"{i}+2", **({"answer": str(i + 2)} if i % 2 else {})} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"prompts": str(path), "world": None, "grader": "exact"}
    tree = recipe(*models, tmp_path / "run", steps=1, data=data, eval={"prompts": str(path), "num_prompts": 4})
    run = kibitz.train(tree, ["rollout.prompts_per_step=4"])
    assert run.evals[-1]["sampled"]["num"] == 2 and run.evals[-1]["num_prompts"] == 4
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    tree = recipe(*models, tmp_path / "none", steps=1, data=data)
    with pytest.raises(ValueError, match=r"row 1 \('0\+2'\): no answer to grade against"):
        kibitz.train(tree)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = recipe(models[0], None, tmp_path / "grpo", steps=1, data=data, method={"type": "grpo"})
    with pytest.raises(ValueError, match=r"row 1 \('0\+2'\): no answer to grade against"):
        kibitz.train(tree)


def test_training_outside_the_main_thread_works(models, tmp_path):
    """Signals can be handled in the main thread only."""
    runs = []
    thread = threading.Thread(target=lambda: runs.append(kibitz.train(recipe(*models, tmp_path / "run", steps=1))))
    thread.start()
    thread.join()
    assert runs[0].metrics[-1]["step"] == 1


def test_a_guard_that_stops_says_why_and_the_run_can_go_on(models, tmp_path):
    """The loss is not finite at step 1; the guard was told to stop there."""
    notes = []

    class Notes(NullProgress):
        def note(self, text):
            notes.append(text)

    tree = recipe(*models, tmp_path / "run", steps=3, guards={"not_finite": "stop"})
    run = kibitz.train(tree, loss=lambda s, t: (s - t).sum(-1) * float("inf"), progress=Notes())
    assert [row["step"] for row in run.metrics] == [1]
    assert any("not_finite" in note for note in notes)
    (alarm,) = (json.loads(line) for line in (run.folder / "alarms.jsonl").read_text().splitlines())
    assert (alarm["name"], alarm["action"], alarm["step"]) == ("not_finite", "stop", 1)
    assert json.loads((run.folder / "run.json").read_text())["status"] == "stopped"
    assert kibitz.train(tree, resume=True).metrics[-1]["step"] == 3


def test_cut_off_rollouts_can_be_masked(models, tmp_path):
    tree = recipe(*models, tmp_path / "run", steps=1, rollout={"max_tokens": 4}, guards={"cut_off": "mask"})
    (row,) = kibitz.train(tree).metrics
    plain = kibitz.train(tree, ["guards.cut_off=warn", f"output={tmp_path / 'plain'}"]).metrics[0]
    assert row["cut_off"] == plain["cut_off"] > 0.3
    assert row["num_tokens"] < plain["num_tokens"]


def test_skd_is_a_recipe_like_any_other(models, tmp_path):
    """K of 1 lets the teacher write nearly all, K of the vocabulary nothing; both models' sampling is paid for."""
    follow = kibitz.train(recipe(*models, tmp_path / "follow", method={"type": "skd", "accept_top_k": 1}, steps=1))
    alone = kibitz.train(recipe(*models, tmp_path / "alone", method={"type": "skd", "accept_top_k": 999}, steps=1))
    assert follow.metrics[0]["teacher_written"] > 0.5
    assert alone.metrics[0]["teacher_written"] == 0.0
    assert follow.metrics[0]["flops"].keys() >= {"student_sampling", "teacher_sampling", "teacher_scoring"}


def test_a_method_from_outside_the_package(models, tmp_path, monkeypatch):
    """What CONTRIBUTING promises a stranger: one section, one builder, and recipes can name it."""
    from typing import Literal

    from kibitz import methods
    from kibitz.config import METHOD_CONFIGS, MethodConfig, Needs, OPDConfig, load
    from kibitz.methods import opd

    class HalfConfig(MethodConfig):
        type: Literal["half"] = "half"
        share: float = 0.5

        def needs(self) -> Needs:
            return Needs(teacher=True)

    def build(config, parts):
        divergence = lambda s, t: config.share * (s.exp() * (s - t)).sum(-1)  # noqa: E731
        return opd.build(OPDConfig(), dataclasses.replace(parts, divergence=divergence))

    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    before = dict(METHOD_CONFIGS)
    try:
        methods.register("half", HalfConfig, build)
        run = kibitz.train(recipe(*models, tmp_path / "run", steps=1, method={"type": "half", "share": 0.25}))
        assert run.metrics[0]["loss"] == pytest.approx(0.25 * run.metrics[0]["reverse_kl"], rel=1e-5)
        with pytest.raises(kibitz.RecipeError, match="unknown key method.shape: did you mean share"):
            load(recipe(*models, tmp_path / "x", method={"type": "half", "shape": 1}))
    finally:
        METHOD_CONFIGS.clear()
        METHOD_CONFIGS.update(before)
        methods.register("opd", OPDConfig, opd.build)  # builds the recipe anew, without the stranger


def test_a_teacher_with_a_short_context_is_refused_before_training(models, tmp_path):
    student, _ = models
    teacher = make_model(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(kibitz.RecipeError, match="the teacher has 16 positions"):
        kibitz.train(recipe(student, teacher, tmp_path / "run"))


def test_gkd_ends_at_sft_text_and_at_the_students_own(models, tmp_path):
    """on_policy 1 is opd to the bit, 0 never samples; between them both kinds of steps happen."""
    student, teacher = models
    opd = kibitz.train(recipe(student, teacher, tmp_path / "opd", method={"type": "opd", "divergence": "jsd"}))
    ends = {
        share: kibitz.train(recipe(student, teacher, tmp_path / str(share), method={"type": "gkd", "on_policy": share}))
        for share in (0, 1)
    }
    assert [row["loss"] for row in ends[1].metrics] == [row["loss"] for row in opd.metrics]
    assert all("student_sampling" not in row["flops"] for row in ends[0].metrics)
    mixed = kibitz.train(
        recipe(student, teacher, tmp_path / "mixed", method={"type": "gkd", "source": "teacher"}, steps=12)
    )
    own = ["student_sampling" in row["flops"] for row in mixed.metrics]
    assert 0 < sum(own) < 12  # all alike by chance: 2 in 4096 seeds
    assert all(("teacher_sampling" in row["flops"]) != mine for row, mine in zip(mixed.metrics, own, strict=True))


def test_vopd_has_the_gradient_of_the_sampled_loss_in_expectation_and_less_noise(models, tmp_path):
    """One step on many samples: both agree on the direction of the exact gradient, the baseline far closer."""
    student, teacher = models

    def step(name: str, **method) -> dict[str, torch.Tensor]:
        tree = recipe(
            student,
            teacher,
            tmp_path / name,
            method={"type": "opd", **method},
            steps=1,
            optim={"clip": None, "weight_decay": 0.0},
        )
        tree["rollout"] = {"prompts_per_step": 8, "samples_per_prompt": 16, "max_tokens": 6}
        run = kibitz.train(tree)
        moments = load_file(run.checkpoint / "training" / "optimizer.safetensors")
        return {key: value for key, value in moments.items() if key.endswith("exp_avg")}  # one step: 0.1 x gradient

    def cosine(one, other) -> float:
        left, right = (torch.cat([tree[key].flatten() for key in sorted(tree)]) for tree in (one, other))
        return torch.cosine_similarity(left, right, dim=0).item()

    exact = step("full")
    plain, baseline = step("plain", support="sampled"), step("vopd", support="sampled", baseline=True)
    assert cosine(exact, baseline) > cosine(exact, plain) > 0
    assert cosine(exact, baseline) > 0.5


def test_rewards_join_the_teachers_advantage(models, tmp_path):
    """The advantages of both are added: with all rewards equal the run is plain opd, otherwise it is not."""
    method = {"type": "opd", "support": "sampled", "reward_coef": 1.0}
    runs = {
        name: kibitz.train(recipe(*models, tmp_path / name, method=method, steps=2), grader=grader)
        for name, grader in {"equal": lambda p, t: 1.0, "graded": lambda p, t: float(len(t) % 2)}.items()
    }
    plain = kibitz.train(recipe(*models, tmp_path / "plain", method={"type": "opd", "support": "sampled"}, steps=2))
    losses = {name: [row["loss"] for row in run.metrics] for name, run in runs.items()}
    assert losses["equal"] == [row["loss"] for row in plain.metrics]
    assert losses["graded"] != losses["equal"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"baseline": True}, "baseline belongs to the policy gradient"),
        ({"support": "sampled", "baseline": True, "discount": 0.5}, "write method.policy.discount=0"),
        ({"support": "sampled", "divergence": "jsd"}, "estimates reverse_kl only"),
    ],
)
def test_settings_that_exclude_each_other(models, tmp_path, method, message):
    with pytest.raises(kibitz.RecipeError, match=message):
        kibitz.train(recipe(*models, tmp_path / "run", method={"type": "opd", **method}))


def test_a_prompt_that_is_taken_twice_in_a_step_is_answered_twice(models, tmp_path):
    """Fewer prompts than a step takes: each copy has samples of its own, under the prompt's own key."""
    tree = recipe(*models, tmp_path / "run", steps=1, data={"limit": 1}, rollout={"prompts_per_step": 6, "store": True})
    run = kibitz.train(tree)
    rows = [json.loads(line) for line in (run.folder / "stored.jsonl").read_text().split("\n") if line]
    assert len(rows) == 12
    assert len({row["prompt_key"] for row in rows}) == 1
    assert len({tuple(row["response_ids"]) for row in rows}) > 6  # two alike by chance: rare; six pairs: never


def test_an_old_run_is_thrown_away_only_when_the_new_one_is_loaded(models, tmp_path):
    """A recipe that is refused late leaves the old run whole, and the old checkpoint can be the new student."""
    run = kibitz.train(recipe(*models, tmp_path / "run", steps=1))
    tree = recipe(run.checkpoint, models[1], tmp_path / "run", steps=1)
    with pytest.raises(kibitz.RecipeError, match="positions"):
        kibitz.train(tree, ["rollout.max_tokens=1000"], overwrite=True)
    assert run.checkpoint.is_dir()
    again = kibitz.train(tree, overwrite=True)
    assert again.metrics[0]["loss"] < run.metrics[0]["loss"] * 1.5
    assert not torch.equal(*(weights(path)["lm_head.weight"] for path in (again.checkpoint, models[0])))
    with pytest.raises(ValueError, match="choose one of them"):
        kibitz.train(tree, resume=True, overwrite=True)
