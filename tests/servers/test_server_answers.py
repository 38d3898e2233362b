"""Mutated answers never train: each is refused in a sentence, or it decodes to exactly the values of the good answer.

A mutation here is one that shows: a value of another kind, another length, order or name, a number that fits no rank, no sum
or no vocabulary. That one plausible number takes another's place shows in no answer.
"""

import base64
import copy
import io
import json
import math
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from support.models import make_model
from support.vllm_stub import Stub

from kibitz.servers import ServerError
from kibitz.servers.answers import named, said, written

IDS, START = [1, 5, 6, 7, 9, 14, 3, 8, 11, 20, 6, 13, 2], 4
NAME = "the teacher at http://127.0.0.1:1"
ODD = [None, True, False, math.nan, math.inf, -math.inf, 1e30, 0.5, 10**300, "x", "-1.0", "", [], {}, [1], {"a": 1}]
"""What stands for no log-probability."""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    served = Stub(make_model(tmp_path_factory.mktemp("answers") / "model"))
    with served:
        yield served


def ask(stub: Stub, top_k: int, path: str) -> Any:
    params = {"max_tokens": 1, "prompt_logprobs": top_k}
    if path == "/v1/completions":
        return stub.answer(path, {"model": "stub", "prompt": IDS, **params})
    return stub.answer(path, {"model": "stub", "token_ids": IDS, "sampling_params": params})


def values(told: Any) -> list[Any]:
    return [told.ids_TK.tolist(), told.logp_TK.tolist(), told.logp_T.tolist()]


def rows_of(tree: dict) -> list:
    return tree["prompt_logprobs"] if "prompt_logprobs" in tree else tree["choices"][0]["prompt_logprobs"]


def refused_or_the_same(decode: Callable[[Any], Any], truth: Any, tree: Any) -> bool:
    """Whether it was refused; fails where it was neither."""
    try:
        found = decode(tree)
    except ServerError as error:
        sentence = str(error)
    else:
        assert found == truth, tree
        return False
    assert NAME in sentence and sentence.isprintable() and len(sentence) < 400
    return True


# ------------------------------------------------------------------ what a teacher says of a text


def mutate_rows(rows: list, rng: random.Random) -> None:
    at = rng.randrange(START, len(rows))
    row, token = rows[at], str(IDS[at])
    match rng.randrange(12):
        case 0:
            row[rng.choice(list(row))]["logprob"] = rng.choice(ODD)
        case 1:
            row[rng.choice(list(row))] = rng.choice(ODD)
        case 2:
            rows[at] = rng.choice(ODD)
        case 3:
            del rows[at]
        case 4:
            rows.insert(at, copy.deepcopy(row))
        case 5:  # an order that shows: the other row says nothing of the token that stands here
            others = [i for i in range(START, len(rows)) if token not in rows[i]]
            if others:
                other = rng.choice(others)
                rows[at], rows[other] = rows[other], rows[at]
        case 6:
            del row[rng.choice(list(row))]
        case 7:
            free = [i for i in range(21) if str(i) not in row]
            row[str(rng.choice(free or [21]))] = {"logprob": rng.uniform(-9, 0), "rank": 1, "decoded_token": None}
        case 8:
            key = rng.choice(list(row))
            odd = ["-" + key, "0" + key, key + " ", "x", "", "²", "٣", "1e1", "7" * 5000]
            if row[key]["logprob"] > math.log(0.02):  # an unlikely one would be padding of the server's vocabulary
                odd.append("999999999")
            row[rng.choice(odd)] = row.pop(key)
        case 9:
            one, other = rng.choice(list(row)), rng.choice(list(row))
            row[one]["logprob"], row[other]["logprob"] = row[other]["logprob"], row[one]["logprob"]
        case 10:
            row[rng.choice(list(row))]["rank"] = rng.choice([*ODD[1:], 0, -3])
        case _:
            one = rng.choice(list(row))
            row[one]["logprob"] = -row[one]["logprob"]


