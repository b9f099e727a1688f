"""The decoder loop: conversations side by side, prefill, then a token a step for each. How rows lie in memory is a subclass's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isfinite

from torch import Tensor

from awares_bench.models.base import HostModel
from awares_bench.models.prompt_chunk import PromptChunk

from .decoding import Repetition
from .reply_decoder import ReplyDecoder
from .session import Session
from .token_choice import TokenChooser


class Batch(ABC):
    """Rows, each the cache of a session and the chunk that a turn adds to it. Positions are explicit and padding is masked, so that a row
    computes what it would alone."""

    def __init__(self, host: HostModel, sessions: list[Session], chunks: list[PromptChunk]):
        self.host = host
        self.visual = [float(c.visual) for c in chunks]
        """Visual tokens that enter a decoder layer, mean over the layers, per request."""
        self.next_position = [c.next_position for c in chunks]
        """Of the reply's first token, per request."""
        self.fed = [0] * len(chunks)
        """Tokens of the reply that are in the cache, per request."""
        self.rows = list(range(len(chunks)))
        """The request that each row belongs to."""
        self.layout(sessions, chunks)

    # ------------------------------------------------------------------ what a layout writes

    @abstractmethod
    def layout(self, sessions: list[Session], chunks: list[PromptChunk]) -> None:
        """Put caches and chunks where the decoder takes them."""

    @abstractmethod
    def prefill(self) -> Tensor:
        """Feed the chunks -> scores after them (B, 1, vocabulary)."""

    @abstractmethod
    def step(self, inputs: list[list[int]]) -> Tensor:
        """Feed each row its tokens, none where a row is done -> scores after each (rows, width, vocabulary), padded on the left."""

    @abstractmethod
    def reject_drafts(self, inputs: list[list[int]], accepted: list[int]) -> None:
        """Of what was just fed, the first ``accepted`` tokens of each row stay in its cache."""

    @abstractmethod
    def drop_finished(self, active: list[int], replies: list[ReplyDecoder]) -> None:
        """Rows of requests that are not ``active`` need no more steps."""

    @abstractmethod
    def expand(self, copies: list[int]) -> None:
        """After the prefill: request i goes on from the cache of row ``copies[i]``, which several may share."""

    @abstractmethod
    def caches_to(self, request: int, session: Session) -> None:
        """Give a session the cache of its row."""

    # ------------------------------------------------------------------ shared

    def share(self, copies: list[int]) -> None:
        """Several requests go on from one prefilled row: request i from row ``copies[i]``."""
        if copies == self.rows:
            return
        self.expand(copies)
        self.visual, self.next_position = [self.visual[i] for i in copies], [self.next_position[i] for i in copies]
        self.fed, self.rows = [0] * len(copies), list(range(len(copies)))

    def decode(self, scores: Tensor, replies: list[ReplyDecoder], chooser: TokenChooser, repetition: Repetition) -> None:
        """Write every request's reply. scores: after the prompts (B, 1, vocabulary)."""
        prompts = [[0] if reply.active else [] for reply in replies]  # one place each: the end of the prompt
        if any(prompts):
            self._accept(repetition.first(scores), prompts, replies, chooser)
        while active := [b for b in self.rows if replies[b].active]:
            # 1. rows that are done leave; the others are fed their last token and what the grammar drafts
            self.drop_finished(active, replies)
            inputs = [replies[b].next_input() if replies[b].active else [] for b in self.rows]
            scores = repetition.next(self.step(inputs), self.rows, inputs)
            # 2. the choices after them: drafts stand as long as the choices confirm them
            for b, tokens in zip(self.rows, inputs, strict=True):
                replies[b].forward_passes += bool(tokens)
            accepted = self._accept(scores, inputs, replies, chooser)
            for b, n in zip(self.rows, accepted, strict=True):
                self.fed[b] += n
            # 3. what does not stand leaves the cache
            repetition.keep(self.rows, inputs, accepted)
            if any(n < len(tokens) for n, tokens in zip(accepted, inputs, strict=True)):
                self.reject_drafts(inputs, accepted)

    def _accept(self, scores: Tensor, inputs: list[list[int]], replies: list[ReplyDecoder], chooser: TokenChooser) -> list[int]:
        """Write the tokens chosen after each input -> how many inputs of each row were accepted."""
        choices = chooser(scores, self.rows, [len(replies[b].tokens) for b in self.rows])
        width, accepted = scores.shape[1], []
        for row, (b, tokens, (chosen, values)) in enumerate(zip(self.rows, inputs, choices, strict=True)):
            first = width - len(tokens)
            wrong = next((v for v in values[first:] if not isfinite(v)), None)
            if not tokens:
                accepted.append(0)
            elif wrong is not None:
                replies[b].fail_not_finite(wrong, self.host.dtype)
                accepted.append(len(tokens))
            else:
                accepted.append(replies[b].accept(tokens, chosen[first:], values[first:], scores[row, first:]))
        return accepted

    def save_session(self, request: int, session: Session, tokens: list[int]) -> None:
        """Move a request's row into its session. Tokens of the reply that were never fed open its next chunk."""
        self.caches_to(request, session)
        session.next_position = self.next_position[request] + self.fed[request]
        session.unfed_tokens = tokens[self.fed[request] :]
