"""The handbook of the invented company, and what the claim about it says of made-up results."""

import re

import pytest
from support.records import put, record

from kibitz.config import DataConfig
from kibitz.data import load_grader
from kibitz.experiments import handbook, records
from kibitz.experiments.claims import real_assistant
from kibitz.experiments.prose import filled, prose
from kibitz.experiments.results import NotRun, Results
from kibitz.graders.constraints import check
from kibitz.types import Prompt


def test_questions_are_answered_by_the_documents_and_their_words_stand_in_none():
    for number in handbook.SETS:
        stated = [row["response"] for row in handbook.documents(number)]
        facts = handbook.facts(number)
        assert len(stated) == handbook.NUM_DOCUMENTS
        for split, wordings in (("dev", 1), ("test", 2)):
            asked = handbook.questions(number, split)
            assert len({row["prompt"] for row in asked}) == len(asked) == wordings * len(facts), "each has one answer"
            for row in asked:
                (fact,) = (one for one in facts if one["place"] in row["prompt"] and _answers(row, one["value"]))
                holders = [text for text in stated if fact["place"] in text.lower()]
                assert len(holders) == handbook.NUM_DOCUMENTS * 3 // len(facts), "each place has as many"
                assert all(_answers(row, text) for text in holders)
                assert not any(row["prompt"].rstrip("?.") in text for text in stated)
        assert not {row["prompt"] for row in handbook.questions(number, "dev")} & {
            row["prompt"] for row in handbook.questions(number, "test")
        }
    first, second = ({fact["place"] for fact in handbook.facts(number)} for number in handbook.SETS)
    assert first and second and not first & second


def _answers(row: dict, text: str) -> bool:
    (constraint,) = row["constraints"]
    return re.search(constraint["pattern"], text) is not None


def test_every_fact_is_stated_in_every_of_its_sentences():
    text = "\n".join(row["response"] for row in handbook.documents(1))
    for fact in handbook.facts(1):
        for sentence in fact["kind"]["sentences"]:
            stated = sentence.format(
                place=fact["place"], Place=fact["place"].capitalize(), value=fact["value"], company="Tolwerk"
            )
            assert stated in text


def test_a_mix_is_as_long_as_documents_alone_and_has_its_share_of_chat_without_answers():
    rows = handbook.mixed(1, 70)
    chat = [row for row in rows if "response" not in row]
    assert len(rows) == handbook.NUM_DOCUMENTS and len(chat) == 0.3 * len(rows)
    assert len({row["prompt"] for row in chat}) == len(chat)
    assert rows != sorted(rows, key=lambda row: "response" in row), "mixed"


def test_what_a_recovery_practises_is_asked_in_words_that_no_measure_has():
    rows = [row["prompt"] for row in handbook.practised()]
    plain = [row["prompt"] for row in handbook.instructions()["train"]]
    assert rows[::2] == plain[::2] and all(
        row.startswith(f"{text} ") for row, text in zip(rows[1::2], plain[1::2], strict=True)
    )
    asked = {row.removeprefix(f"{text} ") for row, text in zip(rows[1::2], plain[1::2], strict=True)}
    assert asked == set(handbook.words()["practised"])
    assert not asked & {demand["ask"] for demand in handbook.words()["demands"]}


def test_every_demand_and_policy_can_be_verified():
    assert load_grader(DataConfig(prompts="x", grader="constraints_strict"), [_asked(handbook.demands("dev")[0])])
    for row in (*handbook.demands("test"), *handbook.obeyed("sentence", "dev"), *handbook.obeyed("german", "dev")):
        assert check(_asked(row), "some words") in ([True], [False])
    german = _asked(handbook.obeyed("german", "dev")[0])
    assert check(german, "Das ist eine Brücke.\nSie ist alt.") == [True]
    assert check(german, "He did die at the bridge.") == [False]


def _asked(row: dict) -> Prompt:
    return Prompt(ids=(1,), text=row["prompt"], key="asked", columns=row)


def measured(questions: float, instructions: float, greedy: dict | None = None, **policies: float) -> dict:
    """The same at temperature 1 and greedily, but for what `greedy` says."""
    shares = {"questions": questions, "instructions": instructions, **policies}
    row = {"num_prompts": 192, "cut_off": 0.5, "reverse_kl": 0.3}
    found = {
        name: row | {"sampled": {"accuracy": share}, "greedy": {"accuracy": (greedy or {}).get(name, share)}}
        for name, share in shares.items()
    }
    first = next(iter(found.values()))
    return first | {"measures": found | {"chat": row}}