def mutate_tree(tree: dict, rng: random.Random) -> Any:
    holder = tree if "prompt_logprobs" in tree else tree["choices"][0]
    match rng.randrange(8):
        case 0:
            tree["model"] = rng.choice([*ODD, "evil", "stu", "stub ", "STUB"])
        case 1:
            del tree["model"]
        case 2:
            holder["prompt_logprobs"] = rng.choice(ODD)
        case 3:
            del holder["prompt_logprobs"]
        case 4:
            tree["choices"] = rng.choice([*ODD, [tree["choices"][0]] * 2])
        case 5:
            holder["prompt_logprobs"] = dict(enumerate(rows_of(tree)))
        case 6:
            return rng.choice([*ODD, [tree]])
        case _:
            tree["more"] = {"prompt_logprobs": 5}
    return tree


@pytest.mark.parametrize("path", ["/v1/completions", "/inference/v1/generate"])
@pytest.mark.parametrize("top_k", [0, 1, 3, 21])
def test_mutated_scores_are_refused_or_say_the_same(stub, top_k, path):
    good, rng = ask(stub, top_k, path), random.Random(f"{top_k}{path}")

    def decode(tree: Any) -> Any:
        return values(said(NAME, tree, "stub", IDS, START, top_k, 21))

    truth, refused, num = decode(good), 0, 400
    own_T1 = stub.logps(IDS)[START - 1 : -1].gather(-1, torch.tensor(IDS[START:])[:, None])
    assert truth[2] == pytest.approx(own_T1[:, 0].tolist())
    for _ in range(num):
        tree = copy.deepcopy(good)
        if rng.random() < 0.75:
            mutate_rows(rows_of(tree), rng)
        else:
            tree = mutate_tree(tree, rng)
        refused += refused_or_the_same(decode, truth, tree)
    assert refused > num / 2


def test_a_cut_answer_is_no_json_and_a_doubled_name_neither(stub):
    """Through HTTP: what is cut anywhere, or says one thing twice, is no answer."""
    from kibitz.config.servers import ServerConfig
    from kibitz.servers.http import Servers

    data = json.dumps(ask(stub, 3, "/inference/v1/generate")).encode()
    rng = random.Random(5)
    cut = [data[: rng.randrange(len(data))] for _ in range(8)]
    twice = [data.replace(b'"model": "stub"', b'"model": "evil", "model": "stub"'),
             data.replace(b'"rank": 1,', b'"logprob": -2.5, "rank": 1,', 1)]  # fmt: skip
    assert all(other != data for other in twice)
    for other in (*cut, *twice, b"\xff" + data, data[:50] + b"\x00" + data[50:]):
        stub.bend = lambda path, answer, other=other: other
        servers = Servers(ServerConfig(patience=0), [stub.url], "teacher")
        with pytest.raises(ServerError, match=r"not JSON, or that breaks off.*3 times in a row"):
            servers.gather([servers.submit(lambda server: server.ask("/v1/models"))])
        servers.close()


@pytest.mark.parametrize("top_k", [0, 1])
def test_a_server_that_writes_0_for_everything_is_refused(stub, top_k):
    def decode(tree: Any, ids: list[int], start: int) -> Any:
        return said(NAME, tree, "stub", ids, start, top_k, 21)

    def zeros(ids: list[int], rank: int | None = 1) -> dict:
        return {
            "model": "stub",
            "prompt_logprobs": [None, *({str(i): {"logprob": 0.0, "rank": rank}} for i in ids[1:])],
        }

    for ids, start in ((IDS, 4), (IDS[:6], 4), (IDS[:6], 5), (IDS[:3], 1), (IDS[:10], 1)):
        with pytest.raises(ServerError, match="finds every token certain.*raw_logprobs"):
            decode(zeros(ids, rank=None), ids, start)
    with pytest.raises(ServerError, match="for the token of rank 4, which is too much"):
        decode(zeros(IDS, rank=4), IDS, 4)
    # A short response may be certain behind a prompt that is not.
    tree = zeros(IDS[:6])
    tree["prompt_logprobs"][2] = {str(IDS[2]): {"logprob": -3.0, "rank": 2}}
    assert decode(tree, IDS[:6], 4).logp_T.tolist() == [0.0, 0.0]
    tree = zeros(IDS)
    tree["prompt_logprobs"][2] = tree["prompt_logprobs"][7] = None
    tree["prompt_logprobs"][7] = {str(IDS[7]): {"logprob": -1e-6, "rank": 1}}
    assert decode(tree, IDS, 4).logp_T.min() == pytest.approx(-1e-6)


