"""Calls by grammar: what a reply that has begun as a call may still become, in the tokens of any tokenizer.

Canonical is what the tokenizer makes of ``GET_CROPS``, then ``: ``, ``:`` or a space, then ids in brackets: all in single
quotes, all in double quotes or all bare, divided by ``, `` or ``,``, each once, in any order; or ``all`` alone. ``]`` ends
the reply. A reply is held to this once it has written ``GET_CROPS`` in canonical tokens; until then, and in any other
tokens, it is free. So the decision to call is the model's, every choice the grammar leaves is its most probable allowed token,
and an unconstrained greedy reply that is canonical comes out the same (tests/test_grammar.py).
"""

from __future__ import annotations

import re
from itertools import permutations, product, takewhile

from .crops import ALL, CropGrid

WORD = "GET_CROPS"

_STYLES = tuple(
    product((": ", ":", " "), ("'", '"', ""), (", ", ","))
)  # (after the word, quote, between ids); the first is format's


class CallGrammar:
    """The canonical calls of a grid as a trie of token ids, grown along the path that is taken: a million orders exist."""

    def __init__(self, grid: CropGrid, tokenizer):
        self.grid, self.tokenizer = grid, tokenizer
        self._ids = tuple(i for i in grid.ids if i != ALL)
        self._ahead = 2 + self._reach()  # the last id written, those in one token, and one that decides how it ends
        self._trie: dict = {}
        self._spelled: dict[str, list[int]] = {}
        self._grown: set[tuple[str, ...]] = set()
        self._grow(())

    def may_begin(self, written: list[int]) -> bool:
        """Whether a canonical call begins with ``written``, or is it."""
        return self._node(written) is not None

    def allowed(self, written: list[int]) -> set[int] | None:
        """Tokens that may follow ``written``: None while the reply is free, empty when the call is whole."""
        node = self._node(written)
        return None if node is None or not self._text(written).startswith(WORD) else set(node)

    def draft(self, written: list[int]) -> list[int]:
        """Tokens expected next, if any, up to the next choice of an id: as if the list went on, since ``]`` need not be fed.

        A guess that saves steps, never a decision: whoever feeds it keeps only what ``allowed`` and the scores confirm.
        The token that completes the call is left out, because nothing follows that its scores could decide.
        """
        if self._node(written) is None:
            return []
        chosen = self._chosen(self._text(written))
        for more in (1, 0):
            for style in _STYLES:
                rows = self._tokens([_spell(style, names) for names in self._extended(chosen, more) if names])
                rows = [row[:-1] for row in rows if row[: len(written)] == written and len(row) > len(written)]
                if rows:
                    common = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
                    return [column[0] for column in common][len(written) :]
        return []

    def _node(self, written: list[int]) -> dict | None:
        """The trie below ``written``; None when no canonical call begins so."""
        if written and written[0] not in self._trie:
            return None
        self._grow(self._chosen(self._text(written))[:-1])
        node = self._trie
        for token in written:
            node = node.get(token)
            if node is None:
                return None
        return node

    def _reach(self) -> int:
        """The most ids in one token: how far beyond the ids written a token may depend on those to come."""
        inside = re.compile(rf"(?:[\[\]'\",\s]|{'|'.join(map(re.escape, self._ids))})+")
        texts = ("".join(c if c.isascii() else " " for c in token) for token in self.tokenizer.get_vocab())
        return max((len(re.findall(r"\w+", text)) for text in texts if "," in text and inside.fullmatch(text)), default=0)

    def _grow(self, known: tuple[str, ...]) -> None:
        if known in self._grown:
            return
        self._grown.add(known)
        names = [n for more in range(self._ahead + 1) for n in self._extended(known, more) if n]
        for tokens in self._tokens([_spell(style, n) for style in _STYLES for n in names]):
            node = self._trie
            for token in tokens:
                node = node.setdefault(token, {})

    def _extended(self, chosen: tuple[str, ...], more: int) -> list[tuple[str, ...]]:
        if ALL in chosen:
            return [(ALL,)] * (not more)
        left = [i for i in self._ids if i not in chosen]
        return [chosen + rest for rest in permutations(left, more)] + [(ALL,)] * (not chosen and more == 1)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        new = [t for t in texts if t not in self._spelled]
        if new:
            self._spelled.update(zip(new, self.tokenizer(new, add_special_tokens=False)["input_ids"], strict=True))
        return [self._spelled[t] for t in texts]

    def _text(self, written: list[int]) -> str:
        return self.tokenizer.decode(written, skip_special_tokens=False)

    def _chosen(self, text: str) -> tuple[str, ...]:
        """The ids in a call that may still be open; the last may be the beginning of a longer one."""
        found = dict.fromkeys(re.findall(r"\w+", text.partition("[")[2]))
        return tuple(i for i in found if i in self.grid.ids)


def _spell(style: tuple[str, str, str], ids: tuple[str, ...]) -> str:
    colon, quote, comma = style
    return f"{WORD}{colon}[{comma.join(f'{quote}{i}{quote}' for i in ids)}]"
