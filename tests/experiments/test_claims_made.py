"""Claims that make their own models or problems: what these are, and which numbers make which verdict."""

import pytest
from support.records import put, record

from kibitz.data import load_prompts
from kibitz.experiments import get, records
from kibitz.experiments.claims import cross_tokenizer, experts, privileged
from kibitz.experiments.design import MADE, Subject
from kibitz.experiments.evidence import finding
from kibitz.experiments.study import Study
from kibitz.teachers.context import Rendering, check_context
from kibitz.worlds import arithmetic

PRIVILEGED, CROSS, EXPERTS = get("privileged"), get("cross-tokenizer"), get("experts")


def test_the_bpe_reads_back_every_problem_and_solution_in_longer_tokens():
    tokenizer = cross_tokenizer.bpe_tokenizer()
    rows = arithmetic.Arithmetic("arithmetic", "", fewest=3, most=5).demonstrations("dev", 200, 0)
    texts = [row[column] for row in rows for column in ("prompt", "response")]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert [tokenizer.decode(one) for one in ids] == texts
    assert sum(map(len, texts)) > 1.4 * sum(map(len, ids))
    assert tokenizer.unk_token_id not in {token for one in ids for token in one}


def test_a_lesson_shows_what_is_to_be_written_or_nothing():
    lessons = privileged.lessons(400, seed=3)
    plain = [row for row in lessons if "=" not in row["prompt"]]
    shown = [row for row in lessons if "=" in row["prompt"]]
    assert len(plain) == len(shown) == 200
    assert all(row["prompt"].partition("=")[2] == row["response"] for row in shown)
    wrong = {kind: sum(arithmetic.first_wrong_step(row["prompt"].partition("=")[0], row["response"]) is not None
                       for row in rows) for kind, rows in (("plain", plain), ("shown", shown))}  # fmt: skip
    assert wrong["plain"] > wrong["shown"] > 20  # 90% and 50% of what can be misread; a third of the problems can


def test_a_file_that_the_experiment_writes_has_its_place_in_the_recipe_and_no_file_of_a_user_takes_it(tmp_path):
    subject = Subject.of(PRIVILEGED, files={"": "mine.jsonl"})
    assert subject.files == {"prompts": "mine.jsonl"}
    study = Study(PRIVILEGED, Subject.of(PRIVILEGED), tmp_path, tmp_path / "work")
    recipe = study.recipe(privileged.READER, 3e-3, 0)
    assert recipe.data.prompts == f"{MADE}lessons", "no folder of this machine is in the settings of a record"
    tree = study._runnable(privileged.READER, recipe, 0)
    rows = (tmp_path / "work" / "lessons.jsonl").read_text(encoding="utf-8").splitlines()
    assert tree["data"]["prompts"] == (tmp_path / "work" / "lessons.jsonl").as_posix() and len(rows) == 300 * 64


def test_the_solution_is_in_the_teachers_prompt_and_not_in_the_students():
    recipe = Subject.of(PRIVILEGED).recipe(PRIVILEGED, PRIVILEGED.arm("opsd"), 1e-3, 0)
    tokenizer = arithmetic.tokenizer()
    prompts = load_prompts(recipe.data.model_copy(update={"limit": 5}), tokenizer, 0, demonstrations=True)
    check_context(recipe.teacher.context, prompts)
    render = Rendering(recipe.teacher.context, tokenizer)
    for prompt in prompts:
        assert "=" not in tokenizer.decode(prompt.ids)
        assert tokenizer.decode(render(prompt).ids) == f"<bos>{prompt.text}={prompt.response}<assistant>"
        assert arithmetic.first_wrong_step(prompt.text, prompt.response) is None


def test_an_expert_is_wrong_at_the_others_problems_only():
    for task, operators in experts.OPERATORS.items():
        for wrong in (False, True):
            rows = experts.problems("dev", task, 50, 0, wrong)
            assert all(set(row["prompt"]) <= set(operators) | set("0123456789") for row in rows)
            assert {arithmetic.grade(row["answer"], row["response"]) for row in rows} == {float(not wrong)}


# ------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(("after", "verdict"), [(0.8, "reproduced"), (0.62, "partly"), (0.5, "not")])
def test_the_student_gains_from_itself(after, verdict):
    assert privileged.verdict((0.6, 0.03), (after, 0.03)) == verdict


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ({"spans": 0.8, "alm": 0.8, "gold": 0.8, "uld": 0.8}, "reproduced"),
        ({"spans": 0.8, "alm": 0.61, "gold": 0.8, "uld": 0.8}, "partly"),
        ({"spans": 0.8, "alm": 0.61, "gold": 0.5, "uld": 0.6}, "partly"),
        ({"spans": 0.61, "alm": 0.61, "gold": 0.5, "uld": 0.6}, "not"),
    ],
)
def test_an_alignment_has_to_bring_the_student_above_its_start(tmp_path, shares, verdict):
    for name, share in shares.items():
        for seed in range(3):
            one = record(name, 1e-3, seed, share, share)
            one["test"]["num_prompts"] = 10_000
            put(tmp_path / CROSS.name, one)
    for role, share in {"student": 0.6, "shipped": 1.0, "bpe": 0.9}.items():
        test = {"num_prompts": 10_000, "sampled": {"accuracy": share}, "greedy": {"accuracy": share}}
        records.write(tmp_path / CROSS.name / f"{role}.json", {"test": test})
    assert finding(CROSS, tmp_path).verdict == verdict


@pytest.mark.parametrize(
    ("routed", "verdict"), [((0.99, 0.99), "reproduced"), ((0.99, 0.1), "partly"), ((0.5, 0.5), "not")]
)
def test_the_routed_student_has_to_learn_from_both(tmp_path, routed, verdict):
    """From files as they were named before: the mean of seeds, t(2) 4.303 x 0.1 / sqrt 3, and 300 problems in quadrature."""
    single = {"sum": (1.0, 0.0), "product": (0.0, 1.0), "sum expert": (0.99, 0.0), "product expert": (0.0, 0.99)}
    for seed, mixed in enumerate((0.5, 0.6, 0.7)):
        pairs = {**single, "student": (0.1, 0.1), "routed": routed, "mixed": (mixed, 1.0)}
        accuracy = {name: {"sum": first, "product": second} for name, (first, second) in pairs.items()}
        records.write(tmp_path / "experts" / f"seed-{seed}.json", {"seed": seed, "problems": 300, "accuracy": accuracy})
    found = finding(EXPERTS, tmp_path)
    assert found.verdict == verdict
    mean, half = found.numbers["shares"]["mixed"]["sum"]
    assert (mean, half) == (pytest.approx(0.6), pytest.approx(0.255, abs=1e-3))
