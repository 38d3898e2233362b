"""Teachers: what they may answer, and the sentence for everything else."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from kibitz.config import RecipeError, load_as
from kibitz.control import teachers
from kibitz.control.build import build_teacher
from kibitz.control.environments import Shape
from kibitz.control.recipe import PolicyTeacherConfig
from kibitz.control.served import ServedTeacher
from kibitz.control.teachers import Answer, CachedTeacher, FunctionTeacher, SampledTeacher, TeacherError, checked

DISCRETE = Shape(2, 3, np.empty(0), np.empty(0))
CONTINUOUS = Shape(2, 0, np.array([-1.0]), np.array([1.0]))
SEEN = np.array([[0.0, 1.0], [2.0, 3.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("shape", "action", "words"),
    [
        (CONTINUOUS, [[0.0], [1.5]], "answered with 1.5, out of the range"),
        (CONTINUOUS, [[0.0]], r"shape \(1, 1\): it must be \(2, 1\)"),
        (CONTINUOUS, [[0.0], [np.nan]], "not finite"),
        (DISCRETE, [0, 3], "answered with 3.0: an action is 0 to 2"),
        (DISCRETE, [0, 0.5], "answered with 0.5: an action is 0 to 2"),
        (DISCRETE, ["left", "right"], "not with numbers"),
    ],
)
def test_an_answer_that_cannot_be_has_a_sentence_with_the_teachers_name(shape, action, words):
    with pytest.raises(TeacherError, match=f"the oracle .*{words}"):
        checked("the oracle", Answer(np.array(action)), 2, shape)


def test_rounding_beyond_a_bound_is_cut_and_a_missing_dimension_is_put_in():
    found = checked("t", Answer(np.array([1.00001, -1.0])), 2, CONTINUOUS)
    assert found.action.tolist() == [[1.0], [-1.0]]


def test_what_a_function_raises_is_its_failure():
    with pytest.raises(TeacherError, match="the teacher m:f failed: ZeroDivisionError"):
        FunctionTeacher("the teacher m:f", lambda seen: 1 / 0, DISCRETE).answer(SEEN)


def test_a_cached_teacher_is_asked_once_for_each_observation():
    asked = []

    def act(seen_BO):
        asked.append(len(seen_BO))
        return seen_BO[:, 0].astype(int)

    teacher = CachedTeacher(FunctionTeacher("t", act, DISCRETE))
    assert teacher.answer(SEEN[[0, 1, 0]]).action.tolist() == [0, 2, 0]
    assert teacher.answer(SEEN[[1]]).action.tolist() == [2]
    assert asked == [2]


def test_a_gaussian_is_fitted_to_several_answers():
    answers = iter([[[0.0], [1.0]], [[0.5], [1.0]], [[1.0], [1.0]]])
    found = SampledTeacher(FunctionTeacher("t", lambda seen: next(answers), CONTINUOUS), 3, CONTINUOUS).answer(SEEN)
    assert found.action.tolist() == [[0.5], [1.0]]
    assert found.std_BA.tolist() == [[0.5], [2 * teachers.SMALLEST_STD]]


def test_shares_are_fitted_to_discrete_answers():
    answers = iter([[0, 1], [0, 2], [1, 2]])
    found = SampledTeacher(FunctionTeacher("t", lambda seen: next(answers), DISCRETE), 3, DISCRETE).answer(SEEN)
    np.testing.assert_allclose(np.exp(found.logp_BK), [[3 / 6, 2 / 6, 1 / 6], [1 / 6, 2 / 6, 3 / 6]])


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "this one has none"),
        ({"run": "a", "url": "http://b"}, "this one has run, url"),
        ({"sb3": "a.zip"}, "write trust: true if you trust it"),
        ({"python": "os:nothing", "trust": True}, "os:nothing cannot be imported"),
        ({"python": "os", "trust": True}, "write module:function"),
        ({"sb3": "nowhere.zip", "trust": True}, "there is no file nowhere.zip"),
        ({"run": "runs/nowhere"}, "there is no run of `kibitz control` at runs/nowhere"),
    ],
)
def test_a_teacher_that_is_not_there_is_told_before_anything_is_played(section, words):
    with pytest.raises((RecipeError, ValueError), match=words):
        build_teacher(load_as(PolicyTeacherConfig, section), DISCRETE)


def test_a_file_of_stable_baselines3_answers_with_its_distribution(tmp_path):
    from stable_baselines3 import DQN, PPO

    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", seed=0).save(tmp_path / "ppo.zip")
    DQN("MlpPolicy", "CartPole-v1", buffer_size=10, device="cpu", seed=0).save(tmp_path / "dqn.zip")
    shape, seen = Shape(4, 2, np.empty(0), np.empty(0)), np.zeros((3, 4), np.float32)
    found = build_teacher(PolicyTeacherConfig(sb3=str(tmp_path / "ppo.zip"), trust=True), shape).answer(seen)
    np.testing.assert_allclose(np.exp(found.logp_BK).sum(-1), 1.0, atol=1e-6)
    assert (found.action == found.logp_BK.argmax(-1)).all()
    other = PolicyTeacherConfig(sb3=str(tmp_path / "dqn.zip"), algorithm="DQN", trust=True)
    found = build_teacher(other, shape).answer(seen)
    assert found.logp_BK is None and found.action.shape == (3,)


# ------------------------------------------------------------------ over HTTP


class Served:
    """A server on a free port, whose answer to a request is what `reply` gives: a status and a body."""

    def __init__(self, reply):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append(len(body["observations"]))
                status, text = reply(body["observations"])
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/act"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def ask(served: Served, seen=SEEN, **settings):
    teacher = ServedTeacher(PolicyTeacherConfig(url=served.url, **{"timeout": 300.0, **settings}), DISCRETE)
    try:
        return teacher.answer(seen)
    finally:
        teacher.client.close()


def test_a_served_teacher_is_asked_in_batches_and_may_send_log_probabilities():
    logp = np.log([0.2, 0.3, 0.5]).tolist()
    reply = lambda rows: (200, json.dumps({"actions": [2] * len(rows), "logp": [logp] * len(rows)}))  # noqa: E731
    with Served(reply) as served:
        found = ask(served, np.repeat(SEEN, 4, axis=0), batch=3)
    assert served.asked == [3, 3, 2]
    assert found.action.tolist() == [2] * 8 and found.logp_BK.shape == (8, 3)


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (200, '{"action": [0, 1]}', "did not answer with"),
        (200, "hello", "did not answer with"),
        (200, '{"actions": [0, 7]}', "answered with 7.0: an action is 0 to 2"),
        (200, '{"actions": [0, 1], "logp": [[0, 0], [0, 0]]}', r"logp of shape \(2, 2\)"),
        (500, "out of memory", "answered 500: 'out of memory'"),
    ],
)
def test_a_served_teacher_that_answers_otherwise_is_named(status, text, words):
    with Served(lambda rows: (status, text)) as served, pytest.raises(TeacherError, match=f"the teacher at .*{words}"):
        ask(served)


def test_a_server_that_is_slow_or_not_there_is_named():
    released = threading.Event()
    with Served(lambda rows: (200, str(released.wait(300)))) as served:
        with pytest.raises(TeacherError, match="no answer within 0.2 s: raise teacher.timeout"):
            ask(served, timeout=0.2)
        released.set()
    with pytest.raises(TeacherError, match="cannot be reached"):
        ask(served, retries=0)


def test_requests_keep_their_distance(monkeypatch):
    slept = []
    monkeypatch.setattr("kibitz.control.served.time.sleep", slept.append)
    with Served(lambda rows: (200, json.dumps({"actions": [0] * len(rows)}))) as served:
        ask(served, np.repeat(SEEN, 2, axis=0), batch=1, per_second=0.01)
    assert slept[0] == 0 and all(pause > 90 for pause in slept[1:])
