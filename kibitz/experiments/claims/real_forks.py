"""Forking tokens in English: where does the penalty fall in the answers of a model that lost layers, and of its healed self?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from kibitz.evaluate.annotate import score_texts
from kibitz.experiments.charts import Heat
from kibitz.experiments.claims import real_heal
from kibitz.experiments.claims.forking import MOST, holders
from kibitz.experiments.design import OF_ARM
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import Record
from kibitz.experiments.results import Results
from kibitz.report.heatmap import penalty

BEFORE, AFTER = "student", "healed"
TITLES = {BEFORE: "before", AFTER: "after OPD"}
MAX_TOKENS = 40
LEAST_MEAN = 0.05  # nats a token; in a text that costs less there is nothing to share out
SHOWN = (0, 1, 2)  # prompts of the picture


@cache
def asked() -> list[str]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


# ------------------------------------------------------------------ what is looked at


def probe(study: Any, seed: int) -> Record:
    """What `kibitz score` says of the greedy answers of the student before, and of its healed self where there is one."""
    prompts = asked()[: study.experiment.test_problems]
    limit = min(MAX_TOKENS, study.untrained().rollout.max_tokens)
    healed = study.place(f"{OF_ARM}{study.experiment.arms[0].name}", seed)
    places = {BEFORE: study.place(BEFORE, seed), AFTER: healed}
    found: Record = {"prompts": prompts, "models": {}}
    for name, place in places.items():
        pairs = [(prompt, None) for prompt in prompts]
        rows = score_texts(place, study.place("teacher", seed), pairs, max_tokens=limit, temperature=0.0, seed=seed)
        found["models"][name] = [_kept(row) for row in rows]
    return found


def _kept(row: Record) -> Record:
    fork = row["fork"]
    return {
        "response": row["response"],
        "finished": row["finished"],
        "fork": fork,
        "instead": None if fork is None else row["tokens"][fork]["teacher_top"][0][0],
        "tokens": [token["text"] for token in row["tokens"]],
        "nats": [round(penalty(token) or 0.0, 3) for token in row["tokens"]],
        "reverse_kl": fmean(token["reverse_kl"] for token in row["tokens"]),
    }


# ------------------------------------------------------------------ what it says


def find(results: Results) -> Finding:
    """How few tokens hold most of the penalty, and what the teacher would rather have said at the worst."""
    record = results.probes()[0]
    models: Mapping[str, Sequence[Record]] = record["models"]
    shares = {name: shared(rows) for name, rows in models.items()}
    numbers = {
        "num": len(record["prompts"]),
        "most": MOST,
        "max_tokens": MAX_TOKENS,
        "shares": shares,
        "titles": TITLES,
        "rows": [(prompt, [(TITLES[name], *_worst(rows[place])) for name, rows in models.items()])
                 for place, prompt in enumerate(record["prompts"])],
    }  # fmt: skip
    return Finding(verdict(shares), numbers, tuple(_heat(name, record) for name in models))


def shared(rows: Sequence[Record]) -> dict[str, float]:
    """Of all answers of one model: how its penalty is shared out among the tokens."""
    punished = [row for row in rows if fmean(row["nats"]) > LEAST_MEAN]
    nats = [cost for row in rows for cost in row["nats"]]
    return {
        "punished": len(punished),
        "holders": fmean(len(holders(row["nats"])) / len(row["nats"]) for row in punished) if punished else 0.0,
        "forked": fmean(row["fork"] is not None for row in rows),
        "finished": fmean(row["finished"] for row in rows),
        "mean": fmean(nats),
        "median": median(nats),
        "largest": fmean(max(row["nats"]) for row in rows),
        "reverse_kl": fmean(row["reverse_kl"] for row in rows),
    }


def verdict(shares: Mapping[str, Mapping[str, float]]) -> Verdict:
    """Partly at best, because nobody can say at which token an answer in English goes wrong: if less than half of the tokens hold
    most of the penalty, before and after."""
    known = [by for by in shares.values() if by["punished"]]
    return "partly" if known and all(by["holders"] < 0.5 for by in known) else "not"


def _worst(row: Record) -> tuple[str, str, str, float]:
    """An answer, its most punished token with the words before it, the teacher's word there, and the penalty."""
    if row["fork"] is None:
        return row["response"], "", "", max(row["nats"])
    at = row["fork"]
    return row["response"], "".join(row["tokens"][max(0, at - 4) : at + 1]), row["instead"], row["nats"][at]


def _heat(name: str, record: Record) -> Heat:
    texts = []
    for place in SHOWN:
        if place < len(record["prompts"]):
            row = record["models"][name][place]
            instead = "" if row["fork"] is None else f"  (teacher: {row['instead'].strip() or 'a space'})"
            words = record["prompts"][place][: 70 - len(instead)] + instead
            texts.append((words, list(zip(row["tokens"], row["nats"], strict=True))))
    return Heat(f"{TITLES[name]}: each token by its penalty", texts)


EXPERIMENT = replace(
    real_heal.EXPERIMENT,
    name="real-forks",
    question="In the answers of a real model that lost layers, where does the penalty fall, before and after it is healed?",
    arms=(real_heal.whole("opd"),),
    makers=(real_heal.short("opd"),),
    runs_in=real_heal.EXPERIMENT.name,
    seeds=1,
    quick_arms=("opd",),
    probe=probe,
    find=find,
)
