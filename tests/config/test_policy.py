"""The policy gradient's section of opd: what may be written, in both of its places, and what may not."""

import json

import pytest
import yaml
from support.runs import recipe

import kibitz
from kibitz import config
from kibitz.config import PolicyConfig, RecipeError
from kibitz.experiments.records import made_with

LEAST = {
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "data": {"world": "arithmetic"},
    "rollout": {"samples_per_prompt": 4},
}
FLAT = {
    "policy_loss": "sampled_token", "clip_ratio": 0.2, "ratio_cap": 5.0, "ratio_floor": 0.5, "max_drop": 0.2,
    "kl_coef": 1.0, "discount": 0.0, "clip_advantage": None, "baseline": False, "extrapolation": 1.0, "reward_coef": 0.0,
}  # fmt: skip
"""The settings beside `support`, where whole recipes have them that were written before there was a section."""


def opd(*overrides: str, **method) -> config.OPDConfig:
    return config.load({**LEAST, "method": {"type": "opd", **method}}, overrides).method


@pytest.mark.parametrize(
    ("method", "overrides", "changed"),
    [
        ({"support": "sampled"}, (), {}),
        ({"policy": {}}, (), {}),
        ({"support": "sampled", "policy": None}, (), {}),
        ({"policy": {"discount": 0.5}}, (), {"discount": 0.5}),
        ({"support": "sampled", "discount": 0.5}, (), {"discount": 0.5}),
        ({"support": "sampled", "discount": 0.5, "policy": {"discount": 0.5}}, (), {"discount": 0.5}),
        ({"support": "sampled", "kl_coef": 2, "policy": {"discount": 0.5}}, (), {"kl_coef": 2.0, "discount": 0.5}),
        ({"policy": {"discount": 0.5}}, ("method.discount=0.9",), {"discount": 0.9}),
        ({"support": "sampled", "discount": 0.5}, ("method.discount=0.9",), {"discount": 0.9}),
        ({"support": "sampled", "discount": 0.5}, ("method.policy.discount=0.9",), {"discount": 0.9}),
        ({"support": "sampled", "discount": 0.5}, ("method.policy={kl_coef: 2}",), {"kl_coef": 2.0}),
        ({}, ("method.baseline=true", "method.support=sampled"), {"baseline": True}),
    ],
)
def test_one_meaning_in_either_place(method, overrides, changed):
    found = opd(*overrides, **method)
    assert (found.support, found.policy) == ("sampled", PolicyConfig(**changed))
    assert found.policy.changed() == [name for name in PolicyConfig.model_fields if name in changed]


@pytest.mark.parametrize("support", ["full", "top_k"])
def test_it_is_there_with_the_sampled_token_only(support):
    assert opd(support=support).policy is None
    assert opd(support=support, policy={}).policy is None
    assert opd(f"method.support={support}", support="sampled").policy is None
    for name, value in {"discount": 0.5, "policy_loss": "banded", "extrapolation": 1.25, "baseline": True}.items():
        for method in ({name: value}, {"policy": {name: value}}):
            with pytest.raises(
                RecipeError, match=f"{name} belongs to the policy gradient: write method.support=sampled"
            ):
                opd(support=support, **method)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"support": "sampled", "discount": 0.5, "policy": {"discount": 0.7}}, "drop method.discount"),
        ({"discount": 0.5}, "discount belongs to the policy gradient"),  # full is the default
        ({"discont": 0.5}, "unknown key method.discont: did you mean policy.discount"),
        ({"policy": {"discont": 0.5}}, "unknown key method.policy.discont: did you mean discount"),
        ({"policy": 3}, "method.policy: "),
        ({"policy": {"baseline": True, "discount": 0.5}}, "write method.policy.discount=0 without extrapolation"),
    ],
)
def test_contradictions_and_slips_are_sentences(method, words):
    with pytest.raises(RecipeError, match=words):
        opd(**method)


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ({"support": "full"}, {"support": "full"}),
        ({"support": "full", "kl_coef": 0.5, "clip_ratio": 0.3}, {"support": "full"}),  # they said nothing
        ({"support": "sampled"}, {"support": "sampled"}),
        ({"support": "sampled", "discount": 0.5, "policy_loss": "banded"},
         {"policy": {"discount": 0.5, "policy_loss": "banded"}}),
    ],
)  # fmt: skip
def test_an_older_whole_recipe_has_the_same_settings(old, now):
    """Settings in the old places load to the same; what is dumped has them in the section, and loads again."""
    before, after = (config.load({**LEAST, "method": {"type": "opd", **method}}) for method in (FLAT | old, now))
    assert before.model_dump(mode="json") == after.model_dump(mode="json")
    tree = yaml.safe_load(config.dump(before))
    assert not FLAT.keys() & tree["method"].keys()
    assert config.load(tree) == before == config.load(before)


def test_a_run_of_an_older_version_goes_on(small_models, tmp_path):
    asked = recipe(
        small_models / "student", small_models / "teacher", tmp_path / "run", steps=1, save={"every": 1},
        method={"support": "sampled", "discount": 0.5},
    )  # fmt: skip
    kibitz.train(asked)
    path = tmp_path / "run" / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["method"] |= tree["method"].pop("policy")
    path.write_text(yaml.safe_dump(tree))
    assert [row["step"] for row in kibitz.train(asked | {"steps": 2}, resume=True).metrics] == [1, 2]
    with pytest.raises(RecipeError, match="was made with another method"):
        kibitz.train(asked | {"steps": 3, "method": {"type": "opd", "support": "sampled"}}, resume=True)


def test_a_result_of_an_older_version_is_not_made_again():
    tree = {**LEAST, "method": {"type": "opd", "support": "sampled", "discount": 0.5}}
    today = config.load(tree).model_dump(mode="json", exclude_unset=True)
    assert today != json.loads(json.dumps(tree))
    assert made_with({"settings": {"recipe": tree, "dev": 4}}) == {"recipe": today, "dev": 4}
    broken = {"recipe": {"method": {"type": "gone"}}}
    assert made_with({"settings": broken}) == broken
