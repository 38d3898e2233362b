"""What the claim about SFT on a real model's own samples says of made-up results."""

import pytest
from support.records import put, record

from kibitz.experiments import records
from kibitz.experiments.claims import real_self_sft
from kibitz.experiments.prose import filled, prose
from kibitz.experiments.results import NotRun, Results

OWN, TAUGHT = ["self-sft-low", "self-sft-high"], ["opd-high"]


def test_self_sft_must_answer_worse_at_every_rate_and_opd_not():
    moved = {"self-sft-low": (0.01, 0.0), "self-sft-high": (0.9, 0.0), "opd-high": (0.001, 0.0)}
    worse = {"self-sft-low": True, "self-sft-high": True, "opd-high": False}
    assert real_self_sft.verdict(moved, worse, OWN, TAUGHT) == "reproduced"
    assert real_self_sft.verdict(moved, worse | {"self-sft-low": False}, OWN, TAUGHT) == "partly"
    still = dict.fromkeys(moved, (0.01, 0.0))
    assert real_self_sft.verdict(still, dict.fromkeys(worse, False), OWN, TAUGHT) == "not"
    assert real_self_sft.verdict(moved | {"opd-high": (0.2, 0.0)}, worse, OWN, TAUGHT) == "not"


def measured(kl: float, facts: float) -> dict:
    shares = {how: {"accuracy": facts} for how in ("sampled", "greedy")}
    row = {"num_prompts": 40, "reverse_kl": kl, "cut_off": 0.5, "response_tokens": 30.0}
    return row | {"measures": {"facts": {"num_prompts": 35, "reverse_kl": kl, **shares}}}


def test_every_number_of_the_page_is_there(tmp_path):
    results = Results(real_self_sft.EXPERIMENT, tmp_path)
    records.write(tmp_path / "student.json", {"settings": {}, "test": measured(0.0, 1.0)})
    with pytest.raises(NotRun):
        real_self_sft.find(results)
    rollout = {"prompts_per_step": 8, "max_tokens": 32}
    for name, kl, facts in (("self-sft-low", 0.1, 0.95), ("self-sft-high", 0.9, 0.3), ("opd-high", 0.0, 1.0)):
        one = record(name, 1e-4, 0, 0.0) | {"dev": measured(kl, facts), "test": measured(kl, facts)}
        put(tmp_path, one | {"settings": {"recipe": {"steps": 8, "rollout": rollout}}})
    found = real_self_sft.find(Results(real_self_sft.EXPERIMENT, tmp_path))
    assert found.verdict == "partly", "a twentieth of 35 questions is within the interval"
    text = prose("real-self-sft")
    for template in (text.ours, text.body):
        filled(template, found.numbers, strict=True)
    assert "| OPD with its own start as the teacher | 0.0001 | 1 | 0.000 |" in filled(text.body, found.numbers)
    assert "self-sft-high 0.900, opd-high 0.000 nats" in filled(text.ours, found.numbers)
