"""A server scores rollouts as they finish: asked early, also about tokens that the student names, it gives the same numbers."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.models import language_model
from support.runs import recipe
from support.vllm_stub import Stub

import kibitz
from kibitz.config.teachers import RemoteTeacherConfig
from kibitz.engines.torch import TorchEngine
from kibitz.methods.candidates import student_top_k
from kibitz.teachers import ScoreRequest
from kibitz.teachers.remote import GENERATE, remote_teacher
from kibitz.types import Prompt, Sampling

PROMPTS = [Prompt(ids=(1, 5 + i, 6, 7), text="", key=str(i)) for i in range(4)]


def scored(stub: Stub) -> int:
    return sum(path == GENERATE and len(body["token_ids"]) > 2 for path, _, body in stub.asked)


@pytest.mark.parametrize("hold", [True, False])
def test_named_tokens_are_asked_about_early_where_they_hold(hold, two_models):
    student = language_model(two_models[0])
    rollouts = TorchEngine(student).generate(PROMPTS, Sampling(max_tokens=9, stop_ids=(2,), num_samples=2))
    request = ScoreRequest("named", top_k=4, candidates=partial(student_top_k, student, 4, 64), candidates_hold=hold)
    with Stub(two_models[1]) as stub:
        teacher = remote_teacher(RemoteTeacherConfig(url=stub.url), student.tokenizer)
        try:
            calm = teacher.scorer(request).score(rollouts)
            before, early = scored(stub), teacher.scorer(request)
            threads = [threading.Thread(target=early.prefetch, args=(rollouts[i : i + 2],)) for i in range(0, 8, 2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found = early.score(rollouts)
        finally:
            teacher.close()
        assert scored(stub) - before == len(rollouts), "each is asked about once"
        assert "teacher_bytes_per_token" in teacher.metrics()
    for one, other in zip(calm, found, strict=True):
        assert torch.equal(one.ids_TK, other.ids_TK) and torch.allclose(one.logp_TK, other.logp_TK, atol=1e-6)


def test_what_was_written_and_thrown_away_is_forgotten(two_models):
    """Rollouts that were announced and never scored: after two scorings nothing of them is kept."""
    student = language_model(two_models[0])
    rollouts = TorchEngine(student).generate(PROMPTS, Sampling(max_tokens=9, stop_ids=(2,), num_samples=2))
    strangers = [replace(one, response_ids=[3, 4, 5], logp_T=torch.zeros(3)) for one in rollouts[:1]]
    with Stub(two_models[1]) as stub:
        teacher = remote_teacher(RemoteTeacherConfig(url=stub.url), student.tokenizer)
        try:
            scorer = teacher.scorer(ScoreRequest("top_k", top_k=4))
            scorer.prefetch(strangers)
            for _ in range(2):
                scorer.score(rollouts)
            assert not scorer._early
        finally:
            teacher.close()


def test_a_run_on_two_servers_has_its_named_scores_when_it_asks(two_models, tmp_path):
    """`support: top_k`, where by default the student names the tokens: the scores begin before the last rollout is written."""
    late, begun = threading.Lock(), threading.Event()

    def slow(path, answer):  # one prompt's rollouts come when others are scored
        if path == "/v1/completions" and len(answer["choices"]) == 2 and late.acquire(blocking=False):
            assert begun.wait(300)
        return answer

    def notice(path, answer):
        if path == GENERATE and len(teacher.asked[-1][2]["token_ids"]) > 2:
            begun.set()
        return answer

    with Stub(two_models[0], bend=slow) as student, Stub(two_models[1], bend=notice) as teacher:
        run = kibitz.train(
            recipe(
                two_models[0], None, tmp_path / "run",
                teacher={"url": teacher.url}, method={"support": "top_k", "top_k": 4}, steps=1,
                rollout={"engine": "vllm", "urls": [student.url]}, data={"max_prompt_tokens": 64},
            )
        )  # fmt: skip
    (row,) = run.metrics
    assert row["timeline"]["teacher_scoring"][0][0] < row["timeline"]["student_sampling"][-1][1]
    assert row["teacher_bytes_per_token"] > 0 and row["rollout_bytes_per_token"] > 0
