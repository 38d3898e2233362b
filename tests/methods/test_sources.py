"""Sources against their limits: what they write when they are switched off, when they take over, and in between."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.runs import crash, recipe, teacher_model, timeless

import kibitz
from kibitz import methods
from kibitz.batching import pack
from kibitz.config import GuardConfig, RecipeError
from kibitz.engines.fake import FakeEngine
from kibitz.engines.torch import TorchEngine
from kibitz.methods.sources import Generated, Linear, Mix, Seeded, Stored
from kibitz.methods.stored import as_row, load_rollouts, save_rollouts
from kibitz.training.guards import Guards
from kibitz.training.setup import prepare
from kibitz.types import Prompt, Rollout, Sampling, Step, Writer

NOW = Step(0, 1, seed=7)
LIMIT = 12  # rollout.max_tokens of `support.recipe`


@pytest.fixture(scope="module")
def world(models, tmp_path_factory) -> SimpleNamespace:
    """Loaded models, prompts, and both as sources: `student` and `teacher`."""
    setup = prepare(recipe(*models, tmp_path_factory.mktemp("world") / "run"))
    setup.parts.student.requires_grad_(False)
    engines = {"student": TorchEngine(setup.parts.student), "teacher": TorchEngine(teacher_model(setup))}
    student = Generated(engines["student"], setup.parts.sampling)
    teacher = Generated(engines["teacher"], setup.parts.sampling, Writer.TEACHER)
    return SimpleNamespace(setup=setup, prompts=setup.stream.prompts[:8], student=student, teacher=teacher)


def seeded(world, num: int, end: int | None = None, learn: bool = False) -> Seeded:
    return Seeded(world.teacher, world.student, Linear(num, num if end is None else end), learn)


def num_seeded(rollout) -> int:
    """How many tokens the teacher wrote."""
    return 0 if rollout.writer_T is None else int((rollout.writer_T == Writer.TEACHER).sum())


def content(rollouts: list[Rollout]) -> list:
    """All that a rollout says, comparable bit for bit."""
    return [(as_row(r), [] if r.writer_T is None else r.writer_T.tolist()) for r in rollouts]


def stored(run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "stored.jsonl").read_text().splitlines()]


def train(models, folder: Path, method: dict, **sections):
    return kibitz.train(recipe(*models, folder, method={"type": "opd", **method}, **sections))


# ------------------------------------------------------------------ schedules


def test_progress_goes_from_0_at_the_first_step_to_1_at_the_last():
    assert [Step(n, 5, 0).progress for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert Step(0, 1, 0).progress == 0
    assert Step(9, 5, 0).progress == 1  # a run that is shortened after the fact


def test_a_number_follows_the_line_between_its_ends():
    assert [Linear(4, 12).at(Step(n, 5, 0)) for n in range(5)] == [4, 6, 8, 10, 12]
    assert [Linear(8, 0).at(Step(n, 3, 0)) for n in range(3)] == [8, 4, 0]
    assert {Linear(0.3, 0.3).at(Step(n, 7, 0)) for n in range(7)} == {0.3}


def test_a_mix_follows_its_share():
    """Over 400 steps from 1 to 0: the student writes the first, not the last, and 200 of them with a deviation below 8.2.
    To be off by 40 has odds below 1e-6."""

    def named(name: str):
        return SimpleNamespace(rollout=lambda prompts, step: [name])

    mix = Mix(named("own"), named("other"), Linear(1, 0))
    wrote = [mix.rollout([], Step(n, 400, seed=n))[0] for n in range(400)]
    assert (wrote[0], wrote[-1]) == ("own", "other")
    assert abs(wrote.count("own") - 200) < 40
    assert wrote[:200].count("own") > wrote[200:].count("own")
    again = [mix.rollout([], Step(n, 400, seed=n))[0] for n in range(400)]
    assert wrote == again


def test_gkd_can_leave_its_own_text(models, tmp_path):
    method = {"type": "gkd", "on_policy": 1.0, "on_policy_end": 0.0}
    rows = train(models, tmp_path / "run", method).metrics
    own = ["student_sampling" in row["flops"] for row in rows]
    assert own[0] and not own[-1]


# ------------------------------------------------------------------ truncated prefixes


def test_a_prefix_of_all_tokens_is_plain_opd_bit_for_bit(models, tmp_path):
    plain = train(models, tmp_path / "plain", {}, steps=2)
    for grows in (True, False):
        run = train(models, tmp_path / str(grows), {"prefix_tokens": LIMIT, "prefix_grows": grows}, steps=2)
        assert timeless(run.metrics) == timeless(plain.metrics)
        first, second = (load_file(r.checkpoint / "model.safetensors") for r in (run, plain))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_prefix_is_the_beginning_of_the_whole_response(world):
    whole = world.student.rollout(world.prompts, NOW)
    short = replace(world.student, limit=Linear(5, 5)).rollout(world.prompts, NOW)
    for one, other in zip(short, whole, strict=True):
        assert one.response_ids == other.response_ids[:5]
        torch.testing.assert_close(one.logp_T, other.logp_T[:5])
        assert one.finished == (other.finished and other.num_tokens <= 5)
        assert one.shortened == (not one.finished) and not one.cut_off
        assert one.weight_T().tolist() == [1.0] * one.num_tokens
    assert {r.shortened for r in short} == {True, False}  # else nothing was tried
    assert not any(r.shortened for r in whole) and any(r.cut_off for r in whole)


def test_shortened_rollouts_are_not_cut_off_ones(world):
    whole = world.student.rollout(world.prompts, NOW)
    short = replace(world.student, limit=Linear(5, 5)).rollout(world.prompts, NOW)
    masked, _ = Guards(GuardConfig(cut_off="mask")).mask([*short, *whole])
    assert [bool(r.weight_T().any()) for r in masked] == [True] * len(short) + [r.finished for r in whole]


def test_a_growing_prefix_is_that_long_at_each_step_and_has_no_reward(models, tmp_path):
    run = train(models, tmp_path / "run", {"prefix_tokens": 4}, steps=5, rollout={"store": True})
    lengths = {
        step: max(len(row["response_ids"]) for row in stored(run) if row["step"] == step) for step in range(1, 6)
    }
    assert lengths == {1: 4, 2: 6, 3: 8, 4: 10, 5: 12}
    for row in run.metrics:
        rows = [one for one in stored(run) if one["step"] == row["step"]]
        open_ends = sum(not one["finished"] for one in rows) / len(rows)
        assert open_ends > 0
        assert (row["shortened"], row["cut_off"]) == ((open_ends, 0) if row["step"] < 5 else (0, open_ends))
        assert ("reward" in row) == (row["step"] == 5)


def test_a_short_prefix_costs_less(models, tmp_path):
    flops = [
        train(models, tmp_path / str(num), {"prefix_tokens": num, "prefix_grows": False}, steps=1).metrics[0]["flops"]
        for num in (2, LIMIT)
    ]
    assert all(flops[0][name] < flops[1][name] for name in flops[1])


def test_the_growth_of_a_prefix_is_no_length_inflation():
    def alarms(shortened: float) -> set[str]:
        guards = Guards(GuardConfig())
        rows = ({"step": n, "response_tokens": 10.0 + n, "cut_off": 0.0, "shortened": shortened} for n in range(1, 101))
        return {alarm.name for row in rows for alarm in guards.watch_step(row)}

    assert alarms(0.0) == {"length_inflation"}
    assert alarms(0.9) == set()


# ------------------------------------------------------------------ exploration


def test_epsilon_draws_from_the_mixture_and_says_so():
    """8000 draws against (1 - epsilon) S + epsilon / V. A chi-square of 7 degrees of freedom above 30: odds 1e-4."""
    logits_VV = torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0, -1.0, -40.0, -40.0]).expand(8, 8)
    mixture_V = 0.7 * logits_VV[0].double().softmax(-1) + 0.3 / 8
    sampling = Sampling(max_tokens=40, num_samples=200, epsilon=0.3)
    rollouts = FakeEngine(logits_VV).generate([Prompt((1,), "", "a")], sampling)
    ids = torch.tensor([token for r in rollouts for token in r.response_ids])
    logp = torch.cat([r.logp_T for r in rollouts]).double()
    torch.testing.assert_close(logp, mixture_V.log()[ids], rtol=1e-5, atol=1e-5)
    expected_V = mixture_V * len(ids)
    assert ((ids.bincount(minlength=8) - expected_V) ** 2 / expected_V).sum() < 30


def test_only_the_student_explores(world):
    wild = replace(world.student.sampling, epsilon=0.9)
    assert content(replace(world.teacher, sampling=wild).rollout(world.prompts, NOW)) == content(
        world.teacher.rollout(world.prompts, NOW)
    )
    assert content(replace(world.student, sampling=wild).rollout(world.prompts, NOW)) != content(
        world.student.rollout(world.prompts, NOW)
    )


def test_evaluations_do_not_explore(models, tmp_path):
    wild, tame = (
        train(models, tmp_path / str(epsilon), {}, steps=1, rollout={"epsilon": epsilon}) for epsilon in (0.5, 0.0)
    )
    assert wild.evals[0] == tame.evals[0]
    assert wild.metrics[0]["loss"] != tame.metrics[0]["loss"]


# ------------------------------------------------------------------ teacher-seeded


def test_a_seed_of_nothing_is_the_student_alone(world):
    assert content(seeded(world, 0).rollout(world.prompts, NOW)) == content(world.student.rollout(world.prompts, NOW))
    last = Step(9, 10, seed=7)
    assert content(seeded(world, 6, end=0).rollout(world.prompts, last)) == content(
        world.student.rollout(world.prompts, last)
    )


def test_a_seed_of_everything_is_the_teacher_alone(world):
    ours = seeded(world, LIMIT, learn=True).rollout(world.prompts, NOW)
    teachers = world.teacher.rollout(world.prompts, NOW)
    assert content(ours) == content(teachers)
    assert all(r.weight_T().all() and num_seeded(r) == r.num_tokens for r in ours)


def test_everybody_wrote_what_the_marks_say(world):
    """The beginning is the teacher's own, the log-probabilities are those of each writer's full forward pass."""
    rollouts = seeded(world, 4).rollout(world.prompts, NOW)
    teachers = world.teacher.rollout(world.prompts, NOW)
    for rollout, teachers_own in zip(rollouts, teachers, strict=True):
        assert rollout.prompt is teachers_own.prompt and rollout.sample == teachers_own.sample
        assert rollout.response_ids[:4] == teachers_own.response_ids[:4]
        size = num_seeded(rollout)
        assert size == min(4, teachers_own.num_tokens) and rollout.num_tokens <= LIMIT
        num_own = rollout.num_tokens - size
        assert rollout.writer_T.tolist() == [Writer.TEACHER] * size + [Writer.STUDENT] * num_own
        assert rollout.weight_T().tolist() == [0.0] * size + [1.0] * num_own
        assert rollout.finished == (rollout.response_ids[-1] in world.student.sampling.stop_ids)
        assert rollout.finished or rollout.num_tokens == LIMIT
        ids, first = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]]), len(rollout.prompt.ids) - 1
        token_T1 = torch.tensor(rollout.response_ids)[:, None]
        student_T, teacher_T = (
            m.model(ids).logits[0, first:-1, : m.vocab_size].log_softmax(-1).gather(-1, token_T1)[:, 0]
            for m in (world.setup.parts.student, teacher_model(world.setup))
        )
        want_T = torch.where(rollout.writer_T == Writer.TEACHER, teacher_T, student_T)
        torch.testing.assert_close(rollout.logp_T, want_T.detach(), rtol=1e-4, atol=1e-4)
    assert any(r.num_tokens > num_seeded(r) for r in rollouts)


def test_a_seeded_rollout_does_not_depend_on_the_batch(world):
    source = seeded(world, 4)
    together = content(source.rollout(world.prompts, NOW))
    alone = [one for prompt in world.prompts for one in content(source.rollout([prompt], NOW))]
    ids = [[row["response_ids"] for row, _ in rows] for rows in (together, alone)]
    assert ids[0] == ids[1]
    assert together == content(source.rollout(world.prompts, NOW))
    assert together != content(source.rollout(world.prompts, Step(0, 1, seed=8)))


def test_the_student_does_not_repeat_the_teachers_draws():
    """Both draw uniformly from 1000 tokens: with the same random numbers the student would write the seed again."""
    engine, sampling = FakeEngine(torch.zeros(1000, 1000)), Sampling(max_tokens=8, num_samples=2)
    prompts = [Prompt((1,), "", key) for key in ("a", "b")]
    source = Seeded(Generated(engine, sampling, Writer.TEACHER), Generated(engine, sampling), Linear(4, 4))
    rollouts = source.rollout(prompts, NOW)
    parts = [tuple(part) for r in rollouts for part in (r.response_ids[:4], r.response_ids[4:])]
    assert [len(part) for part in parts] == [4] * 8 and len(set(parts)) == 8  # 3e-11 by chance
    assert [(r.prompt.key, r.sample) for r in rollouts] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_a_seed_keeps_to_the_prefix(world):
    source = replace(seeded(world, 4), student=replace(world.student, limit=Linear(6, 6)))
    for rollout in source.rollout(world.prompts, NOW):
        assert rollout.num_tokens <= 6 and num_seeded(rollout) <= 4
        assert rollout.shortened == (not rollout.finished)
    all_of_it = replace(source, num_tokens=Linear(9, 9), learn=True).rollout(world.prompts, NOW)
    assert {num_seeded(r) == r.num_tokens <= 6 for r in all_of_it} == {True}


def test_a_run_learns_the_students_tokens_only(models, tmp_path):
    seeds = {"seed_tokens": 8, "seed_decays": True}
    run = train(models, tmp_path / "run", seeds, steps=5, rollout={"store": True}, optim={"tokens_per_micro_batch": 60})
    for row, size in zip(run.metrics, (8, 6, 4, 2, 0), strict=True):
        rows = [one for one in stored(run) if one["step"] == row["step"]]
        assert max(one.get("writers", []).count(Writer.TEACHER) for one in rows) == size
        total = sum(len(one["response_ids"]) for one in rows)
        given = sum(one.get("writers", []).count(Writer.TEACHER) for one in rows)
        assert row["num_tokens"] == total - given
        assert row["teacher_written"] == pytest.approx(given / total)
    learnt = train(models, tmp_path / "learnt", seeds | {"learn_seed": True}, steps=1, rollout={"store": True})
    assert learnt.metrics[0]["num_tokens"] == sum(len(one["response_ids"]) for one in stored(learnt))


def test_the_teacher_is_paid_for_the_beginning_only(models, tmp_path):
    flops = [
        train(models, tmp_path / str(n), {"seed_tokens": n, "learn_seed": True}, steps=1).metrics[0]["flops"]
        for n in (1, LIMIT)
    ]
    assert flops[0]["teacher_sampling"] < 0.7 * flops[1]["teacher_sampling"]
    assert "student_sampling" in flops[0] and "student_sampling" not in flops[1]


@pytest.mark.parametrize("method", [{}, {"support": "sampled"}, {"support": "sampled", "discount": 0.5}])
def test_the_loss_of_a_seeded_step_is_that_of_the_students_tokens(models, tmp_path, method):
    """Against full forward passes in float64. No credit flows from the seed either: it comes first."""
    setup = prepare(recipe(*models, tmp_path / "run", method={"type": "opd", "seed_tokens": 4, **method}))
    built = methods.build(setup.parts)
    scored = built.signal(built.rollout(setup.stream.take(4), NOW), NOW)
    loss, _ = built.loss(setup.parts.student, pack(scored, setup.parts.student.device))
    want = 0.0
    for rollout in (one.rollout for one in scored):
        ids, first = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]]), len(rollout.prompt.ids) - 1
        with torch.no_grad():
            student_TV, teacher_TV = (
                m.model(ids).logits[0, first:-1, : m.vocab_size].double().log_softmax(-1)
                for m in (setup.parts.student, teacher_model(setup))
            )
        gap_TV = (student_TV - teacher_TV)[num_seeded(rollout) :]
        if not method:
            want += (student_TV[num_seeded(rollout) :].exp() * gap_TV).sum().item()
            continue
        token_T1 = torch.tensor(rollout.response_ids)[num_seeded(rollout) :, None]
        credit = 0.0
        for gap in (
            gap_TV.gather(-1, token_T1)[:, 0].flip(0).tolist()
        ):  # at a ratio of 1 the loss is minus the advantage
            credit = gap + method.get("discount", 0.0) * credit
            want += credit
    assert any(one.rollout.num_tokens > num_seeded(one.rollout) > 0 for one in scored)
    assert loss.item() == pytest.approx(want, rel=1e-4)


def test_resumed_schedules_go_on_where_they_were(models, tmp_path):
    method = {"prefix_tokens": 4, "seed_tokens": 3, "seed_decays": True}
    sections = {"steps": 5, "save": {"every": 2}, "rollout": {"store": True}}

    whole = train(models, tmp_path / "whole", method, **sections)
    tree = recipe(*models, tmp_path / "part", method={"type": "opd", **method}, **sections)
    crash(tree)
    assert max(row["step"] for row in stored(whole)) == 5
    run = kibitz.train(tree, resume=True)
    assert stored(run) == stored(whole)
    assert timeless(run.metrics) == timeless(whole.metrics)


# ------------------------------------------------------------------ stored rollouts

ONE_EPOCH = {"data": {"limit": 16}, "steps": 2}


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    """A run of one epoch that kept its rollouts."""
    return train(models, tmp_path_factory.mktemp("written") / "run", {}, **ONE_EPOCH, rollout={"store": True})


def test_stored_rollouts_repeat_the_run_that_wrote_them(models, written, tmp_path):
    """Same rollouts, same weights, so the same losses bit for bit, and nobody samples."""
    run = train(models, tmp_path / "run", {"rollouts": str(written.folder / "stored.jsonl")}, **ONE_EPOCH)
    for name in ("loss", "grad_norm", "num_tokens", "cut_off", "reverse_kl", "response_tokens"):
        assert [row[name] for row in run.metrics] == [row[name] for row in written.metrics], name
    first, second = (load_file(r.checkpoint / "model.safetensors") for r in (run, written))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(row["flops"].keys() == {"student_training", "teacher_scoring"} for row in run.metrics)
    assert all("reward" not in row for row in run.metrics)


def test_sft_learns_stored_rollouts(models, written, tmp_path):
    method = {"type": "sft", "rollouts": str(written.folder / "stored.jsonl")}
    row = train(models, tmp_path / "run", method, **ONE_EPOCH).metrics[0]
    assert row["loss"] == pytest.approx(-written.metrics[0]["student_logp"], rel=1e-6)


def test_sft_on_its_own_text_takes_each_steps_from_the_student_of_that_step(models, tmp_path):
    """A text's loss is what it was sampled with, which a student of other weights would not give it."""
    method, optim = {"type": "sft", "source": "student"}, {"lr": 1e-2, "schedule": "constant"}
    run = train(models, tmp_path / "run", method, steps=3, rollout={"store": True}, optim=optim)
    rows = [json.loads(line) for line in (run.folder / "stored.jsonl").read_text().splitlines()]
    for metrics in run.metrics:
        logps = [logp for row in rows if row["step"] == metrics["step"] for logp in row["logp"]]
        assert metrics["num_tokens"] == len(logps)
        assert metrics["loss"] == pytest.approx(-sum(logps) / len(logps), rel=1e-5)
        assert metrics["flops"].keys() == {"student_training", "student_sampling"}
    first, last = load_file(run.checkpoint / "model.safetensors"), load_file(models[0] / "model.safetensors")
    assert not all(torch.equal(first[name], last[name]) for name in last)


