"""Where servers run: counted sizes in, GPUs and shares of their memory out, and one sentence for what does not go together."""

import pytest

from kibitz.config.servers import HostedConfig
from kibitz.servers.placement import ALONE, TOGETHER, Place, Role, place

GIB = 2.0**30
H100 = 80 * GIB


def student(size: float = 16 * GIB, work: float = 1.0, **asked) -> Role:
    return Role("student", HostedConfig(**asked), size, work)


def teacher(size: float = 64 * GIB, work: float = 1.0, **asked) -> Role:
    return Role("teacher", HostedConfig(**asked), size, work, spread=False)


def test_without_a_gpu_each_role_has_one_server_and_names_none():
    assert place([student(), teacher()], [], (), 0.0) == {"student": [Place()], "teacher": [Place()]}
    with pytest.raises(ValueError, match="rollout.server.gpus: there is no GPU here"):
        place([student(gpus=[0])], [], (), 0.0)


def test_on_one_gpu_all_share_it_and_what_they_take_together_fits():
    """An adapter of 1.7B (3.4 GB) under 8B (16 GB): keys and values get a fifth each where there is room."""
    found = place([student(3.4 * GIB), teacher(16 * GIB)], [H100], [0], 4 * GIB)
    (one,), (two,) = found["student"], found["teacher"]
    assert one.shared and two.shared and one.gpus == two.gpus == (0,)
    assert one.memory == pytest.approx(1.05 * 3.4 / 80 + 0.2, abs=1e-3)
    assert one.memory + two.memory + 4 / 80 <= TOGETHER + 1e-6
    with pytest.raises(ValueError, match=r"GPU 0 has too little memory: .*the trainer keeps 64% of its 80 GiB"):
        place([student(16 * GIB), teacher(16 * GIB)], [H100], [0], 51 * GIB)


def test_several_gpus_are_split_by_work_and_a_copy_keeps_its_gpus_together():
    """8B under 32B on 8 H100 with one GPU that trains: the teacher's weights fit twice on 2 GPUs; the student's copies have the
    rest."""
    found = place([student(), teacher()], [H100] * 8, [0], 8 * GIB)
    assert found["teacher"] == [Place((6, 7), ALONE)]
    assert [spot.gpus for spot in found["student"]] == [(1,), (2,), (3,), (4,), (5,)]
    large = place([student(64 * GIB), teacher()], [H100] * 8, [0, 1], 8 * GIB)
    assert [spot.gpus for spot in large["student"]] == [(2, 3), (4, 5)]


def test_processes_that_train_on_every_gpu_share_them_all():
    found = place([student()], [H100] * 4, range(4), 20 * GIB)
    assert [spot.gpus for spot in found["student"]] == [(0,), (1,), (2,), (3,)]
    assert all(spot.shared and spot.memory == pytest.approx(1.05 * 0.2 + 0.2, abs=1e-3) for spot in found["student"])


def test_what_a_recipe_says_is_done():
    asked = [student(gpus=[1, 2, 3, 4], tensor_parallel=2, memory=0.5), teacher(gpus=[5, 6, 7, 0], memory=0.6)]
    found = place(asked, [H100] * 8, [0], 8 * GIB)
    assert found["student"] == [Place((1, 2), 0.5), Place((3, 4), 0.5)]
    assert found["teacher"] == [Place((5, 6, 7, 0), 0.6, shared=True)]


@pytest.mark.parametrize(
    ("roles", "sentence"),
    [
        ([student(gpus=[1]), teacher(gpus=[1])], "both name GPU 1: give each role GPUs of its own, or say by memory"),
        ([student(gpus=[9])], "rollout.server.gpus: there is no GPU 9: there are 4, from 0 on"),
        ([student(gpus=[1, 2, 3], tensor_parallel=2)], "copies on 2 GPUs each do not fill 3"),
        ([teacher(gpus=[1, 2], tensor_parallel=1)], "this role has one server, on 2 GPUs"),
        ([student(gpus=[1], memory=0.6), teacher(gpus=[1], memory=0.6)], "GPU 1 has too little memory: the student's server"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_sentence(roles, sentence):
    with pytest.raises(ValueError, match=sentence):
        place(roles, [H100] * 4, [0], 8 * GIB)


def test_roles_that_name_one_gpu_and_their_shares_have_both():
    found = place([student(gpus=[1], memory=0.3), teacher(gpus=[1], memory=0.6)], [H100] * 2, [0], 8 * GIB)
    assert found == {"student": [Place((1,), 0.3, shared=True)], "teacher": [Place((1,), 0.6, shared=True)]}
