"""One reply being written: which token comes next, when it ends, and what is worth feeding ahead."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from awares_bench.methods.conversation import Event, EventKind

from .call_grammar import CallGrammar
from .session import Request


@dataclass
class Writer:
    """Greedy choice of the tokens of one reply, held to a grammar once it has begun as a call.

    stop: token ids that end a reply. written: the end token is not part of it. ended: by itself, not by its budget.
    passes: forward passes after the prefill that it took part in. scores: kept of every choice when ``trace`` is set.
    fault: why the reply is no reply, such as scores that are not finite.
    overruled: a phrase for each token that the grammar put in the place of the most probable one.
    """

    request: Request
    tokenizer: PreTrainedTokenizerBase
    stop: set[int]
    grammar: CallGrammar | None = None
    trace: bool = False
    written: list[int] = field(default_factory=list)
    live: bool = True
    ended: bool = False
    passes: int = 0
    fault: str = ""
    scores: list[Tensor] = field(default_factory=list)
    overruled: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.said:
            self.written = list(self.tokenizer(self.request.turn.forced_reply, add_special_tokens=False)["input_ids"])
            self.live, self.ended = False, True

    @property
    def said(self) -> bool:
        """The turn says the reply for the model: it stands as it is, and its tokens open the next chunk."""
        return self.request.turn.forced_reply is not None

    @property
    def events(self) -> list[Event]:
        """``call_overruled``, once, when the reply is not what the model alone would have written."""
        return (
            [Event(EventKind.CALL_OVERRULED, f"the grammar of calls held the model: {'; '.join(self.overruled)}")]
            if self.overruled
            else []
        )

    def feed(self) -> list[int]:
        """The last token, not yet in the cache, and a draft of what the grammar makes of it."""
        room = self.request.budget - len(self.written) - 1  # the last token within the budget is never fed
        draft = self.grammar.draft(self.written)[:room] if self.grammar else []
        return [self.written[-1], *draft]

    def take(self, fed: list[int], best: list[int], scores: Tensor) -> int:
        """Write on while the choices confirm what was fed ahead -> how many of ``fed`` stand.

        best, scores: the most probable token after each token of ``fed``, and the scores (n, vocabulary) behind it.
        """
        for j in range(len(fed)):
            if self.trace:
                self.scores.append(scores[j].clone())
            self._write(self._choose(best[j], scores[j]))
            if not self.live or j + 1 == len(fed) or self.written[-1] != fed[j + 1]:
                return j + 1
        raise ValueError("nothing was fed")

    def fail(self, fault: str) -> None:
        """End the reply, which is none."""
        self.live, self.fault = False, fault

    def _choose(self, best: int, scores: Tensor) -> int:
        if self.request.forced is not None:
            n = len(self.written)
            return self.request.forced[n] if n < len(self.request.forced) else min(self.stop)
        allowed = self.grammar.allowed(self.written) if self.grammar else None
        if not allowed or best in allowed:
            return best
        ids = sorted(allowed)
        chosen = ids[int(scores[ids].argmax())]
        wanted, held, after = (repr(self.tokenizer.decode(t)) for t in ([best], [chosen], self.written))
        self.overruled.append(f"{wanted} after {after} became {held}")
        return chosen

    def _write(self, token: int) -> None:
        if token in self.stop:
            self.live, self.ended = False, True
            return
        self.written.append(token)
        if self.grammar and not self.grammar.may_begin(self.written):
            self.grammar = None  # an answer, or a call in other tokens: free from here on
        until = self.request.until
        whole = self.grammar is not None and self.grammar.allowed(self.written) == set()
        if whole or (until and any(s in self.tokenizer.decode(self.written, skip_special_tokens=True) for s in until)):
            self.live, self.ended = False, True
        elif len(self.written) >= self.request.budget:
            self.live = False
