"""A model in three stages, from nothing to a folder that one can talk to: pre-training, mid-training, on-policy distillation."""

import shutil
from collections.abc import Mapping
from typing import Any

from kibitz.config import ModelConfig
from kibitz.data import load_prompts
from kibitz.evaluate.chat import Conversation
from kibitz.experiments.design import OF_ARM, TOY, Arm, Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.make_world import FROM_NOTHING
from kibitz.experiments.records import Record, measure, share_with_interval
from kibitz.experiments.results import Results
from kibitz.experiments.shapes import compared, turned
from kibitz.experiments.statistics import Estimate, apart
from kibitz.models.load import load_tokenizer
from kibitz.training.checkpoint import export
from kibitz.types import Sampling

STAGES: Mapping[str, str] = {"student": "pre-trained", "mid-trained": "mid-trained", "recovered": "after OPD"}
"""The model that each stage leaves, as recipes call it, and in words."""
PUBLISHED = {"student": "18 / 85", "mid-trained": "36 / 79", "recovered": "41 / 83"}
BOTH = ("questions", "instructions")
LOOKED_AT, SHOWN = 24, 3  # problems of each kind that are asked, and those that are shown


# ------------------------------------------------------------------ what is looked at


def probe(study: Any, seed: int) -> Record:
    """The last stage's model is exported, and all three are talked to: problems of the test split, answered greedily."""
    places = {name: study.place(name if name == "student" else f"{OF_ARM}{name}", seed) for name in STAGES}
    if seed == 0:
        shutil.rmtree(study.work / "model", ignore_errors=True)
        export(places["recovered"], study.work / "model", merge=False)
        places["recovered"] = str(study.work / "model")
    recipe = study.untrained()
    sampling = Sampling(max_tokens=recipe.rollout.max_tokens, temperature=0.0)
    found = {}
    for kind in BOTH:
        data = study.asked(kind, "test", LOOKED_AT, recipe, None)
        prompts = load_prompts(data, load_tokenizer(ModelConfig(model=places["student"]), "student"), seed)
        asked = [{"prompt": prompt.text, "answer": prompt.answer, "said": {}} for prompt in prompts[:LOOKED_AT]]
        for name, place in places.items():
            conversation = Conversation.with_model(place, sampling, **data.template)
            for one in asked:
                conversation.forget()
                one["said"][name] = conversation.ask(one["prompt"])
        found[kind] = sorted(asked, key=lambda one: -len(set(one["said"].values())))[:SHOWN]
    return {"chat": found, "folder": str(study.work / "model")}


# ------------------------------------------------------------------ what it says


def level(results: Results, stage: str, kind: str) -> Estimate:
    """Accuracy after a stage, with its interval."""
    if stage != "student":
        return results.accuracy(stage, name=kind)
    test = measure(results.model("student"), kind)
    return share_with_interval([test["sampled"]["accuracy"]], test["num_prompts"])


def verdict(levels: Mapping[str, Mapping[str, Estimate]]) -> Verdict:
    """Mid-training brings facts and costs instructions; OPD brings these back, and most of the facts stay."""
    facts, follows = ({stage: by[kind] for stage, by in levels.items()} for kind in BOTH)
    learnt, lost = apart(facts["mid-trained"], facts["student"]), apart(follows["student"], follows["mid-trained"])
    back = apart(follows["recovered"], follows["mid-trained"]) and apart(facts["recovered"], facts["student"])
    return "reproduced" if learnt and lost and back else "partly" if learnt and (lost or back) else "not"


def find(results: Results) -> Finding:
    """Report the accuracy of each stage, and its answers in a chat."""
    levels = {stage: {kind: level(results, stage, kind) for kind in BOTH} for stage in STAGES}
    made = results.made("pretrained")
    seconds = {"student": made[0]["cpu_seconds"] if made else 0.0}
    seconds |= {arm: results.mean(arm, lambda run: run["cpu_seconds"])[0] for arm in list(STAGES)[1:]}
    chat = results.probes()[0]
    numbers = {
        "levels": levels,
        "seconds": seconds,
        "total": sum(seconds.values()),
        "rows": [(STAGES[stage], by, PUBLISHED[stage], seconds[stage]) for stage, by in levels.items()],
        "stages": list(STAGES.values()),
        "folder": chat["folder"],
        "looked_at": LOOKED_AT,
        "talk": [(one["prompt"], one["answer"] or "", [one["said"][stage] for stage in STAGES])
                 for kind in BOTH for one in chat["chat"][kind]],
    }  # fmt: skip
    named = {STAGES[stage]: by for stage, by in levels.items()}
    panel = compared("what each stage leaves", "accuracy", list(STAGES.values()), turned(named), joined=True)
    return Finding(verdict(levels), numbers, [panel])


EXPERIMENT = Experiment(
    name="pipeline",
    question="From random weights to a model that one can talk to: what does each of the three stages give and take?",
    world="assistant",
    recipe=merged(
        TOY,
        {
            "method": {"type": "sft"},
            "rollout": {"prompts_per_step": 32, "max_tokens": 32},
            "optim": {"tokens_per_micro_batch": 2048},
            "steps": 250,
        },
    ),
    makers=(
        Arm(
            "pretrained",
            "documents and chat, from nothing",
            {"student": {"model": "blank:64x3"}, "optim": dict(FROM_NOTHING), "steps": 2000},
            rates=(FROM_NOTHING["lr"],),
            data="background",
        ),
    ),
    arms=(
        Arm(
            "mid-trained",
            "new documents, 70%, and chat, answered by the pre-trained model",
            {"teacher": {"model": "student"}, "method": {"type": "sft", "fill": "teacher"}},
            rates=(2e-3,),
            data="documents",
            judge=("questions",),
        ),
        Arm(
            "recovered",
            "OPD from the pre-trained model, on chat",
            {
                "student": {"model": "arm:mid-trained"},
                "teacher": {"model": "student"},
                "method": {"type": "opd"},
                "rollout": {"prompts_per_step": 64},
                "steps": 60,
            },
            rates=(5e-4,),
            data="chat",
            every=10,
            stop="best",
            judge=BOTH,
        ),
    ),
    rates=(2e-3,),
    dev_problems=256,
    test_problems=512,
    seeds=3,
    quick_arms=("mid-trained", "recovered"),
    models={"student": "arm:pretrained"},
    data={
        "background": {"world": "assistant-background", "options": {"chat": 0.5}},
        "documents": {"world": "assistant-documents", "options": {"chat": 0.3, "answered": False}},
        "chat": {"world": "assistant"},
        "questions": {"world": "assistant-documents"},
        "instructions": {"world": "assistant-instructions"},
    },
    measures={kind: kind for kind in BOTH},
    probe=probe,
    find=find,
)
