"""Experiments: the arithmetic of their tables, what is run again and what is not, and pages that say what the files say."""

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from support.models import make_model
from support.paths import ROOT
from support.records import put, record
from typer.testing import CliRunner

import kibitz
from kibitz import experiments
from kibitz.cli import app
from kibitz.evaluate.statistics import t_quantile
from kibitz.experiments import design, pages, records, tables
from kibitz.experiments.design import Subject, cut, merged
from kibitz.experiments.plot import svg
from kibitz.experiments.study import Study

METHODS = experiments.get("methods")
TINY = replace(METHODS.quick(), dev_problems=4, test_problems=8)


# ------------------------------------------------------------------ arithmetic


def test_quantiles_of_t_hold_95_percent():
    """By Simpson's rule over the density between minus and plus the quantile."""
    for nu in range(1, 40):
        quantile = t_quantile(nu)
        constant = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
        num, width = 20_000, 2 * quantile / 20_000
        density = [constant * (1 + (i * width - quantile) ** 2 / nu) ** (-(nu + 1) / 2) for i in range(num + 1)]
        inside = width / 3 * (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2]))
        assert inside == pytest.approx(0.95, abs=2e-4)


def test_the_interval_adds_seeds_and_problems():
    mean, half = records.share_with_interval([0.8, 0.9, 0.7], 100)
    assert mean == pytest.approx(0.8)
    assert half == pytest.approx(math.hypot(4.303 * 0.1 / math.sqrt(3), 1.96 * math.sqrt(0.8 * 0.2 / 100)))
    assert records.share_with_interval([0.8], 100)[1] == pytest.approx(1.96 * 0.04)
    assert records.half_of_seeds([0.1] * 12) == 0.0


def test_the_rate_is_chosen_on_the_dev_split_and_the_table_shows_the_test_split(tmp_path):
    put(
        tmp_path,
        record("opd", 1e-3, 0, dev=0.9, test=0.5),
        record("opd", 1e-3, 1, dev=0.1, test=0.6),
        record("opd", 2e-3, 0, dev=0.8, test=1.0),
        record("grpo", 1e-3, 0, dev=0.7, test=0.7),
        record("gkd", 1e-3, 0, dev=0.7),  # chosen, and not measured yet
    )
    first, second = tables.rows(METHODS, tmp_path)
    assert (first.arm, first.rate, first.num_seeds) == ("grpo", 1e-3, 1)
    assert (second.arm, second.rate, second.num_seeds) == ("opd", 1e-3, 2)
    assert second.sampled[0] == pytest.approx(0.55)
    assert second.reverse_kl == (pytest.approx(0.45), pytest.approx(12.706 * 0.1 / 2))
    assert (second.student_gflop, second.teacher_gflop, second.other_gflop) == (4.0, 2.0, 5.0)
    assert second.cpu_seconds == 2.0


def test_of_equal_rates_the_lowest_is_taken():
    sweep = {rate: record("opd", rate, 0, dev) for rate, dev in ((4e-3, 0.9), (1e-3, 0.9), (2e-3, 0.9), (5e-4, 0.8))}
    assert records.best_rate(sweep) == 1e-3


def test_without_answers_the_nearest_to_the_teacher_is_taken():
    assert records.score({"dev": {"reverse_kl": 0.1}}) > records.score({"dev": {"reverse_kl": 0.2}})


def test_arms_are_told_apart_by_the_interval_of_their_difference(tmp_path):
    shares = {"opd": 0.8, "grpo": 0.5, "gkd": 0.79, "opd-fkl": 0.99}
    text = tables.markdown(METHODS, put(tmp_path, *(record(arm, 1e-3, 0, 0.5, share) for arm, share in shares.items())))
    assert "- above `opd`: `opd-fkl`\n- below `opd`: `grpo`\n- not told apart from `opd`: `gkd`" in text
    assert "| `grpo` | reward only, 8 samples a prompt | 0.001 | 50.0 ± 9.8 |" in text


def test_a_best_rate_that_may_lie_beyond_is_named(tmp_path):
    sweep = {1e-3: 0.9, 2e-3: 0.8, 4e-3: 0.7}
    put(tmp_path, *(record("gad", rate, 0, dev, 0.5) for rate, dev in sweep.items()))
    put(tmp_path, *(record("opd", rate, 0, 1 - abs(dev - 0.8), 0.5) for rate, dev in sweep.items()))
    assert "The best rate is the lowest or highest tried: `gad`." in tables.markdown(METHODS, tmp_path)


