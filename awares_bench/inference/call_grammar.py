"""Calls by grammar: what a reply that has begun as a call may still become, in the tokens of any fast tokenizer.

A reply is held once its text begins with ``GET_CROPS``, in any case and after any white space; until then it is free, and so
is a call further on in it. From there on it may become whatever ``CropGrid.parse`` reads as a call that names no crop twice
and has no run of more than ``LONGEST_SPACE`` white space, so that every list ends. The grammar is of letters: a token is
allowed when its text keeps the call alive, whatever it fuses, and what it holds beyond ``]``, which ends the reply, is free.
A token of less than a letter, such as a byte of an exotic white space, is never allowed within a call.
So the decision to call is the model's, every choice the grammar leaves is its most probable allowed token, and an
unconstrained greedy reply that parses comes out the same up to the end of its call (tests/inference/test_grammar.py).
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import repeat, takewhile
from typing import NamedTuple

from awares_bench.methods.crop_grid import ALL, CropGrid

WORD = "GET_CROPS"

LONGEST_SPACE = 16
"""White space, or ``_`` for it, that a held call may have in a row; more never ends."""

KEPT = 256
"""Calls, as far as they are written, of which the allowed tokens, and the draft, are kept: about 10 MB at the most."""

PARTS = 2**14
"""Beginnings of an entry of which the crops that they may name are kept, as many as one vocabulary has in a few places: 4 MB at the most."""

_BEGUN = re.compile(rf"\s*{WORD}", re.IGNORECASE)
_BEFORE_LIST = re.compile(r"\s*:?\s*")
_BEFORE_END = re.compile(r"\s*['\"]?\s*(?P<word>[A-Za-z0-9 _-]*)")  # an entry whose word may go on
_TOO_LONG = re.compile(rf"[\s_]{{{LONGEST_SPACE + 1}}}")


class Call(NamedTuple):
    """What has been written of a call after its word.

    named: crops of the entries before the last comma; None before ``[``. part: what came since ``[`` or that comma.
    """

    named: frozenset[str] | None = None
    part: str = ""
    whole: bool = False


class CallGrammar:
    """The calls of a grid, letter by letter, and the tokens of a vocabulary that spell them.

    tokenizer: a fast tokenizer (one with a ``backend_tokenizer``) whose decoder puts the texts of tokens side by side.
    """

    def __init__(self, grid: CropGrid, tokenizer):
        self.grid, self.tokenizer = grid, tokenizer
        self._words = [
            (word, name)
            for i, name in grid.ids.items()
            for word in (i, name, name.replace("center", "centre"))
            if grid.entry(word) == name
        ]
        self._begun: dict[str, frozenset[str]] = {}  # each beginning of a word -> the crops it may become
        for word, name in self._words:
            for n in range(len(word) + 1):
                self._begun[word[:n]] = self._begun.get(word[:n], frozenset()) | {name}
        self._tokens = self._spelled()
        self._read = lru_cache(KEPT)(self._read_text)
        self._follow = lru_cache(KEPT)(self._walk)
        self._expect = lru_cache(KEPT)(self._draft)
        self._nameable = lru_cache(PARTS)(self._crops_of)

    def may_begin(self, written: list[int]) -> bool:
        """Whether a call begins with ``written``, or is it."""
        text = self._text(written)
        return WORD.startswith(text.lstrip().upper()) or self._read(text) is not None

    def allowed(self, written: list[int]) -> frozenset[int] | None:
        """Tokens that may follow ``written``: None while the reply is free, empty when the call is whole."""
        call = self._read(self._text(written))
        return None if call is None else self._follow(call)

    def draft(self, written: list[int]) -> list[int]:
        """Tokens expected next, if any, up to the next choice of a crop: as if the list went on, since ``]`` need not be fed.

        A guess that saves steps, never a decision: whoever feeds it keeps only what ``allowed`` and the scores confirm.
        The token that completes the call is left out, because nothing follows that its scores could decide.
        """
        return list(self._expect(tuple(written))) if self.may_begin(written) else []

    def _text(self, written: list[int] | tuple[int, ...]) -> str:
        return self.tokenizer.decode(written, skip_special_tokens=False)

    # ------------------------------------------------------------------ letters

    def _read_text(self, text: str) -> Call | None:
        """A reply -> the call it has begun as; None when it has not, or can no longer become one."""
        begun = _BEGUN.match(text)
        if begun is None:
            return None
        call = Call()
        for letter in text[begun.end() :]:
            longer = self._after(call, letter)
            if longer is None or longer.whole:
                return longer
            call = longer
        return call

    def _after(self, call: Call, letter: str) -> Call | None:
        """The call with one more letter; None when no call begins so."""
        if call.named is None and letter == "[":
            return Call(frozenset())
        if call.named is not None and letter in ",]":
            name = self.grid.entry(call.part)
            if name is None or name in call.named:
                return None
            named = call.named | {name}
            if letter == "]":
                return Call(named, whole=True)
            return Call(named) if len(named) < len(self.grid.ids) else None  # nothing is left to name after this comma
        part = call.part + letter
        if call.named is None:
            alive = _BEFORE_LIST.fullmatch(part) is not None and not _TOO_LONG.search(part)
        else:
            alive = not self._nameable(part) <= call.named
        return Call(call.named, part) if alive else None

    def _crops_of(self, part: str) -> frozenset[str]:
        """The crops that an entry that begins with ``part`` can still name."""
        open_word = _BEFORE_END.fullmatch(part)
        if _TOO_LONG.search(part):
            return frozenset()
        if open_word is None:
            return frozenset(name for end in ("", "'", '"') if (name := self.grid.entry(part + end)))
        word = open_word["word"]
        begun = self._begun.get(re.sub(r"[ _]+", "-", word.lstrip().lower()), frozenset())
        name = self.grid.entry(word)
        return begun if name is None or name in begun else begun | {name}

    # ------------------------------------------------------------------ tokens

    def _spelled(self) -> dict:
        """The tokens that a call may hold as a tree of letters up to ``]``; the ids of those that end at a place under ``""``."""
        before = self.tokenizer(WORD, add_special_tokens=False)["input_ids"][-1]  # some decoders strip what begins a text
        rows = zip(repeat(before), [before, *range(len(self.tokenizer))], strict=False)
        twice, *texts = self.tokenizer.backend_tokenizer.decode_batch(list(rows), skip_special_tokens=True)
        tree: dict = {}
        pieces, at = " ".join(word for word, _ in self._words), len(twice) // 2
        letters = re.escape("".join({*pieces, *pieces.upper()}))
        fits = re.compile(rf"(?P<head>[\s:\[,'\"_{letters}]*)(?:(?P<closed>\])(?P<rest>.*))?", re.DOTALL)
        for token, text in enumerate(texts):
            found = fits.fullmatch(text, at)
            if not found:
                continue
            head, closed, rest = found.groups("")
            if (rest and WORD in rest.upper()) or any(run not in pieces for run in re.findall(r"[^\W_]+", head.lower())):
                continue  # the first: it ends one call and holds another
            node = tree
            for letter in head + closed:
                node = node.setdefault(letter, {})
            node.setdefault("", []).append(token)
        tree.pop("", None)  # special tokens, and others without a text
        return tree

    def _walk(self, call: Call) -> frozenset[int]:
        """Every token that keeps ``call`` alive or makes it whole; none when it is whole."""
        found, todo = set(), [(call, self._tokens)]
        while todo:
            call, node = todo.pop()
            for letter, below in node.items():
                if not letter:
                    found.update(below)
                elif not call.whole and (longer := self._after(call, letter)):
                    todo.append((longer, below))
        return frozenset(found)

    def _draft(self, written: tuple[int, ...]) -> list[int]:
        rows = self.tokenizer(self._expected(self._text(written)), add_special_tokens=False)["input_ids"]
        rows = [row[:-1] for row in rows if tuple(row[: len(written)]) == written]
        common = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
        return [column[0] for column in common][len(written) :]

    def _expected(self, text: str) -> list[str]:
        """Whole calls that may come of a reply that may begin as one, spelled as it has been so far; one for each next crop."""
        begun = _BEGUN.match(text)
        word = begun.group() if begun else WORD
        colon, opened, inside = text[len(word) :].partition("[")
        if not opened:
            colon = ": " if not begun or ": ".startswith(colon) else colon
        *done, last = inside.split(",")
        first = (done or [last])[0].strip()
        quote = "'" if not first else first[0] if first[0] in "'\"" else ""
        gap = _space(done[1]) if len(done) > 1 else " "
        named = {self.grid.entry(entry) for entry in done}
        ended = next((last + end for end in ("", quote) if self.grid.entry(last + end)), None)
        if ended:
            done, last = [*done, ended], ""
            named.add(self.grid.entry(ended))
        space = _space(last) or (gap if done else "")
        by_name = first.strip("'\" ").lower() not in ("", *self.grid.ids) and bool(done)
        others = {ALL} if named else set()  # nothing follows all, and all is not expected after another
        left = [] if ALL in named else [(i, name) for i, name in self.grid.ids.items() if name not in named | others]
        ends = [[f"{space}{quote}{name if by_name else i}{quote}"] for i, name in left] or [[]]
        return [f"{word}{colon}[{','.join([*done, *end])}]" for end in ends]


def _space(text: str) -> str:
    """The white space that a text begins with."""
    return text[: len(text) - len(text.lstrip())]