@pytest.mark.parametrize("change", [lambda logp: math.exp(logp), lambda logp: logp + 0.8, lambda logp: logp / 4])
def test_probabilities_that_add_up_to_more_than_1_are_refused(stub, change):
    tree = ask(stub, 21, "/inference/v1/generate")
    for row in rows_of(tree)[1:]:
        for entry in row.values():
            entry["logprob"] = change(entry["logprob"])
    with pytest.raises(ServerError, match="raw_logprobs"):
        said(NAME, tree, "stub", IDS, START, 21, 21)


# ------------------------------------------------------------------ the tokens that were asked about


def packed(array: numpy.ndarray, **options: Any) -> str:
    file = io.BytesIO()
    numpy.save(file, array, **options)
    return base64.b64encode(file.getvalue()).decode()


def scored(stub: Stub, ids_TK: torch.Tensor) -> numpy.ndarray:
    return stub.logps(IDS)[START - 1 : -1].gather(-1, ids_TK).numpy()


@pytest.fixture
def question() -> torch.Tensor:
    """Five tokens at each place, the written one first and, at some, once more among the others."""
    written_T1 = torch.tensor(IDS[START:])[:, None]
    ids_TK = torch.cat([written_T1, torch.arange(4).expand(len(written_T1), 4)], dim=-1)
    ids_TK[::2, 3] = written_T1[::2, 0]
    return ids_TK


def npz(array: numpy.ndarray) -> str:
    file = io.BytesIO()
    numpy.savez(file, array)
    return base64.b64encode(file.getvalue()).decode()


def empty_zip() -> str:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    return base64.b64encode(b"PK\x03\x04" + file.getvalue()).decode()


def headed(head: str) -> str:
    data = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode()
    return base64.b64encode(data + b"\0" * 180).decode()


def edited(array: numpy.ndarray, at: tuple[int, int], value: float) -> numpy.ndarray:
    array = array.copy()
    array[at] = value
    return array


def test_mutated_scores_of_named_tokens_are_refused_or_say_the_same(stub, question):
    array = scored(stub, question)

    def decode(tree: Any) -> list[list[float]]:
        return named(NAME, tree, "stub", question).tolist()

    good = {"model": "stub", "prompt_token_id_logprobs": packed(array)}
    truth, text = decode(good), good["prompt_token_id_logprobs"]
    assert truth == array.tolist()
    same = [array.astype(">f4"), array.astype("f8"), numpy.asfortranarray(array)]
    for other in same:
        assert not refused_or_the_same(decode, truth, good | {"prompt_token_id_logprobs": packed(other)})
    wrong = [
        array[:-1], array[:, :-1], array.T, array.ravel(), array[None], array.astype("f2"), array.astype("c8"),
        array.astype("i4"), array > 0, array.astype(str), array[::-1].copy() + 1, numpy.zeros_like(array), array * 0 - 1,
        edited(array, (2, 1), math.nan), edited(array, (2, 1), math.inf), edited(array, (2, 1), 0.5),
        edited(array, (2, 0), array[2, 0] / 2), edited(array, (2, 3), array[2, 3] * 2), numpy.exp(array), array / 9,
        numpy.repeat(array, 2, axis=0), numpy.rec.array([(1.0, 2)] * 9, dtype=[("a", "f4"), ("b", "i4")]),
    ]  # fmt: skip
    texts = [
        *(packed(one) for one in wrong), npz(array), empty_zip(), packed(array.astype(object), allow_pickle=True),
        text[:-8], text[:40], text + "AAAA", text[4:], "", "x", "é" + text, "=" * 8, text.replace("A", " ", 1),
        base64.b64encode(base64.b64decode(text) + b"\0\0\0\0").decode(), base64.b64encode(b"\x93NUMPY").decode(),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 1000000000000)}\n"),
        headed("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 5), 'more': 1}\n"), headed("(" * 9000 + "\n"),
        headed("__import__('os').getcwd()\n"), headed("{'descr': '|O', 'fortran_order': False, 'shape': (9, 5)}\n"),
        headed("{'descr': '<f4', 'fortran_order': 3, 'shape': (9, 5)}\n"), headed("{'descr\n"), headed("\0\n"),
    ]  # fmt: skip
    for other in texts:
        assert refused_or_the_same(decode, truth, good | {"prompt_token_id_logprobs": other}), other[:80]
    for odd in ODD:
        assert refused_or_the_same(decode, truth, good | {"prompt_token_id_logprobs": odd})
        assert refused_or_the_same(decode, truth, good | {"model": odd})
        assert refused_or_the_same(decode, truth, odd)
    rng = random.Random(7)
    for _ in range(300):  # a byte of the file's head is another
        data = bytearray(base64.b64decode(text))
        data[rng.randrange(128)] = rng.randrange(256)
        refused_or_the_same(decode, truth, good | {"prompt_token_id_logprobs": base64.b64encode(data).decode()})


