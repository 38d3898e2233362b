"""What the claims about a real model say of made-up results: the rule, every number of the page, a missing rival."""

from dataclasses import replace

import pytest
from support.records import put, record

from kibitz.experiments import evidence, records
from kibitz.experiments.claims import real_heal
from kibitz.experiments.prose import filled, prose
from kibitz.experiments.results import NotRun, Results

CLAIM = replace(real_heal.EXPERIMENT, find=real_heal.find)


def test_opd_must_be_nearer_at_equal_tokens_and_at_equal_flops():
    near, far, blurred = (0.5, 0.05), (0.9, 0.05), (0.56, 0.3)
    both = {"opd": near, "kd": far, "sft": far}
    assert real_heal.verdict(both, both, seeds=2) == "reproduced"
    assert real_heal.verdict(both, both, seeds=1) == "partly", "one seed has no interval"
    assert real_heal.verdict(both, {**both, "kd": blurred}, seeds=2) == "partly"
    assert real_heal.verdict({**both, "sft": (0.4, 0.0)}, both, seeds=2) == "not"
    assert real_heal.verdict({"opd": near, "sft": far}, {"opd": near, "sft": far}, seeds=2) == "reproduced"


def measured(kl: float, facts: float) -> dict:
    shares = {how: {"accuracy": facts} for how in ("sampled", "greedy")}
    row = {"num_prompts": 40, "reverse_kl": kl, "cut_off": 0.5, "response_tokens": 30.0}
    return row | {"measures": {"facts": {"num_prompts": 35, "reverse_kl": kl, **shares}}}


@pytest.fixture
def results(tmp_path):
    for role, kl in (("student", 1.5), ("teacher", 0.0)):
        records.write(tmp_path / f"{role}.json", {"settings": {}, "test": measured(kl, 0.1)})
    for name, kl in {"opd": 0.5, "sft": 0.8}.items():
        for seed in (0, 1):
            one = record(name, 1e-4, seed, 0.0)
            one["settings"] = {"recipe": {"steps": real_heal.EQUAL_FLOPS if name == "sft" else real_heal.STEPS}}
            dev = {"dev": measured(kl + 0.01 * seed, 0.4)}
            steps = (real_heal.STEPS, real_heal.EQUAL_FLOPS) if name == "sft" else (real_heal.STEPS,)
            one |= dev | {"curve": [{"step": step, "flops": one["flops"], **dev} for step in steps]}
            put(tmp_path, one | {"test": measured(kl + 0.01 * seed, 0.4)})
    names = ("teacher", "student", "opd", "sft")
    looked = {"agreement": dict.fromkeys(names[1:], 0.5), "texts": {name: ["a | b", "c"] for name in names}}
    cut = {"layers": [4, 7], "of": 10, "damage": {}}
    records.write(tmp_path / "probe-0.json", {"prompts": ["Say a.", "Say c."], **looked})
    records.write(tmp_path / "cut.json", cut)
    put(tmp_path, *(record(f"{name}-short", rate, 0, 0.0) for name in real_heal.METHODS for rate in (1e-4, 2e-4)))
    return Results(CLAIM, tmp_path)


def test_every_number_of_the_page_is_there_also_without_one_rival(results):
    found = real_heal.find(results)
    assert found.verdict == "reproduced"
    text = prose("real-heal")
    for template in (text.ours, text.body):
        filled(template, found.numbers, strict=True)
    body = filled(text.body, found.numbers)
    assert "| `opd` | reverse KL on the student's text | 0.0001 |" in body and "| `kd` |" not in body
    assert "| `Say a.` | `a ¦ b` | `a ¦ b` | `a ¦ b` | `a ¦ b` |" in body
    assert found.panels[0].lines[1].points[0][1] == pytest.approx(0.505)


def test_without_a_probe_and_without_facts_the_rest_is_told(results):
    (results.folder / "probe-0.json").unlink()
    for path in results.folder.glob("sft-0*.json"):
        one = records.read(path)
        del one["test"]["measures"]
        records.write(path, one)
    found = real_heal.find(results)
    assert found.numbers["facts"]["sft"] is None and not found.numbers["said"]
    body = filled(prose("real-heal").body, found.numbers, strict=True)
    assert "likeliest too" not in body and "| prompt |" not in body and "layers (numbers 4, 7)" in body


def test_without_runs_it_says_which_are_missing(tmp_path):
    with pytest.raises(NotRun):
        real_heal.find(Results(CLAIM, tmp_path))


def test_claims_on_models_from_outside_have_a_section_of_their_own():
    toy = replace(CLAIM, outside=False)
    assert evidence.claims([CLAIM, toy]) == [toy]
    assert evidence.claims([CLAIM, toy], outside=True) == [CLAIM]