def test_every_number_of_the_page_is_there(tmp_path):
    results = Results(real_assistant.EXPERIMENT, tmp_path)
    told = {"sentence": 0.1, "german": 0.0, "sentence-told": 0.6, "german-told": 0.9}
    records.write(tmp_path / "student.json", {"settings": {}, "test": measured(0.02, 0.6, **told)})
    with pytest.raises(NotRun):
        real_assistant.find(results)
    arms = {
        "documents-100": (0.5, 0.2),
        "documents-70": (0.45, 0.3),
        "recover-70": (0.44, 0.58),
        "policy-sentence": (0, 0),
    }
    for name, both in arms.items():
        for seed in (0, 1):
            found = measured(*both, sentence=0.5, german=0.1)
            put(tmp_path, record(name, 1e-4, seed, 0.0) | {"dev": found, "test": found})
    found = real_assistant.find(Results(real_assistant.EXPERIMENT, tmp_path))
    assert found.verdict == "reproduced"
    text = prose("real-assistant")
    for template in (text.ours, text.body):
        filled(template, found.numbers, strict=True)
    body = filled(text.body, found.numbers)
    assert (
        "| You answer every message in exactly one short sentence. | 10.0 / 10.0 | 60.0 / 60.0 | 50.0 ±" in body
        and "German" not in body
    )
    assert "| before | 2.0 / 2.0 | 60.0 / 60.0 | 0 |" in body
    assert (
        re.search(r"\| 70% documents, 30% chat \| 45.0 ± \S+ / 45.0 ± \S+ \| 30.0 ± ", body) and "| 36 / 79 |" in body
    )


def test_a_change_of_one_seed_has_the_interval_of_its_problems(tmp_path):
    results = Results(real_assistant.EXPERIMENT, tmp_path)
    records.write(tmp_path / "student.json", {"settings": {}, "test": measured(0.0, 0.5)})
    for name, share in (("documents-70", 0.25), ("recover-70", 0.5)):
        found = measured(0.5, share)
        put(tmp_path, record(name, 1e-4, 0, 0.0) | {"dev": found, "test": found})
    mean, half = real_assistant.changed(results, None, "documents-70", "instructions")
    assert mean == -0.25
    both = 1.96 * (0.5 * 0.5 / 192 + 0.25 * 0.75 / 192) ** 0.5
    assert half == pytest.approx(both, rel=0.05)
    assert real_assistant.changed(results, "documents-70", "recover-70", "instructions") == (0.25, half)


def test_what_holds_greedily_alone_or_of_one_seed_alone_is_shown_in_part(tmp_path):
    records.write(tmp_path / "student.json", {"settings": {}, "test": measured(0.0, 0.6)})

    def found(*recovered: dict) -> str:
        for seed, after in enumerate(recovered):
            for name, one in (("documents-70", measured(0.5, 0.2)), ("recover-70", after)):
                put(tmp_path, record(name, 1e-4, seed, 0.0) | {"dev": one, "test": one})
        return real_assistant.find(Results(real_assistant.EXPERIMENT, tmp_path)).verdict

    well, badly = measured(0.5, 0.55), measured(0.5, 0.2)
    assert found(well) == "reproduced" and found(badly) == "not"
    assert found(measured(0.5, 0.2, greedy={"instructions": 0.55})) == "partly"
    assert found(well, well) == "reproduced"
    assert found(well, badly) == "partly"


def test_the_second_handbook_has_its_own_questions(tmp_path):
    records.write(tmp_path / "student.json", {"settings": {}, "test": measured(0.0, 0.6)})
    for name in ("documents-70", "recover-70"):
        put(tmp_path, record(name, 1e-4, 0, 0.0) | {"dev": measured(0.5, 0.5), "test": measured(0.5, 0.5)})
    first = measured(0.31, 0.45)
    second = first | {"sampled": {"accuracy": 0.77}, "greedy": {"accuracy": 0.8}}
    put(tmp_path, record("learn-2", 1e-4, 0, 0.0) | {"dev": second, "test": second})
    numbers = real_assistant.find(Results(real_assistant.EXPERIMENT, tmp_path)).numbers
    filled(prose("real-assistant").body, numbers, strict=True)
    ((name, _, (sampled, greedy)),) = numbers["second"]
    assert (name, sampled[0], greedy[0]) == ("learn-2", 0.77, 0.8)
    assert numbers["rows"][-1][2]["questions"][0] == 0.31, "what is left of the first"
