"""The teacher's tokens of what the student wrote, and the spans in which the two can be compared."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

from kibitz.models.language_model import num_ids
from kibitz.teachers.alignment.text import Place, places, readable
from kibitz.teachers.alignment.token_bytes import Pieces


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of the student and of the teacher that stand for the same text.

    `comparable`: both stand for exactly these bytes, so that their probabilities are of one event. Where they do not (text that
    the teacher reads changed or not at all, broken characters, a special token that it lacks), nothing is learnt."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    num_bytes: int
    comparable: bool

    @property
    def num_student(self) -> int:
        return self.student[1] - self.student[0]


@dataclass(frozen=True)
class Alignment:
    """The spans in order; each token of the student and of the teacher is in one of them."""

    teacher_ids: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Aligner:
    """Between two Hugging Face tokenizers."""

    student: Any
    teacher: Any

    @cached_property
    def student_pieces(self) -> Pieces:
        return Pieces(self.student)

    @cached_property
    def teacher_pieces(self) -> Pieces:
        return Pieces(self.teacher)

    @cached_property
    def same(self) -> bool:
        """One vocabulary: the teacher then reads the student's own tokens, canonical or not."""
        return self.student.get_vocab() == self.teacher.get_vocab()

    @cached_property
    def shared_ids(self) -> tuple[list[int], list[int]]:
        """Tokens that mean the same bytes in both vocabularies, and the two ends; all, if it is one vocabulary."""
        if self.same:
            return list(range(len(self.student))), list(range(len(self.teacher)))
        ours, theirs = _by_meaning(self.student, self.student_pieces), _by_meaning(self.teacher, self.teacher_pieces)
        common = sorted(ours.keys() & theirs.keys(), key=ours.__getitem__)
        return [ours[meaning] for meaning in common], [theirs[meaning] for meaning in common]

    def align(self, ids: Sequence[int], finished: bool) -> Alignment:
        """`ids` are a response's tokens; `finished`: the last of them ended it. That one is the teacher's EOS, whatever
        the two are called. Other special tokens are the teacher's of the same name, if it has one; what merely reads
        like one is text."""
        pieces = self.student_pieces(ids)
        teacher_ids: list[int] = []
        spans: list[Span] = []
        start = 0
        for special, group in groupby(range(len(ids)), key=lambda i: pieces[i] is None):
            stop = start + len(list(group))
            if special or self.same:
                for index in range(start, stop):
                    closing = finished and index == len(ids) - 1
                    twin = self._twin(ids[index], closing) if special else ids[index]
                    at = len(teacher_ids)
                    teacher_ids += [] if twin is None else [twin]
                    size = len(pieces[index] or b"")
                    spans.append(Span((index, index + 1), (at, len(teacher_ids)), size, twin is not None))
            else:
                cut_off = stop == len(ids) and not finished
                part = [piece or b"" for piece in pieces[start:stop]]
                more_ids, more = self._align_text(part, cut_off, start, len(teacher_ids))
                teacher_ids += more_ids
                spans += more
            start = stop
        return Alignment(teacher_ids, spans)

    def _twin(self, special: int, closing: bool) -> int | None:
        if closing and special == self.student.eos_token_id:
            return self.teacher.eos_token_id
        if self.same:
            return special
        known = self.teacher.get_added_vocab().get(self.student.convert_ids_to_tokens(special))
        if known is not None and special != self.student.unk_token_id:
            return known
        return self.teacher.eos_token_id if closing else None

    def _align_text(
        self, pieces: list[bytes], cut_off: bool, student_at: int, teacher_at: int
    ) -> tuple[list[int], list[Span]]:
        """A stretch without special tokens; `_at` is where it begins among the tokens of each."""
        data = b"".join(pieces)
        read = readable(data, cut_off)
        encoded = self.teacher(
            read.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        teacher_ids = encoded["input_ids"]
        teacher = places(self.teacher_pieces(teacher_ids), encoded["offset_mapping"], read.text)
        student, raw = [], 0
        for piece in pieces:
            end = raw + len(piece)
            exact = not any(low < end and raw < high for low, high in read.broken)
            student.append((read.place[raw], exact))
            raw = end
        size = len(read.text.encode())
        return teacher_ids, _spans(student, teacher, size, student_at, teacher_at)


def _spans(
    student: list[tuple[int | None, bool]], teacher: list[Place], size: int, student_at: int, teacher_at: int
) -> list[Span]:
    """Cut wherever a token of the student begins and none of the teacher is under way. A token that stands for no bytes
    goes with what follows it."""
    teacher_starts = [place.start for place in teacher]
    cuts: list[tuple[int, int, int]] = [(0, 0, 0)]  # place, tokens of the student and of the teacher before it
    for index, (place, _) in enumerate(student):
        if place is None or place <= cuts[-1][0]:
            continue
        num_before = bisect_left(teacher_starts, place)
        if num_before == 0 or teacher[num_before - 1].end <= place:
            cuts.append((place, index, num_before))
    cuts.append((size, len(student), len(teacher)))
    spans = []
    for (low, i, j), (high, next_i, next_j) in pairwise(cuts):
        said = teacher[j:next_j]
        covered = sum(place.end - place.start for place in said) == high - low
        exact = all(place.exact for place in said) and all(exact for _, exact in student[i:next_i])
        comparable = bool(said) and high > low and covered and exact
        spans.append(
            Span((student_at + i, student_at + next_i), (teacher_at + j, teacher_at + next_j), high - low, comparable)
        )
    return spans


def _by_meaning(tokenizer: Any, pieces: Pieces) -> dict[bytes | None, int]:
    """The token that stands for some bytes in the middle of a text, None for the end. Where there are two, such as the
    letter and its byte of SentencePiece, the one that comes later, which is the letter."""
    ids = [i for i in range(num_ids(tokenizer)) if i not in pieces.special_ids and tokenizer.convert_ids_to_tokens(i)]
    found = pieces.in_the_middle(ids)
    return {piece: i for i, piece in zip(ids, found, strict=True) if piece} | {None: tokenizer.eos_token_id}