def test_a_written_token_among_the_likeliest_counts_once():
    """Asked about twice, p = 0.9 is 0.9 and not 1.8; both times it is the same number."""
    logp_TK = torch.tensor([[0.9, 0.9, 0.05], [0.6, 0.3, 0.09]]).log()
    ids_TK = torch.tensor([[7, 7, 3], [5, 7, 3]])
    tree = {"model": "m", "prompt_token_id_logprobs": packed(logp_TK.numpy())}
    assert torch.equal(named(NAME, tree, "m", ids_TK), logp_TK)
    for ids in ([[7, 6, 3], [5, 7, 3]], [[7, 7, 3], [5, 5, 3]]):
        with pytest.raises(ServerError, match=r"add up to 1\.85|two log-probabilities for one token"):
            named(NAME, tree, "m", torch.tensor(ids))


def test_named_tokens_that_are_all_certain_are_refused():
    """Where the student's likeliest is what was written there is one token a place, and no sum to tell by."""
    tree = {"model": "m", "prompt_token_id_logprobs": packed(numpy.zeros((9, 2), dtype=numpy.float32))}
    with pytest.raises(ServerError, match="finds every token certain"):
        named(NAME, tree, "m", torch.full((9, 2), 5))


# ------------------------------------------------------------------ what a student's server writes


def mutate_choices(tree: dict, rng: random.Random) -> Any:
    choices = tree["choices"]
    choice = rng.choice(choices)
    ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    at = rng.randrange(len(ids))
    match rng.randrange(12):
        case 0:
            logps[at] = rng.choice(ODD)
        case 1:
            ids[at] = rng.choice([*(odd for odd in ODD if odd != 1), -1, 21, 10**9, 5.0])
        case 2:
            del (ids if rng.random() < 0.5 else logps)[at]
        case 3:
            (ids if rng.random() < 0.5 else logps).insert(at, 5)
        case 4:
            choice["index"] = rng.choice([*ODD, -1, 3, 1.0])
        case 5:
            choice[rng.choice(["token_ids", "logprobs", "index"])] = rng.choice(ODD)
        case 6:
            choice["logprobs"]["token_logprobs"] = rng.choice(ODD)
        case 7:
            del choice[rng.choice(["token_ids", "logprobs", "index"])]
        case 8:
            choices.append(copy.deepcopy(choice))
        case 9:
            choices.remove(choice)
        case 10:
            choices.reverse()  # their numbers say which is which
        case _:
            return rng.choice([*ODD, [tree], tree | {"model": "evil"}, tree | {"choices": {"0": choice}}])
    return tree


def test_mutated_rollouts_are_refused_or_say_the_same(stub):
    body = {"model": "stub", "prompt": IDS[:4], "max_tokens": 8, "n": 3, "seed": 1}
    good, rng = stub.answer("/v1/completions", body), random.Random(11)

    def decode(tree: Any) -> Any:
        return [(one.ids, one.logp_T.tolist()) for one in written(NAME, tree, "stub", 3, 21, 8)]

    truth = decode(good)
    refused = sum(refused_or_the_same(decode, truth, mutate_choices(copy.deepcopy(good), rng)) for _ in range(600))
    assert refused > 400
