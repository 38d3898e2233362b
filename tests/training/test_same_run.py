"""A run goes on with the data and the models that it began with, on the day on which it began; or it says what is another."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.models import make_model, tokenizer
from support.runs import recipe

import kibitz
from kibitz import config
from kibitz.data import encode_prompt
from kibitz.models.load import load_tokenizer
from kibitz.training import same_run

ROWS = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(4) for b in range(2)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tree(tmp_path) -> dict:
    """A run of two steps on files of one's own."""
    student, teacher = make_model(tmp_path / "S", seed=1), make_model(tmp_path / "T", seed=2, hidden_size=48)
    rollout = {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 6}
    data = {"world": None, "prompts": str(write(tmp_path / "p.jsonl", ROWS)), "limit": None}
    tree = recipe(student, teacher, tmp_path / "run", data=data, rollout=rollout, steps=2)
    kibitz.train(tree)
    return tree


def refusal(tree: dict, *overrides: str) -> str:
    with pytest.raises(kibitz.RecipeError, match="replaced since") as caught:
        kibitz.train(tree, ["steps=3", *overrides], resume=True)
    return str(caught.value)


def test_nothing_replaced_goes_on(tree, tmp_path):
    assert [row["step"] for row in kibitz.train(tree, ["steps=3"], resume=True).metrics] == [1, 2, 3]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:3],
        ROWS[::-1],
        [*ROWS[:-1], {"prompt": "1+9", "answer": "10"}],
        [*ROWS[:-1], {**ROWS[-1], "answer": "0"}],
    ],
    ids=["fewer", "another order", "another prompt", "another answer"],
)
def test_other_data_is_named(tree, tmp_path, rows):
    path = write(tmp_path / "p.jsonl", rows)
    said = refusal(tree)
    assert said == (
        f"output: the run at {tmp_path / 'run'} would go on with something else than it began with: replaced since are the "
        f"prompts of {path}. Put back what was there, or begin another run with what this one has learnt, by "
        f"student.model={tmp_path / 'run' / 'checkpoints' / 'step-000002'} output=ANOTHER"
    )
    on = [f"student.model={tmp_path / 'run' / 'checkpoints' / 'step-000002'}", f"output={tmp_path / 'another'}"]
    assert len(kibitz.train(tree, on).metrics) == 2


def test_another_teacher_is_named(tree, tmp_path):
    make_model(tmp_path / "T", seed=7, hidden_size=48)
    assert f"replaced since are the weights of {tmp_path / 'T'}." in refusal(tree)


def test_another_template_of_the_teacher_is_named(tree, tmp_path):
    (template,) = (tmp_path / "T").glob("chat_template.jinja")
    template.write_text("{# another #}" + template.read_text())
    assert f"the tokenizer or chat template of {tmp_path / 'T'}." in refusal(tree)


def test_a_student_that_is_in_the_checkpoint_may_be_replaced(tree, tmp_path):
    make_model(tmp_path / "S", seed=9)
    assert len(kibitz.train(tree, ["steps=3"], resume=True).metrics) == 3


def test_another_base_of_an_adapter_is_named(tree, tmp_path):
    pytest.importorskip("peft")
    on = [f"output={tmp_path / 'lora'}", "student.lora.rank=2"]
    kibitz.train(tree, on)
    make_model(tmp_path / "S", seed=9)
    assert f"replaced since are the weights of {tmp_path / 'S'}." in refusal(tree, *on)


def test_a_checkpoint_without_a_fingerprint_goes_on(tree, tmp_path):
    """Those of older versions have none."""
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "training" / "state.json"
    known = json.loads(state.read_text())
    same_run.check_same(tmp_path / "run", state.parents[1], known["fingerprint"])
    state.write_text(json.dumps({key: value for key, value in known.items() if key != "fingerprint"}))
    write(tmp_path / "p.jsonl", ROWS[:3])
    same_run.check_same(tmp_path / "run", state.parents[1], {**known["fingerprint"], "the prompts": "others"})


@pytest.mark.parametrize("whole", [same_run.WHOLE, 1000], ids=["whole", "by pieces"])
def test_any_tensor_that_changes_is_seen(tmp_path, monkeypatch, whole):
    """Of a file that is too large to be read, pieces of each tensor are: a change of all of a tensor meets them."""
    monkeypatch.setattr(same_run, "WHOLE", whole)
    folder = make_model(tmp_path / "m")
    path, seen = folder / "model.safetensors", {same_run._of_model(str(folder))}
    tensors = load_file(path)
    for name in tensors:
        changed = {**tensors, name: tensors[name] + 1}
        save_file(changed, path, metadata={"format": "pt"})
        seen.add(same_run._of_model(str(folder)))
    save_file(tensors, path, metadata={"format": "pt"})
    assert len(seen) == len(tensors) + 1
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert same_run._of_model(str(copy)) in seen


# ------------------------------------------------------------------ the date

DATED = (
    "{{ '0' if strftime_now('%d') == '03' else '1' }}+"
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def test_a_template_that_writes_the_date_writes_that_of_the_first_day(tree, tmp_path):
    """The prompts of a run that is taken up on another day are those of the day on which it began."""
    for role in "ST":
        (template,) = (tmp_path / role).glob("chat_template.jinja")
        template.write_text(DATED)
    run = kibitz.train(tree, [f"output={tmp_path / 'today'}"])
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["data"]["template"] == {
        "strftime_now": date.today().isoformat()
    }
    run = kibitz.train(tree, [f"output={tmp_path / 'then'}", "data.template.strftime_now=2020-01-03"])
    on = kibitz.train(tree, [f"output={tmp_path / 'then'}", "steps=3"], resume=True)
    assert on.recipe.data.template == run.recipe.data.template == {"strftime_now": "2020-01-03"}
    again = [f"output={tmp_path / 'then'}", "steps=4", "data.template.strftime_now=2020-01-04"]
    with pytest.raises(kibitz.RecipeError, match="made with another data"):
        kibitz.train(tree, again, resume=True)


def test_the_date_is_what_the_recipe_says(tree, tmp_path):
    (template,) = (tmp_path / "S").glob("chat_template.jinja")
    template.write_text(DATED)
    tok = load_tokenizer(config.ModelConfig(model=str(tmp_path / "S")), "student")
    ids = [
        encode_prompt(tok, [{"role": "user", "content": "2"}], {"strftime_now": f"2020-01-0{day}"}) for day in (3, 4)
    ]
    assert [tok.decode(one) for one in ids] == ["0+2=", "1+2="]
    with pytest.raises(ValueError, match="'soon' is no date"):
        encode_prompt(tok, [{"role": "user", "content": "2"}], {"strftime_now": "soon"})


def test_templates_without_a_date_get_none(tree):
    assert config.load(tree).data.template == {}
    assert same_run.with_date(config.load(tree), tokenizer(), resume=False) == config.load(tree)
