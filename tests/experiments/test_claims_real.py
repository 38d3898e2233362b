"""What the claims about a real model say of made-up results: the rule, every number of the page, a missing rival."""

from dataclasses import replace

import pytest
from support.records import put, record

from kibitz.experiments import evidence, records
from kibitz.experiments.claims import real_forks, real_heal
from kibitz.experiments.prose import filled, prose
from kibitz.experiments.results import NotRun, Results

CLAIM = real_heal.EXPERIMENT


def test_opd_must_be_nearer_for_each_seed_at_equal_tokens_and_at_equal_flops():
    clear, blurred, behind = (0.2, 0.05), (0.02, 0.05), (-0.03, 0.05)

    def gaps(*flops):
        return {"kd": {"tokens": [clear] * 2, "flops": [clear] * 2}, "sft": {"tokens": [clear] * 2, "flops": flops}}

    assert real_heal.verdict(gaps(clear, clear), seeds=2) == "reproduced"
    assert real_heal.verdict({"sft": {"tokens": [clear], "flops": [clear]}}, seeds=1) == "partly", "one seed is luck"
    assert real_heal.verdict(gaps(clear, blurred), seeds=2) == "partly"
    assert real_heal.verdict(gaps(clear, behind), seeds=2) == "partly", "nearer in the mean"
    assert real_heal.verdict(gaps(behind, behind), seeds=2) == "not"


def test_a_gap_is_the_mean_over_prompts_of_the_difference_a_token():
    def texts(*pairs):
        return [{"reverse_kl": kl, "tokens": tokens} for kl, tokens in pairs]

    mean, half = real_heal.paired(texts((1.0, 2), (4.0, 4)), texts((3.0, 3), (9.0, 6)))  # 0.5 and 0.5 above
    assert (mean, half) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-9))
    mean, half = real_heal.paired(texts((0.0, 1), (0.0, 1), (0.0, 1)), texts((1.0, 1), (2.0, 1), (3.0, 1)))
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))


def measured(kl: float) -> dict:
    return {"num_prompts": 40, "reverse_kl": kl, "cut_off": 0.5, "response_tokens": 30.0}


def texts(kl: float) -> list[dict]:
    """Of two prompts, ten tokens each."""
    return [{"tokens": 10, "reverse_kl": kl * more, "forward_kl": 11 * kl, "agreed": 5} for more in (10.0, 10.4)]


def looked_at(seed: int) -> dict:
    own = {
        name: texts(kl + 0.01 * seed)
        for name, kl in {"student": 1.5, "opd": 0.5, "sft": 0.8, "sft@tokens": 0.9}.items()
    }
    known = [name for name in own if "@" not in name]
    return {
        "prompts": ["Say a.", "Say c."],
        "own": own,
        "theirs": {name: own[name] for name in known},
        "facts": dict.fromkeys(known, 7),
        "num_facts": 35,
        "texts": {name: ["a | b", "c"] for name in ("teacher", *known)},
    }


@pytest.fixture
def results(tmp_path):
    for role, kl in (("student", 1.5), ("teacher", 0.0)):
        records.write(tmp_path / f"{role}.json", {"settings": {}, "test": measured(kl)})
    for name, kl in {"opd": 0.5, "sft": 0.8}.items():
        for seed in (0, 1):
            one = record(name, 1e-4, seed, 0.0) | {"tokens": 2400, "dev": measured(kl), "test": measured(kl)}
            one["settings"] = {"recipe": {"steps": real_heal.EQUAL_FLOPS if name == "sft" else real_heal.STEPS}}
            put(tmp_path, one)
            records.write(tmp_path / f"probe-{seed}.json", looked_at(seed))
    records.write(tmp_path / "cut.json", {"layers": [4, 7], "of": 10, "damage": {}})
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
    both = "0.408 ± 0.102 and 0.408 ± 0.102"
    assert f"farther from the teacher than `opd` by {both} nats a token at equal tokens, and by 0.306 ± 0.076" in body
    assert found.numbers["tokens"]["sft"][0] == pytest.approx(0.9231)
    assert found.numbers["own"]["sft"][0] == pytest.approx(0.8211)
    assert found.numbers["reading"]["agreed"]["opd"][0] == 0.5 and found.numbers["facts"]["sft"] == 0.2
    assert found.panels[0].lines[1].points[1][1] == pytest.approx(0.8211)


def test_one_seed_alone_is_partly(results):
    (results.folder / "probe-1.json").unlink()
    assert real_heal.find(results).verdict == "partly"


def test_without_runs_or_without_a_look_at_them_it_says_which_are_missing(results, tmp_path_factory):
    with pytest.raises(NotRun):
        real_heal.find(Results(CLAIM, tmp_path_factory.mktemp("empty")))
    for path in results.folder.glob("probe-*.json"):
        path.unlink()
    with pytest.raises(NotRun, match="probe"):
        real_heal.find(results)


def scored(nats: list[float], fork: int | None) -> dict:
    tokens = [f" w{place}" for place in range(len(nats))]
    instead = None if fork is None else " x"
    more = {"response": "".join(tokens), "finished": True, "reverse_kl": sum(nats) / len(nats)}
    return {"tokens": tokens, "nats": nats, "fork": fork, "instead": instead, **more}


def test_the_shares_of_a_penalty_leave_out_answers_that_cost_nothing():
    one, flat, free = scored([0.0, 3.0, 0.1, 0.0], 1), scored([0.5, 0.5, 0.5, 0.5], None), scored([0.0, 0.01], None)
    found = real_forks.shared([one, flat, free])
    assert found["punished"] == 2 and found["holders"] == pytest.approx((1 / 4 + 4 / 4) / 2)
    assert found["forked"] == pytest.approx(1 / 3) and found["median"] == pytest.approx(0.3)
    assert real_forks.verdict({"student": found}) == "not"
    assert real_forks.verdict({"student": real_forks.shared([one])}) == "partly"
    assert real_forks.verdict({"student": real_forks.shared([free])}) == "not", "there is nothing to share out"


def test_every_number_of_the_page_of_forks_is_there(tmp_path):
    prompts = real_forks.asked()
    assert len(prompts) == 20 and "5 + (2 x 3)" in prompts[0] and "ice cube" in prompts[1]
    rows = [scored([0.0, 3.0, 0.1, 0.0], 1), *[scored([0.0, 0.2, 0.0], None)] * 19]
    seen = {"prompts": prompts, "models": {"student": rows, "healed": rows}}
    records.write(tmp_path / "real-forks" / "probe-0.json", seen | {"date": "2026-11-26", "commit": "c0ffee"})
    found = evidence.finding(real_forks.EXPERIMENT, tmp_path)
    text = prose("real-forks")
    for template in (text.ours, text.body):
        filled(template, found.numbers, strict=True)
    body = filled(text.body, found.numbers)
    assert "| `What is 5 + (2 x 3)?` | before | `w0 w1 w2 w3` | `w0 w1` | `x` | 3.00 |\n|  | after OPD |" in body
    assert "\n\n|" not in body.partition("| prompt |")[2], "one table"
    assert [panel.texts[0][1][1] for panel in found.panels] == [(" w1", 3.0)] * 2


def test_claims_on_models_from_outside_have_a_section_of_their_own():
    toy = replace(CLAIM, outside=False)
    assert evidence.claims([CLAIM, toy]) == [toy]
    assert evidence.claims([CLAIM, toy], outside=True) == [CLAIM]