def test_sft_has_the_teacher_answer_what_the_data_does_not(models, tmp_path):
    """The given responses as they are, and for the other prompts what the teacher writes where it writes everything."""
    rows = [{"prompt": f"{i}+1"} | ({"response": f"{i + 1}"} if i % 2 else {}) for i in range(8)]
    wrote = {}
    for name, kept, method in (("some", rows, {"fill": "teacher"}), ("all", rows[::2], {"source": "teacher"})):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
        sections = {"data": {"prompts": str(tmp_path / f"{name}.jsonl"), "world": None}, "steps": 1}
        sections["rollout"] = {"prompts_per_step": len(kept), "store": True}
        run = train(models, tmp_path / name, {"type": "sft", **method}, **sections)
        wrote[name] = {(row["prompt_key"], row["sample"]): (row["response_ids"], row["writers"]) for row in stored(run)}
        assert run.metrics[0]["flops"].keys() == {"student_training", "teacher_sampling"}
    assert len(wrote["all"]) == 8 and wrote["all"].items() <= wrote["some"].items()
    given = [writers for place, (_, writers) in wrote["some"].items() if place not in wrote["all"]]
    assert len(given) == 4 and {one for writers in given for one in writers} == {Writer.DATASET}
    sections["data"]["prompts"] = str(tmp_path / "some.jsonl")
    with pytest.raises(ValueError, match="has no response.*method.fill=teacher for such rows"):
        train(models, tmp_path / "none", {"type": "sft"}, **sections)


