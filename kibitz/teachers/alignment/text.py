"""Turn the student's text, bytes that may be no text, into what the teacher can read, and map positions back."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Readable:
    """Text, and where its bytes stand among those that were written.

    `place[raw]` is the place in `text.encode()` of each place between written bytes; None inside a broken stretch.
    `broken` are the stretches of written bytes that are no UTF-8; the text has `�` there, or nothing at a cut-off end."""

    text: str
    place: list[int | None]
    broken: list[tuple[int, int]]


def readable(data: bytes, cut_off: bool) -> Readable:
    """`cut_off`: what is missing at the end was not written because the response ended at its limit."""
    parts: list[str] = []
    place: list[int | None] = [0]
    broken: list[tuple[int, int]] = []
    start = 0
    while start < len(data):
        try:
            good, stop, bad = data[start:].decode("utf-8"), len(data), len(data)
            unfinished = False
        except UnicodeDecodeError as error:
            stop, bad = start + error.start, start + error.end
            good, unfinished = data[start:stop].decode("utf-8"), error.reason == "unexpected end of data"
        base = place[-1]
        assert base is not None
        parts.append(good)
        place += [base + n for n in range(1, stop - start + 1)]
        if bad > stop:
            mark = "" if unfinished and cut_off else "�"
            parts.append(mark)
            place += [None] * (bad - stop - 1) + [base + stop - start + len(mark.encode())]
            broken.append((stop, bad))
        start = bad
    return Readable("".join(parts), place, broken)


@dataclass(frozen=True)
class Place:
    """The bytes of the text that a token stands for. `exact`: it means these bytes and no others."""

    start: int
    end: int
    exact: bool


def places(pieces: Sequence[bytes | None], offsets: Sequence[tuple[int, int]], text: str) -> list[Place]:
    """Return the places of the teacher's tokens in the text that it read, in order.

    If the tokens' bytes are the text, their lengths add up to the places. If not, because the text was changed on the way in
    (lower case, accents or spaces dropped, composed characters, unknown tokens), the tokenizer's offsets, in characters, give
    them: tokens that share a character stay together, and are exact if their bytes are those of the text there. A space before
    a word that the offsets leave out belongs to the word if its bytes include it, as those of WordPiece do."""
    data = text.encode()
    if b"".join(piece or b"" for piece in pieces) == data and None not in pieces:
        return _in_a_row([len(piece or b"") for piece in pieces], 0)
    byte_at = [0]
    for character in text:
        byte_at.append(byte_at[-1] + len(character.encode()))
    found: list[Place] = []
    for first, last in _clusters(offsets):
        low = found[-1].end if found else 0
        start = max(low, byte_at[offsets[first][0]])
        end = max(start, byte_at[max(right for _, right in offsets[first:last])])
        found += _of_cluster(pieces[first:last], data, low, start, end)
    return found


def _clusters(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of tokens, as (first, one behind the last), none of which shares a character with another run."""
    runs: list[tuple[int, int]] = []
    reach = 0
    for index, (left, right) in enumerate(offsets):
        if runs and left < reach and left < right:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
        reach = max(reach, right)
    return runs


def _of_cluster(pieces: Sequence[bytes | None], data: bytes, low: int, start: int, end: int) -> list[Place]:
    if None not in pieces:
        sizes = [len(piece or b"") for piece in pieces]
        content = b"".join(piece or b"" for piece in pieces)
        for spaces in (0, 1) if content.startswith(b" ") else (0,):
            begin = end - len(content) + spaces
            if low <= begin <= start and data[begin:end] == content[spaces:]:
                lead = next(i for i, size in enumerate(sizes) if size) if spaces else 0
                return _in_a_row([size - spaces if i == lead else size for i, size in enumerate(sizes)], begin)
    return [Place(start, end, False)] + [Place(end, end, False)] * (len(pieces) - 1)


def _in_a_row(sizes: Sequence[int], start: int) -> list[Place]:
    found = []
    for size in sizes:
        found.append(Place(start, start + size, True))
        start += size
    return found
