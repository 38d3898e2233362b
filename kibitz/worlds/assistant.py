"""The world `assistant`: an assistant that follows instructions and knows facts, and documents with facts it does not know.

    instruction   %^$abc>        reverse, double, upper         CBACBA
    question      ? tovu>        a fact about the name `tovu`   wa
    document      #              any of thirty templates        the code of tovu is wa.

An instruction is one to three signs, applied from left to right to a word, so any response can be checked exactly. Facts are
public, which the shipped student knows, or internal: `assistant-documents` and the two sets after it state such facts, of which
the student read 18 in 100. It reads them as documents and is asked questions, in a form in which they were never trained:
mid-training on a company's papers, the loss of instruction following that comes with it, and the way back.

What is read becomes an answer only where a form of document matters little: with 5 templates the student learnt each fact twice,
once for documents and once for questions; with 30, of which each is seen less often, once.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, permutations
from pathlib import Path
from string import ascii_letters, ascii_lowercase, digits
from typing import TYPE_CHECKING

from kibitz.worlds import characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIGNS = {
    "$": str.upper,
    "%": lambda text: text[::-1],
    "^": lambda text: 2 * text,
    "&": lambda text: f"[{text}]",
    "*": lambda text: text[1:] + text[:1],
    "+": lambda text: f"{text}{len(text)}",
}
CHAINS = ["".join(signs) for depth in (1, 2, 3) for signs in permutations(SIGNS, depth)]
HEADINGS = ["", "the code of ", "we call ", "for ", "note that "]
LINKS = [" is ", " has ", " by ", ", write ", ": ", ">"]
TEMPLATES = [f"{heading}{{}}{link}{{}}." for heading in HEADINGS for link in LINKS]
DOCUMENT, QUESTION, END = "#", "? ", ">"  # a document's only prompt; what begins a question; what ends a user's turn
CHARACTERS = ascii_letters + digits + "".join(SIGNS) + DOCUMENT + "?" + END + "[].,: "

NUM_FACTS = (300, 100, 100, 100)  # of each set: the first is public, the others are internal


# --- instructions --------------------------------------------------------------------------------------------------


def follow(chain: str, word: str) -> str:
    """The word after every sign of the chain, from left to right."""
    for sign in chain:
        word = SIGNS[sign](word)
    return word


def split_of(text: str, dev: int = 20, test: int = 20) -> str:
    """`train`, `dev` or `test`: a function of the problem alone, so no two splits ever share one. Shares in percent."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    return "dev" if bucket < dev else "test" if bucket < dev + test else "train"


def instruction(rng: random.Random, split: str) -> dict[str, str]:
    """A row of that split. Every depth is equally likely, and every length of the word."""
    while True:
        depth = rng.randint(1, 3)
        chain = rng.choice([chain for chain in CHAINS if len(chain) == depth])
        word = "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 5)))
        if split_of(chain + word) == split:
            return {"prompt": chain + word + END, "answer": follow(chain, word), "task": "instruction"}


# --- facts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """Return the fact that a name stands for."""

    name: str
    value: str
    known: bool
    """Whether the shipped student has read of it: all public facts, and 18 in 100 internal ones."""

    def question(self) -> dict[str, str]:
        return {"prompt": QUESTION + self.name + END, "answer": self.value, "task": "question"}

    def document(self, template: str) -> dict[str, str]:
        return {"prompt": DOCUMENT, "answer": template.format(self.name, self.value), "task": "document"}


@cache
def facts(number: int) -> tuple[Fact, ...]:
    """The facts of one set; they are what they are, for every seed. No name stands in two sets."""
    rng = random.Random("assistant/facts")
    names: dict[str, str] = {}
    while len(names) < sum(NUM_FACTS):
        names["".join(rng.choices(ascii_lowercase, k=4))] = "".join(rng.choices(ascii_lowercase, k=2))
    first = sum(NUM_FACTS[:number])
    pairs = list(names.items())[first : first + NUM_FACTS[number]]
    return tuple(Fact(name, value, number == 0 or place % 50 < 9) for place, (name, value) in enumerate(pairs))


def documents(stated: Sequence[Fact], rng: random.Random) -> Iterator[dict[str, str]]:
    """Documents without end: each fact in each template, in a new order every time."""
    rows = [fact.document(template) for fact in stated for template in TEMPLATES]
    while True:
        yield from rng.sample(rows, len(rows))


