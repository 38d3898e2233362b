"""The benchmarks: what they make their data of, and that every arm of theirs is a recipe that is accepted."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

from kibitz.data import load_prompts
from kibitz.experiments import Experiment, Subject, pages
from kibitz.teachers.context import Rendering, check_context
from kibitz.worlds import arithmetic

FOLDER = ROOT / "benchmarks"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def experiment_of(name: str) -> Experiment:
    found = module(name)
    return found.experiment(Path("texts.jsonl")) if name == "cross_tokenizer" else found.EXPERIMENT


def test_the_bpe_reads_back_every_problem_and_solution_in_longer_tokens():
    tokenizer = module("cross_tokenizer").bpe_tokenizer()
    rows = arithmetic.Arithmetic("arithmetic", "", fewest=3, most=5).demonstrations("dev", 200, 0)
    texts = [row[column] for row in rows for column in ("prompt", "response")]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert [tokenizer.decode(one) for one in ids] == texts
    assert sum(map(len, texts)) > 1.4 * sum(map(len, ids))
    assert tokenizer.unk_token_id not in {token for one in ids for token in one}


def test_a_lesson_shows_what_is_to_be_written_or_nothing():
    lessons = module("privileged").lessons(400, seed=3)
    plain = [row for row in lessons if "=" not in row["prompt"]]
    shown = [row for row in lessons if "=" in row["prompt"]]
    assert len(plain) == len(shown) == 200
    assert all(row["prompt"].partition("=")[2] == row["response"] for row in shown)
    wrong = {kind: sum(arithmetic.first_wrong_step(row["prompt"].partition("=")[0], row["response"]) is not None
                       for row in rows) for kind, rows in (("plain", plain), ("shown", shown))}  # fmt: skip
    assert wrong["plain"] > wrong["shown"] > 20  # 90% and 50% of what can be misread; a third of the problems can


@pytest.mark.parametrize("name", ["cross_tokenizer", "privileged"])
def test_every_arm_is_a_recipe(name):
    asked = experiment_of(name)
    subject = Subject.of(asked)
    recipes = [subject.recipe(asked, arm, asked.rates[0], 0) for arm in asked.arms]
    assert len(recipes) == len({arm.name for arm in asked.arms})
    assert asked.reference in {arm.name for arm in asked.arms}


def test_the_solution_is_in_the_teachers_prompt_and_not_in_the_students():
    asked = module("privileged").EXPERIMENT
    recipe = Subject.of(asked).recipe(asked, asked.arm("opsd"), 1e-3, 0)
    tokenizer = arithmetic.tokenizer()
    prompts = load_prompts(recipe.data.model_copy(update={"limit": 5}), tokenizer, 0, demonstrations=True)
    check_context(recipe.teacher.context, prompts)
    render = Rendering(recipe.teacher.context, tokenizer)
    for prompt in prompts:
        assert "=" not in tokenizer.decode(prompt.ids)
        assert tokenizer.decode(render(prompt).ids) == f"<bos>{prompt.text}={prompt.response}<assistant>"
        assert arithmetic.first_wrong_step(prompt.text, prompt.response) is None


@pytest.mark.parametrize(("name", "file"), [("cross_tokenizer", "tokenizers.md"), ("privileged", "teachers.md")])
def test_the_page_says_what_the_files_say(name, file):
    asked, root = experiment_of(name), FOLDER.parent
    page = (root / "docs" / file).read_text(encoding="utf-8")
    assert f"<!-- results: {asked.name} -->" in page
    assert pages.render(page, {asked.name: asked}, root / "results") == page, "write it again, as the page says"


def test_the_table_of_experts_is_the_mean_of_its_files():
    runs = [
        {"seed": seed, "commit": "c0ffee", "date": "2026-11-24", "accuracy": {"routed": {"sum": s, "product": 1.0}}}
        for seed, s in enumerate((0.5, 0.6, 0.7))
    ]
    head, _, row, *_ = module("experts").markdown(runs).splitlines()
    assert head.count("|") == row.count("|") == 6
    # t(2) 4.303 x 0.1 / sqrt 3 of seeds, and 1.96 sqrt(0.24 / 300) of problems, in quadrature
    assert "| routed | 60.0 ± 25.5 | 50.0 60.0 70.0 | 100.0 ± 0.0 |" in row