def test_the_table_ends_with_every_model_as_it_was(tmp_path):
    asked = replace(METHODS, models={"student": "a/b", "teacher": "a/c", "bpe": "a/d"})
    put(tmp_path, record("opd", 1e-3, 0, dev=0.8, test=0.7))
    for role, share in (("student", 0.5), ("bpe", 0.9)):
        records.write(tmp_path / f"{role}.json", {"test": record("", 0, 0, 0, share)["test"]})
    ends = [line for line in tables.markdown(asked, tmp_path).splitlines() if line.startswith("| *")]
    assert [line.split("|")[1].strip() for line in ends] == ["*the student before*", "*the bpe*"]
    assert "50.0 ± 9.8" in ends[0]
    assert "90.0 ± 5.9" in ends[1]


# ------------------------------------------------------------------ designs


def test_sections_are_merged_and_methods_replaced():
    whole = merged({"optim": {"a": 1}, "method": {"type": "x", "k": 1}}, {"optim": {"b": 2}, "method": {"type": "y"}})
    assert whole == {"optim": {"a": 1, "b": 2}, "method": {"type": "y"}}


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS.values(), ids=lambda e: e.name)
def test_every_arm_is_a_recipe(experiment):
    names = [arm.name for arm in experiment.arms]
    assert len(set(names)) == len(names)
    assert {experiment.reference, *experiment.quick_arms} - {""} <= set(names)
    families = {arm.family for arm in experiment.arms} - {""}
    assert not families & set(names), "`arm:NAME` would name two things"
    names += [maker.name for maker in experiment.makers]
    quick = experiment.quick()
    for arm in (*experiment.arms, *quick.arms, *experiment.makers, *quick.makers):
        recipe = Subject.of(experiment).recipe(experiment, arm, 1e-3, 7)
        assert recipe.optim.lr == 1e-3 and recipe.seed == 7
        assert set(arm.needs()) <= set(names) | families
        assert set(arm.judge) <= set(experiment.measures)
    for arm in experiment.arms if experiment.find is None and not experiment.outside else ():
        recipe = Subject.of(experiment).recipe(experiment, arm, 1e-3, 7)
        writers = 2 if recipe.method.type == "distillm2" else 1  # student and teacher both answer each prompt
        assert writers * recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt == 64
        assert recipe.data.limit == recipe.steps * recipe.rollout.prompts_per_step


def test_rates_move_together():
    moved = METHODS.around(5e-5)
    assert moved.rates == pytest.approx([r / 20 for r in METHODS.rates])


def test_mistyped_names_are_told():
    with pytest.raises(ValueError, match="did you mean 'grpo'"):
        METHODS.choose(["gpro"])
    with pytest.raises(ValueError, match="did you mean 'methods'"):
        experiments.get("method")


