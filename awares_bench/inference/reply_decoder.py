"""One reply being decoded: which token comes next, when it ends, and what is worth feeding ahead."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from awares_bench.methods.conversation import Event, EventKind

from .call_grammar import CallGrammar
from .session import Request


@dataclass
class ReplyDecoder:
    """The tokens of one reply as a ``TokenChooser`` chooses them, held to a grammar once it has begun as a call."""

    request: Request
    tokenizer: PreTrainedTokenizerBase

    stop: set[int]
    """Token ids that end a reply."""

    grammar: CallGrammar | None = None

    trace: bool = False
    """Keep the scores of every choice, for tests."""

    opening: str = ""
    """What stands before a reply that the turn says for the model (``HostModel.opening``)."""

    tokens: list[int] = field(default_factory=list)
    """The reply so far, without the token that ended it."""

    values: list[float] = field(default_factory=list)
    """Log-probabilities of each token and of the end, as the chooser has them."""

    end: int | None = None
    """The token that ended it."""

    active: bool = True

    ended: bool = False
    """By itself, not by its budget."""

    forward_passes: int = 0
    """After the prefill, that it took part in."""

    fault: str = ""
    """Why the reply is no reply, such as scores that are not finite."""

    scores: list[Tensor] = field(default_factory=list)

    overruled: list[str] = field(default_factory=list)
    """A phrase for each token that the grammar put in the place of the chosen one."""

    def __post_init__(self):
        if self.forced:
            said = self.opening + (self.request.turn.forced_reply or "")
            self.tokens = list(self.tokenizer(said, add_special_tokens=False)["input_ids"])
            self.active, self.ended = False, True

    @property
    def forced(self) -> bool:
        """The turn says the reply for the model: it stands as it is, and its tokens open the next chunk."""
        return self.request.turn.forced_reply is not None

    @property
    def logprob(self) -> float | None:
        """Of the whole reply; None where nothing was decoded."""
        return sum(self.values) if self.values else None

    @property
    def events(self) -> list[Event]:
        """``call_overruled``, once, when the reply is not what the model alone would have written."""
        if not self.overruled:
            return []
        return [Event(EventKind.CALL_OVERRULED, f"the grammar of calls held the model: {'; '.join(self.overruled)}")]

    def next_input(self) -> list[int]:
        """The last token, not yet in the cache, and a draft of what the grammar makes of it."""
        room = self.request.max_reply_tokens - len(self.tokens) - 1  # the last token within the budget is never fed
        draft = self.grammar.draft(self.tokens)[:room] if self.grammar else []
        return [self.tokens[-1], *draft]

    def accept(self, inputs: list[int], chosen: list[int], values: list[float], scores: Tensor) -> int:
        """Write the tokens chosen after ``inputs``, as long as they equal what was drafted -> how many inputs are accepted.

        chosen, values: the token chosen after each input, and its value; scores (n, vocabulary): what they were chosen by.
        """
        for j in range(len(inputs)):
            if self.trace:
                self.scores.append(scores[j].clone())
            token = self._overrule(chosen[j], scores[j])
            overruled = token != chosen[j]
            self._write(token, float(scores[j, token] - scores[j].float().logsumexp(-1)) if overruled else values[j])
            if not self.active or j + 1 == len(inputs) or self.tokens[-1] != inputs[j + 1]:
                return j + 1
        raise ValueError("nothing was fed")

    def fail(self, fault: str) -> None:
        """End the reply, which is none."""
        self.active, self.fault = False, fault

    def fail_not_finite(self, value: float, dtype: torch.dtype) -> None:
        """End the reply, the choice of whose next token has the score ``value``, in a model of this precision."""
        kind = str(dtype).removeprefix("torch.")
        advice = "overflow; pass dtype=bfloat16 or dtype=float32" if kind == "float16" else "the weights may be broken"
        self.fail(f"the model's scores are {value} in {kind} after {len(self.tokens)} tokens of its reply: {advice}")

    def _overrule(self, token: int, scores: Tensor) -> int:
        """The chosen token, or the one that is forced, or the most probable one that the grammar allows."""
        if self.request.forced_tokens is not None:
            n = len(self.tokens)
            return self.request.forced_tokens[n] if n < len(self.request.forced_tokens) else min(self.stop)
        allowed = self.grammar.allowed(self.tokens) if self.grammar else None
        if not allowed or token in allowed:
            return token
        ids = sorted(allowed)
        best = ids[int(scores[ids].argmax())]
        wanted, held, before = (repr(self.tokenizer.decode(t)) for t in ([token], [best], self.tokens))
        self.overruled.append(f"{wanted} after {before} became {held}")
        return best

    def _write(self, token: int, value: float) -> None:
        self.values.append(value)
        if token in self.stop:
            self.active, self.ended, self.end = False, True, token
            return
        self.tokens.append(token)
        if self.grammar and not self.grammar.may_begin(self.tokens):
            self.grammar = None  # an answer, or a call in other tokens: free from here on
        until = self.request.until
        call_complete = self.grammar is not None and self.grammar.allowed(self.tokens) == set()
        if call_complete or (until and any(s in self.tokenizer.decode(self.tokens, skip_special_tokens=True) for s in until)):
            self.active, self.ended = False, True
        elif len(self.tokens) >= self.request.max_reply_tokens:
            self.active = False