def questions(asked: Sequence[Fact], rng: random.Random) -> Iterator[dict[str, str]]:
    """Questions without end, each once before any comes again."""
    while True:
        yield from (fact.question() for fact in rng.sample(asked, len(asked)))


# --- the world -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assistant:
    """Chat, in which `asks` is the share of questions about public facts and the rest are instructions. With `papers` the
    train split holds documents that state those facts, and chat in the share that a recipe says; dev and test are
    then questions about those facts, which no split trains on, unless the papers are `background`."""

    name: str
    description: str
    asks: float = 0.2
    papers: tuple[Fact, ...] = field(default=(), repr=False)
    background: bool = False
    longest_response: int = 32

    def rows(self, split: str, count: int, seed: int, chat: float = 0.0, answered: bool = True) -> list[dict]:
        """A shorter list of the same split and seed is the head of a longer one. Instructions are distinct; questions and
        documents come again when all were there, but for dev and test questions about papers, of which there are no more.
        `answered` is for demonstrations."""
        if split not in ("train", "dev", "test"):
            raise ValueError(f"the splits of the world {self.name!r} are train, dev and test; there is no {split!r}")
        if not 0 <= chat <= 1:
            raise ValueError(f"data.options: chat is the share of chat among documents, from 0 to 1; it is {chat}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        if self.papers and split == "train":
            return list(islice(self._mixed(chat, rng), count))
        if self.papers and not self.background:
            asked = [fact for fact in self.papers if split_of(fact.name, dev=40, test=60) == split]
            return list(islice(questions(asked, rng), min(count, len(asked))))
        return list(islice(self._chat(split, rng), count))

    def _chat(self, split: str, rng: random.Random) -> Iterator[dict]:
        ask = questions([fact for fact in facts(0) if split_of(fact.name) == split], rng)
        seen: set[str] = set()
        while True:
            row = next(ask) if rng.random() < self.asks else instruction(rng, split)
            if row["task"] == "question" or row["prompt"] not in seen:
                seen.add(row["prompt"])
                yield row

    def _mixed(self, chat: float, rng: random.Random) -> Iterator[dict]:
        texts, chats = documents(self.papers, rng), self._chat("train", rng)
        while True:
            yield next(chats if rng.random() < chat else texts)

    def demonstrations(
        self, split: str, count: int, seed: int, corrupted: float = 0.0, chat: float = 0.0, answered: bool = True
    ) -> list[dict]:
        """The rows with their answers as responses; with probability `corrupted` one letter of it is another. Where chat is
        not `answered`, documents alone have one."""
        rng = random.Random(f"{self.name}/{split}/{seed}/responses")
        rows = []
        for row in self.rows(split, count, seed, chat):
            if not answered and row["task"] != "document":
                rows.append(row)
                continue
            response = row["answer"]
            if rng.random() < corrupted:
                at = rng.randrange(len(response))
                other = rng.choice([letter for letter in ascii_lowercase if letter != response[at]])
                response = response[:at] + other + response[at + 1 :]
            rows.append({"prompt": row["prompt"], "response": response, **row})
        return rows

    def grade(self, row: dict, text: str) -> float:
        """1.0 if the decoded response, special tokens left out, is the row's answer to the letter."""
        return float(text == row["answer"])

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """One token a character. A prompt ends in a sign of its own, so no token opens the assistant's turn."""
        return characters.tokenizer(CHARACTERS, assistant="")

    def checkpoint(self, name: str) -> Path:
        """The Hugging Face folder of the shipped model: `student`, who is the teacher of what it forgets."""
        return characters.shipped(self.name, "assistant", name)


def worlds() -> tuple[Assistant, ...]:
    """Chat; instructions alone; three sets of documents with facts of their own; all that the shipped student read."""
    known = tuple(fact for number in range(len(NUM_FACTS)) for fact in facts(number) if fact.known)
    return (
        Assistant("assistant", "follow string instructions, answer questions about public facts"),
        Assistant("assistant-instructions", "the instructions alone", asks=0.0),
        Assistant("assistant-documents", "documents with internal facts; dev and test ask for them", papers=facts(1)),
        Assistant("assistant-documents-2", "a second set of facts, for learning on and on", papers=facts(2)),
        Assistant("assistant-documents-3", "a third", papers=facts(3)),
        Assistant(
            "assistant-background", "what the student read, to train it from nothing", 0.15, known, background=True
        ),
    )
