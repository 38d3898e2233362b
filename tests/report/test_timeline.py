"""The report's timeline: who was at work when, from what servers and the trainer say; and nothing of rows that say nonsense."""

import json
from pathlib import Path

import pytest
from support.paths import FIXTURES, script

from kibitz.report import costs
from kibitz.report.folder import read_run

synthetic = script(FIXTURES / "report_run" / "synthetic.py")
START = 1_790_000_000.0


@pytest.fixture
def run_with(tmp_path):
    """A run whose last steps have these timelines."""

    def make(*timelines):
        folder = synthetic.write_run(tmp_path / "run", num_prompts=4)
        path = Path(folder) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row, timeline in zip(rows[-len(timelines) :], timelines, strict=True):
            row["timeline"] = timeline
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_run(Path(folder))

    return make


def test_each_lane_has_its_times_from_the_first_on(run_with):
    run = run_with(
        {
            "student_sampling": [[START, START + 4]],
            "teacher_scoring": [[START + 1, START + 4.5]],
            "student_training": [],
        },
        {"student_sampling": [[START + 5, START + 8]], "student_training": [[START + 5, START + 7]]},
    )
    (chart,) = costs.timelines([run])
    lanes = {trace["name"]: (list(trace["base"]), list(trace["x"])) for trace in chart["figure"]["data"]}
    assert lanes == {
        "Student writes": ([0.0, 5.0], [4.0, 3.0]),
        "Teacher scores": ([1.0], [3.5]),
        "Student learns": ([5.0], [2.0]),
    }
    assert chart["title"] == "Who worked, who waited" and list(chart["figure"]["layout"]["xaxis"]["range"]) == [0, 8.0]


@pytest.mark.parametrize(
    "nonsense",
    [{}, [], "late", {"student_sampling": 3}, {"student_sampling": [[2, 1]]}, {"student_sampling": [["a", None], [1]]},
     {"<script>": [[1, 2]]}, {"student_sampling": [[1, 1e300]]}],
)  # fmt: skip
def test_a_timeline_that_cannot_be_is_not_drawn(run_with, nonsense):
    assert costs.timelines([run_with(nonsense)]) == []