def test_a_file_is_cut_into_splits_that_share_no_prompt(tmp_path):
    rows = [{"prompt": f"{i % 150}+1", "answer": i} for i in range(300)]  # each prompt twice
    source = tmp_path / "p.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    cut(source, tmp_path / "cut")
    parts = {
        split: [json.loads(line) for line in (tmp_path / "cut" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "dev", "test")
    }
    assert sorted(row["answer"] for part in parts.values() for row in part) == list(range(300))
    prompts = [{row["prompt"] for row in part} for part in parts.values()]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    with pytest.raises(ValueError, match="there is no file .*q.jsonl to take prompts from"):
        cut(tmp_path / "q.jsonl", tmp_path / "cut")
    source.write_text('{"prompt": "1"}\n[]\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        cut(source, tmp_path / "cut")
    source.write_text('{"prompt": "1"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="one of them is empty"):
        cut(source, tmp_path / "cut")


# ------------------------------------------------------------------ studies


@pytest.mark.parametrize(
    ("peak", "beyond", "best"),
    [
        (1e-3, [], 1e-3),
        (4e-3, [4e-3, 8e-3], 4e-3),
        (9e-3, [4e-3, 8e-3], 8e-3),
        (1e-4, [2.5e-4, 1.25e-4], 1.25e-4),
        (2.5e-4, [2.5e-4, 1.25e-4], 2.5e-4),
    ],
)
def test_a_best_rate_at_the_edge_is_tried_against_one_beyond(monkeypatch, tmp_path, peak, beyond, best):
    made = []

    def trained(self, arm, rate, seed):
        made.append(rate)
        return record(arm.name, rate, seed, dev=1 / (1 + abs(math.log(rate / peak))))

    monkeypatch.setattr(Study, "trained", trained)
    study = Study(METHODS, Subject.of(METHODS), tmp_path, tmp_path)
    assert study.sweep(METHODS.arms[0]) == best
    assert made == [*METHODS.rates, *beyond]


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    """Models of another architecture than the shipped ones, from folders."""
    folder = tmp_path_factory.mktemp("models")
    student, teacher = (str(make_model(folder / name, seed, kind="llama")) for seed, name in enumerate(("s", "t")))
    return Subject.of(METHODS, {"student": student, "teacher": teacher}, overrides=("rollout.max_tokens=6", "steps=1"))


def test_what_was_run_is_not_run_again(monkeypatch, tmp_path, subject):
    study = Study(TINY, subject, tmp_path / "results", tmp_path / "work")
    arms = TINY.choose(["sft-teacher", "opd"])
    study.run(arms, seeds=2)
    files = sorted(path.name for path in study.folder.glob("*.json"))
    wanted = [f"{arm}-0.001-{seed}.json" for arm in ("opd", "sft-teacher") for seed in (0, 1)]
    assert files == [*wanted, "student.json", "teacher.json"]
    found = json.loads((study.folder / "opd-0.001-1.json").read_text())
    assert found["settings"]["student"] == subject.models["student"] and found["settings"]["recipe"]["seed"] == 1
    assert found["dev"]["split"] == "dev" and found["dev"]["num_prompts"] == 4
    assert found["test"]["split"] == "test" and found["test"]["num_prompts"] == 8
    assert set(found["flops"]) == {"student_sampling", "student_training", "teacher_scoring"}

    runs = []
    monkeypatch.setattr(kibitz, "train", lambda *_, **__: runs.append(1) or pytest.fail("it trains again"))
    study.run(arms, seeds=2)
    assert not runs
    monkeypatch.undo()
    (study.folder / "opd-0.001-1.json").unlink()  # as if it had been killed before this one
    study.run(arms, seeds=2)
    again = json.loads((study.folder / "opd-0.001-1.json").read_text())
    timeless = ("settings", "flops", "dev", "test", "tokens")
    assert {name: again[name] for name in timeless} == {name: found[name] for name in timeless}
    longer = replace(subject, overrides=("rollout.max_tokens=6", "steps=2"))
    changed = Study(TINY, longer, study.folder, study.work).trained(TINY.arms[0], 1e-3, 0)
    assert changed["settings"]["recipe"]["steps"] == 2 and "test" not in changed
    Study(TINY, longer, study.folder, study.work).run(arms[:1], seeds=1)
    left = [path.name for path in study.folder.glob(f"{arms[0].name}-*.json")]
    assert left == [f"{arms[0].name}-0.001-0.json"], "a run of another recipe stands in no table"


def test_a_maker_makes_what_a_role_stands_for_once(monkeypatch, tmp_path, subject):
    """From random weights of a shape, for all seeds; and not where another model is named for the role."""
    changes = {"student": {"model": "blank:16x1"}, "method": {"type": "sft"}, "steps": 1}
    maker = design.Arm("made", "from nothing", changes, rates=(1e-3,))
    opd = replace(TINY.arm("opd"), changes={**TINY.arm("opd").changes, "teacher": {"model": "elder"}})
    small = replace(
        TINY, arms=(opd,), makers=(maker,), models={"student": "arithmetic/student", "elder": "arm:made"}, quick_arms=()
    )
    study = Study(small, Subject.of(small, overrides=("steps=1",)), tmp_path / "results", tmp_path / "work")
    study.run(seeds=2)
    files = sorted(path.name for path in study.folder.glob("*.json"))
    assert files == ["elder.json", "made-0.001-0.json", "opd-0.001-0.json", "opd-0.001-1.json", "student.json"]
    first, second = (json.loads((study.folder / f"opd-0.001-{seed}.json").read_text()) for seed in (0, 1))
    assert first["settings"]["on"] == second["settings"]["on"] and list(first["settings"]["on"]) == ["made"]
    assert study.place("elder", 0) == study.place("elder", 1)
    assert len(tables.rows(small, study.folder)) == 1, "a maker is no arm"

    monkeypatch.setattr(kibitz, "train", lambda *_, **__: pytest.fail("it trains again"))
    study.run(seeds=2)
    named = Subject.of(small, {"elder": subject.models["teacher"]})
    assert Study(small, named, tmp_path / "other", tmp_path / "work").place("elder", 0) == subject.models["teacher"]


def test_on_the_command_line_with_prompts_of_ones_own(monkeypatch, tmp_path, subject):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i % 10}+{i // 10}", "answer": str(i)} for i in range(60)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["reproduce", "methods", "--quick", "--only", "opd", "--prompts", "p.jsonl", "--output", "out", "--json"]
    named = ["--model", f"student={subject.models['student']}", "--teacher", subject.models["teacher"]]
    models = [*named, "rollout.max_tokens=6", "optim.lr=5e-5"]
    answer = CliRunner().invoke(app, [*words, *models])
    assert answer.exit_code == 0, answer.output
    (row,) = json.loads(answer.stdout)["rows"]
    assert row["arm"] == "opd" and row["rate"] == 5e-5
    record = (tmp_path / "out" / "methods" / "opd-5e-05-0.json").read_text()
    assert json.loads(record)["settings"]["student"] == subject.models["student"]
    assert str(tmp_path) not in record.replace(subject.models["student"], "")
    assert "`opd`" in Path("out/methods/table.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_of_them_quickly(monkeypatch, tmp_path):
    """`kibitz reproduce all --quick`, with the shipped models."""
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["reproduce", "all", "--quick", "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)["experiments"]
    shipped = {name: one for name, one in experiments.EXPERIMENTS.items() if not one.outside}
    assert list(found) == list(shipped)
    for name, experiment in shipped.items():
        assert {row["arm"] for row in found[name]["rows"]} >= {
            a for a in experiment.quick_arms if not experiment.arm(a).family
        }
        folder = tmp_path / "runs" / "quick" / name
        if experiment.find is not None:
            assert "not run yet" not in (folder / "table.md").read_text(encoding="utf-8"), name
            assert ET.parse(folder / "plot.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
def test_all_of_them_quickly_on_other_models(monkeypatch, tmp_path, subject):
    """The same files serve real models: folders of another architecture, with prompts of one's own. Those that want a model from
    outside, whose template knows a system's turn, have a test of their own (test_real.py)."""
    for name in [name for name, one in experiments.EXPERIMENTS.items() if one.outside]:
        monkeypatch.delitem(experiments.EXPERIMENTS, name)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i % 10}+{i // 10}", "answer": str(i), "response": str(i % 10)} for i in range(200)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["reproduce", "all", "--quick", "--prompts", "p.jsonl", "--json", "rollout.max_tokens=16"]
    models = [word for role, path in subject.models.items() for word in (f"--{role}", path)]
    answer = CliRunner().invoke(app, [*words, *models])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)["experiments"]
    assert list(found) == list(experiments.EXPERIMENTS)
    for name, experiment in experiments.EXPERIMENTS.items():
        assert found[name]["rows"] or not experiment.arms, name
        if experiment.find is not None:
            text = (tmp_path / "runs" / "quick" / name / "table.md").read_text(encoding="utf-8")
            assert "not run yet" not in text, name


def test_the_list_of_experiments():
    answer = CliRunner().invoke(app, ["reproduce", "--json"])
    assert [row["name"] for row in json.loads(answer.stdout)["experiments"]] == list(experiments.EXPERIMENTS)


# ------------------------------------------------------------------ pages


def test_the_plot_is_an_svg_of_every_arm(tmp_path):
    put(tmp_path, record("opd", 1e-3, 0, 0.5, 0.8), record("grpo", 1e-3, 0, 0.5, 0.55))
    text = svg(METHODS, tmp_path)
    names = [element.text for element in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert names.index("opd") < names.index("grpo") and "40" in names and "30" not in names
    assert svg(METHODS, tmp_path) == text


@pytest.mark.slow
def test_the_pages_say_what_the_results_say():
    """No number is typed by hand."""
    known, results = experiments.EXPERIMENTS, ROOT / "results"
    for name, experiment in known.items():
        if (results / experiment.home).is_dir():
            for file, text in pages.texts(experiment, results).items():
                assert (results / name / file).read_text(encoding="utf-8") == text, "stale: python docs/generate.py"
    for name in ("docs/comparison.md", "docs/teachers.md", "docs/tokenizers.md", "README.md"):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert pages.render(page, known, results) == page, "stale: python docs/generate.py"
    written = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert pages.evidence_page(known, results) == written, "stale: python docs/generate.py"
