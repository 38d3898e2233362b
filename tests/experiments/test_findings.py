"""From runs to what they say about a claim: costs at equal accuracy, intervals, arms made of arms, curves."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from support.records import put, record

from kibitz import experiments
from kibitz.experiments import charts, statistics
from kibitz.experiments.charts import Line, Panel, draw
from kibitz.experiments.claims import kl_direction
from kibitz.experiments.design import Arm, Experiment, Subject, with_models
from kibitz.experiments.evidence import overview
from kibitz.experiments.formats import times
from kibitz.experiments.results import NotRun, Results, gflop, sequences
from kibitz.experiments.study import Study

# ------------------------------------------------------------------ statistics


def test_the_cost_of_a_target_is_log_linear_between_points():
    points = [(10.0, 0.5), (40.0, 0.7), (160.0, 0.9)]
    assert statistics.cost_at(points, 0.6) == pytest.approx(20.0)  # half way in log cost
    assert statistics.cost_at(points, 0.9) == pytest.approx(160.0)
    assert statistics.cost_at(points, 0.3) == 10.0
    assert statistics.cost_at(points, 0.91) == math.inf
    assert statistics.cost_at([(40.0, 0.4), (10.0, 0.5), (160.0, 0.7)], 0.6) == pytest.approx(80.0)  # from 40, at 0.5


def test_the_ratio_of_costs_holds_for_curves_a_factor_apart():
    """Two curves with the same accuracies, one at four times the cost: 4, inside its interval. Without noise of seeds and
    with endless problems the interval is a point."""
    cheap = {1.0: [0.50, 0.54, 0.52], 2.0: [0.60, 0.64, 0.62], 4.0: [0.72, 0.70, 0.74]}
    dear = {4 * cost: shares for cost, shares in cheap.items()}
    ratio, low, high = statistics.cost_ratio(dear, cheap, 0.65, num_problems=500)
    assert ratio == pytest.approx(4.0) and low < 3.5 and high > 4.5
    still = {cost: [fmean(shares)] for cost, shares in cheap.items()}
    moved = {4 * cost: shares for cost, shares in still.items()}
    assert statistics.cost_ratio(moved, still, 0.65, 10**12) == pytest.approx((4.0, 4.0, 4.0), rel=1e-3)
    never = {cost: [0.1] for cost in dear}
    assert statistics.cost_ratio(never, cheap, 0.65, 500)[0] == math.inf


def test_a_draw_varies_as_seeds_and_problems_do():
    shares, num = [0.7, 0.8, 0.75, 0.72], 400
    rng = random.Random(0)
    draws = [statistics.resampled({1.0: shares}, num, rng)[0][1] for _ in range(20_000)]
    seeds = stdev(shares) * math.sqrt(3 / 4) / math.sqrt(4)  # of a mean of four draws with replacement
    problems = math.sqrt(fmean(shares) * (1 - fmean(shares)) / num)
    assert stdev(draws) == pytest.approx(math.hypot(seeds, problems), rel=0.03)
    assert fmean(draws) == pytest.approx(fmean(shares), abs=1e-3)


def test_a_line_and_its_bootstrap():
    xs = [1.0, 2.0, 3.0, 4.0]
    assert statistics.line(xs, [0.5 + 0.1 * x for x in xs]) == pytest.approx((0.5, 0.1))
    curve = {x: [0.5 + 0.1 * x, 0.48 + 0.1 * x] for x in xs}
    slope, low, high = statistics.bootstrap(curve, 10**6, lambda points: statistics.line(*zip(*points, strict=True))[1])
    assert slope == pytest.approx(0.1) and low < 0.1 < high and high - low < 0.03


def test_how_ratios_are_written():
    assert times((6.123, 4.0, 9.25)) == "6.1x (4.0–9.2)"
    assert times((3.0, 2.0, math.inf)) == "3.0x (2.0–∞)"
    assert times((0.0, 0.0, 15.0)) == "reached by the other only"
    assert times((math.inf, 5.0, math.inf)) == "over 5.0x, not reached"


def test_a_chart_of_nothing_that_has_a_logarithm_is_drawn_all_the_same():
    for points in ([], [(0.0, 0.5, 0.1)]):
        text = draw([Panel("t", "x", "y", [Line("a", points)], log_x=True, log_y=not points)])
        assert (
            "</svg>" in text and draw([Panel("t", "x", "y", [Line("a", points)], log_x=True, log_y=not points)]) == text
        )


def test_a_plot_does_not_follow_the_last_digits_of_a_processor():
    def drawn(off: float) -> str:
        points = [
            (x * (1 + off), y * (1 - off), 0.013 * (1 + off)) for x, y in ((160, 0.739), (640, 0.7871), (5120, 0.8391))
        ]
        flat = Panel("t", "x", "y", [Line("a", points)], {"teacher": 0.9624 * (1 + off)})
        return draw([flat, Panel("t", "x", "y", [Line("a", points), Line("b", points, dashed=True)], log_x=True)])

    assert drawn(0) == drawn(1e-9) == drawn(-1e-9) != drawn(1e-2)
    assert not charts.HASHED_ID.search(drawn(0))


# ------------------------------------------------------------------ designs

ROLLOUT = {"prompts_per_step": 4, "samples_per_prompt": 1, "max_tokens": 24}
CHAIN = Experiment(
    name="chain",
    question="?",
    world="arithmetic",
    recipe={"rollout": ROLLOUT, "threads": 1, "steps": 2},
    arms=(
        Arm("short", "", {"method": {"type": "sft"}, "steps": 1}, family="warm"),
        Arm("long", "", {"method": {"type": "sft"}}, family="warm"),
        Arm("taught", "", {"method": {"type": "opd"}, "student": {"model": "arm:warm"}}, every=1, stop="best"),
        Arm("again", "", {"method": {"type": "opd"}, "teacher": [{"model": "arm:taught"}, {"model": "teacher"}]}),
    ),
    rates=(1e-3,),
    seeds=1,
    dev_problems=8,
    test_problems=8,
    measures={"accuracy": "prompts", "wide": "wide"},
    data={"prompts": {"world": "arithmetic"}, "wide": {"world": "arithmetic-wide"}},
    series=("reward",),
)


def test_models_are_named_by_role_by_arm_and_by_folder():
    arms = {arm.name: arm.needs() for arm in CHAIN.arms}
    assert arms == {"short": [], "long": [], "taught": ["warm"], "again": ["taught"]}
    tree = {
        "student": {"model": "a"},
        "teacher": [{"model": "b"}, {"url": "c"}],
        "method": {"reference": {"model": "d"}},
    }
    placed = {
        "student": {"model": "A"},
        "teacher": [{"model": "B"}, {"url": "c"}],
        "method": {"reference": {"model": "D"}},
    }
    assert with_models(tree, str.upper) == placed
    roles = replace(CHAIN, models={"student": "x", "teacher": "y", "teacher-small": "z", "weak": "w"})
    named = Subject.of(roles, {"student": "S", "teacher": "T", "weak": "W"})
    assert named.models == {"student": "S", "teacher": "T", "teacher-small": "T", "weak": "W"}
    assert Subject.of(roles).models == roles.models
    with pytest.raises(ValueError, match="no role 'wek'; it has: student"):
        Subject.of(roles, {"wek": "W"})
    assert Subject.of(CHAIN, files={"": "a.jsonl", "wide": "b.jsonl"}).files == {
        "prompts": "a.jsonl",
        "wide": "b.jsonl",
    }
    with pytest.raises(ValueError, match="no source of prompts 'wied'"):
        Subject.of(CHAIN, files={"wied": "a.jsonl"})
    with pytest.raises(ValueError, match="also takes prompts from prompts: give them files too"):
        Subject.of(CHAIN, files={"wide": "b.jsonl"})


# ------------------------------------------------------------------ studies


@pytest.mark.slow
def test_arms_are_made_of_arms_and_stop_where_they_are_best(monkeypatch, tmp_path):
    study = Study(CHAIN, Subject.of(CHAIN), tmp_path / "results", tmp_path / "work")
    study.run()
    names = {path.stem for path in study.folder.glob("*.json")}
    assert names == {"short-0.001-0", "long-0.001-0", "taught-0.001-0", "again-0.001-0", "student", "teacher"}
    rows = {name: json.loads((study.folder / f"{name}.json").read_text()) for name in names}
    warm = {name: rows[f"{name}-0.001-0"] for name in ("short", "long")}
    best = max(warm, key=lambda name: warm[name]["dev"]["sampled"]["accuracy"])
    assert [name for name in warm if "test" in warm[name]] == [best]
    taught = rows["taught-0.001-0"]
    assert [point["step"] for point in taught["curve"]] == [1, 2]
    shares = [point["dev"]["sampled"]["accuracy"] for point in taught["curve"]]
    assert taught["step"] == 1 + shares.index(max(shares))
    assert taught["curve"][1]["flops"] == taught["flops"] and len(taught["series"]["reward"]) == 2
    assert taught["test"]["measures"]["wide"]["num_prompts"] == 8
    recipe = (tmp_path / "work" / "taught-0.001-0" / "recipe.yaml").read_text()
    assert f"work/{best}-0.001-0/checkpoints" in recipe
    assert (
        f"checkpoints/step-00000{taught['step']}" in (tmp_path / "work" / "again-0.001-0" / "recipe.yaml").read_text()
    )
    assert set(taught["settings"]["on"]) == {"warm"}

    made = []
    monkeypatch.setattr(
        Study, "_train", lambda self, arm, rate, seed: made.append(arm.name) or record("x", rate, seed, 0)
    )
    again = Study(CHAIN, study.subject, study.folder, study.work)
    assert again.trained(CHAIN.arm("again"), 1e-3, 0) == rows["again-0.001-0"] and not made
    longer = replace(
        CHAIN, arms=(replace(CHAIN.arms[0], changes={"method": {"type": "sft"}, "steps": 3}), *CHAIN.arms[1:])
    )
    other = Study(longer, study.subject, study.folder, study.work)
    monkeypatch.setattr(Study, "_checkpoint", lambda *_: Path("x"))
    other.trained(longer.arm("short"), 1e-3, 0)
    assert made, "other settings are another run"


# ------------------------------------------------------------------ findings


def test_results_speak_by_name(tmp_path):
    put(tmp_path, record("opd", 1e-3, 0, 0.9, 0.8), record("opd", 1e-3, 1, 0.5, 0.9), record("opd", 2e-3, 0, 0.1, 0.1))
    found = Results(experiments.get("methods"), tmp_path)
    assert found.shares("opd") == [0.8, 0.9] and found.rate("opd") == 1e-3
    assert found.accuracy("opd")[0] == pytest.approx(0.85)
    assert found.mean("opd", lambda run: gflop(run, "student"))[0] == pytest.approx(4.0)
    assert gflop(found.runs("opd")[0]) == pytest.approx(11.0)
    assert found.has("opd") and not found.has("opd", "grpo")
    with pytest.raises(NotRun, match="grpo"):
        found.runs("grpo")
    rollout = {"prompts_per_step": 8, "samples_per_prompt": 8}
    assert sequences({"settings": {"recipe": {"rollout": rollout, "steps": 10}}}) == 640


@pytest.mark.parametrize(("shares", "verdict"), [((0.9, 0.5, 0.5, 0.5), "reproduced"), ((0.6, 0.58, 0.5, 0.5), "partly"),
                                                 ((0.5, 0.9, 0.5, 0.5), "not")])  # fmt: skip
def test_the_direction_of_the_kl(tmp_path, shares, verdict):
    arms = [arm for by in kl_direction.ARMS.values() for arm in by.values()]
    put(
        tmp_path,
        *(record(arm, 1e-3, s, 0.5, share) for arm, share in zip(arms, shares, strict=True) for s in (0, 1, 2)),
    )
    assert kl_direction.find(Results(kl_direction.EXPERIMENT, tmp_path)).verdict == verdict


def test_one_hill_sits_on_the_larger_mode_or_between():
    """Against brute force over the moments: the best hill of forward KL has the teacher's mean (M-projection)."""
    target = kl_direction.teacher().exp()
    mean = float((target * kl_direction.torch.arange(len(target))).sum())
    found = kl_direction.one_hill("forward").exp()
    assert float((found * kl_direction.torch.arange(len(found))).sum()) == pytest.approx(mean, abs=0.3)
    assert int(kl_direction.one_hill("reverse").argmax()) == 10
    for direction in ("reverse", "forward"):
        assert kl_direction.near(kl_direction.unconstrained(direction), 0) == pytest.approx(0.7, abs=0.01)


def test_what_was_not_run_says_so(tmp_path):
    text = overview([kl_direction.EXPERIMENT], tmp_path)
    assert "not run yet" in text and "(#kl-direction)" in text