def test_rollouts_come_back_as_they_were_stored(world, tmp_path):
    rollouts = [
        *world.student.rollout(world.prompts, NOW),
        *replace(seeded(world, 4), student=replace(world.student, limit=Linear(6, 6))).rollout(world.prompts, NOW),
    ]
    rollouts[0].writer_T = torch.tensor([Writer.ENVIRONMENT] + [Writer.STUDENT] * (rollouts[0].num_tokens - 1))
    save_rollouts(tmp_path / "r.jsonl", rollouts)
    found = load_rollouts(tmp_path / "r.jsonl", world.prompts, world.setup.parts.student.vocab_size, 4, LIMIT)
    back = [r for prompt in world.prompts for r in found[prompt.key]]
    want = [r for prompt in world.prompts for r in rollouts if r.prompt.key == prompt.key]
    for one, other in zip(back, want, strict=True):
        for name in ("response_ids", "finished", "sample", "shortened"):
            assert getattr(one, name) == getattr(other, name)
        assert torch.equal(one.logp_T, other.logp_T) and torch.equal(one.weight_T(), other.weight_T())
        assert not one.has_tokens_of(Writer.STUDENT) and not one.has_tokens_of(Writer.TEACHER)


def test_of_many_stored_rollouts_a_step_takes_some(world):
    prompt = world.prompts[0]
    many = [Rollout(prompt, [i], torch.zeros(1), True, sample=i) for i in range(20)]
    source = Stored({prompt.key: many}, num_samples=4)
    taken = [[r.sample for r in source.rollout([prompt], Step(n, 9, seed=n))] for n in range(9)]
    assert all(len(set(one)) == 4 and one == sorted(one) for one in taken)
    assert len({tuple(one) for one in taken}) > 1
    assert taken == [[r.sample for r in source.rollout([prompt], Step(n, 9, seed=n))] for n in range(9)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_key": "nobody"}, "line 2: no prompt of data has the key 'nobody'"),
        ({"prompt_ids": [1, 2]}, "line 2 was written for other prompt tokens"),
        ({"response_ids": [5, 10**6], "logp": [-1.0, -1.0]}, "no token 1000000"),
        ({"response_ids": [5, -1], "logp": [-1.0, -1.0]}, "no token -1"),
        ({"response_ids": [5, 5], "logp": [-1.0]}, "2 response_ids and 1 logp"),
        ({"response_ids": [5, 5], "logp": [-1.0, None]}, "logp must hold finite numbers"),
        ({"response_ids": [5, 5], "logp": [-1.0, -1.0], "writers": [0]}, "2 response_ids and 1 writers"),
        ({"response_ids": [], "logp": []}, "has no tokens"),
        ({"response_ids": [5] * 13, "logp": [-1.0] * 13}, "write rollout.max_tokens=13"),
        ({"finished": "yes"}, "finished must be a bool"),
        (None, "line 2 is no rollout, it lacks"),
    ],
)
def test_stored_rollouts_that_do_not_fit_are_refused(world, tmp_path, change, message):
    rows = [as_row(r) for r in world.student.rollout(world.prompts, NOW)]
    rows[1] = {"text": "hello"} if change is None else rows[1] | change
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        load_rollouts(tmp_path / "r.jsonl", world.prompts, world.setup.parts.student.vocab_size, 2, LIMIT)


