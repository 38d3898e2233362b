"""The arithmetic of three findings on made-up records: LoRA's gap, weak starts, how much settings matter."""

import pytest
from support.records import put, record

from kibitz.experiments import records
from kibitz.experiments.claims import lora, temperature, weak_start
from kibitz.experiments.results import NotRun, Results


def accuracies(experiment, folder, shares: dict[str, float], rates: dict[str, float] | None = None, **more) -> Results:
    """Three seeds of each arm, equal but for LoRA's, 10,000 problems: an interval of at most a point."""
    for arm, share in shares.items():
        for seed in range(3):
            test = share + 0.005 * (seed - 1) * arm.endswith("-r1")
            one = record(arm, (rates or {}).get(arm, 1e-3), seed, dev=share, test=test, **more)
            one["test"]["num_prompts"] = 10_000
            put(folder, one)
    return Results(experiment, folder)


def models(folder, **shares: float) -> None:
    for role, share in shares.items():
        records.write(folder / f"{role}.json", {"settings": {}, "test": record("x", 1, 0, share, share)["test"]})


# ------------------------------------------------------------------ lora


@pytest.mark.parametrize(
    ("after_sft", "after_opd", "verdict"),
    [(0.67, 0.84, "reproduced"), (0.67, 0.7705, "partly"), (0.84, 0.70, "not"), (0.80, 0.90, "not")],
    ids=["13 to 6", "13 to 12.95", "the gap grows", "no gap"],
)
def test_the_gap_of_a_rank_is_to_full_fine_tuning_of_the_same_stage(tmp_path, after_sft, after_opd, verdict):
    shares = {"sft": 0.80, "opd": 0.90, "sft-r1": after_sft, "opd-r1": after_opd}
    results = accuracies(lora.EXPERIMENT, tmp_path, shares, {"sft-r1": 1e-2})
    assert lora.gap(results, "sft", ("student", 1))[0] == pytest.approx(0.80 - after_sft)
    assert lora.gap(results, "opd", ("student", 1))[0] == pytest.approx(0.90 - after_opd)
    found = lora.find(results)
    assert found.verdict == verdict
    assert found.numbers["factors"] == (10, 10)


def test_without_full_fine_tuning_there_is_no_gap(tmp_path):
    with pytest.raises(NotRun, match="sft"):
        lora.find(accuracies(lora.EXPERIMENT, tmp_path, {"sft-r1": 0.5, "opd-r1": 0.5}))


# ------------------------------------------------------------------ weak starts


@pytest.mark.parametrize(
    ("plain", "skd", "verdict"),
    [(0.3, 0.8, "reproduced"), (0.3, 0.3, "partly"), (0.9, 0.9, "not"), (0.9, 0.95, "partly")],
    ids=["bad and cured", "bad, not cured", "never bad", "not bad, still helped"],
)
def test_a_weak_start_has_to_go_less_of_its_way_and_to_be_cured(tmp_path, plain, skd, verdict):
    models(tmp_path, student=0.6, teacher=1.0)
    shares = {"wrecked": 0.1, "opd-misled": 0.9, "opd-wrecked": plain, "skd-wrecked": skd}
    results = accuracies(weak_start.EXPERIMENT, tmp_path, shares, series={"teacher_written": [0.4, 0.1]})
    assert weak_start.closed(results, "wrecked", "opd")[0] == pytest.approx((plain - 0.1) / 0.9)
    assert weak_start.closed(results, "misled", "opd")[0] == pytest.approx(0.75)
    found = weak_start.find(results)
    assert found.verdict == verdict
    (helped,) = [row["written"] for row in found.numbers["rows"] if row["written"]]
    assert helped == pytest.approx([0.4, 0.1])


# ------------------------------------------------------------------ settings


BASE = {"opd": 0.85, "temperature-0.5": 0.8, "prompts-16": 0.8, "steps-prompts-64": 0.8, "steps-prompts-16": 0.7}


@pytest.mark.parametrize(
    ("changes", "sft_rate", "holds", "verdict"),
    [
        ({"samples-4": 0.9}, 2e-3, [True, True, True, True, True], "reproduced"),
        ({"samples-4": 0.9, "temperature-0.5": 0.9}, 2e-3, [False, True, True, True, True], "partly"),
        ({"samples-4": 0.85, "temperature-0.5": 0.85, "prompts-16": 0.9, "steps-prompts-16": 0.8}, 5e-4,
         [None, False, None, None, False], "not"),
    ],
)  # fmt: skip
def test_each_setting_is_judged_by_intervals(tmp_path, changes, sft_rate, holds, verdict):
    results = accuracies(temperature.EXPERIMENT, tmp_path, {**BASE, "sft": 0.8, **changes}, {"sft": sft_rate})
    judged = [temperature.judged(setting, setting.measured(results)) for setting in temperature.SETTINGS]
    assert [*judged, temperature.rates(results)] == holds
    assert temperature.find(results).verdict == verdict