def test_stored_rollouts_are_refused_before_weights_load(models, written, tmp_path, monkeypatch):
    monkeypatch.setattr("kibitz.training.setup.load_model", lambda *_: pytest.fail("weights were loaded"))
    path = written.folder / "stored.jsonl"

    def refusal(rollouts: Path, **sections) -> str:
        with pytest.raises(ValueError) as caught:
            train(models, tmp_path / "run", {"rollouts": str(rollouts)}, **(ONE_EPOCH | sections))
        return str(caught.value)

    assert "there is no file" in refusal(tmp_path / "none.jsonl")
    assert "a step takes 3" in refusal(path, rollout={"samples_per_prompt": 3})
    assert "has 0 rollouts of the prompt" in refusal(path, data={"limit": 17})
    assert "no prompt of data has the key" in refusal(path, data={"limit": 15})
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt_key": "a"')
    assert "line 1 is not JSON" in refusal(broken)


# ------------------------------------------------------------------ settings that exclude each other


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"prefix_tokens": 13}, "write method.prefix_tokens=12 or less"),
        ({"seed_tokens": 13}, "write method.seed_tokens=12 or less"),
        ({"seed_tokens": 12}, "nothing is left to learn: write method.seed_tokens=11"),
        ({"seed_tokens": 6, "prefix_tokens": 6}, "write method.seed_tokens=5"),
        ({"prefix_grows": False}, "write method.prefix_tokens=N"),
        ({"seed_decays": True}, "seed_decays needs a beginning"),
        ({"learn_seed": True}, "learn_seed needs a beginning"),
        ({"seed_tokens": 3, "learn_seed": True, "support": "sampled"}, "write method.support=full"),
        ({"rollouts": "r.jsonl", "support": "sampled"}, "stored ones are of an earlier one"),
        ({"rollouts": "r.jsonl", "prefix_tokens": 3}, "drop method.prefix_tokens or method.rollouts"),
        ({"rollouts": "r.jsonl", "seed_tokens": 3}, "drop method.seed_tokens or method.rollouts"),
        ({"prefix_tokens": 3, "support": "sampled", "reward_coef": 1.0}, "reward_coef rewards whole responses"),
        ({"type": "sft", "source": "teacher", "rollouts": "r.jsonl"}, "drop method.source=teacher"),
        ({"type": "sft", "source": "teacher", "fill": "teacher"}, "drop method.fill"),
        (
            {"type": "sft", "source": "student", "rollouts": "r.jsonl"},
            "the student writes none: drop method.source=student",
        ),
        ({"type": "gkd", "on_policy_end": 1.5}, "less than or equal to 1"),
    ],
)
def test_contradictions_are_refused(models, tmp_path, method, message):
    with pytest.raises(RecipeError, match=message):
        train(models, tmp_path / "run", method)


@pytest.mark.parametrize("method", [{"support": "sampled"}, {"type": "grpo"}])
def test_exploration_is_refused_where_a_ratio_needs_the_student_itself(models, tmp_path, method):
    with pytest.raises(RecipeError, match="epsilon"):
        train(models, tmp_path / "run", method, rollout={"epsilon": 0.1})
