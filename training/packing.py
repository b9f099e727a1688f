"""Log-probabilities of what a model wrote, in one forward pass: conversations side by side, or groups that share what they begin with.

A group is packed into one row, a tree: the beginning once, then every continuation, those that are equal once, under a mask that lets a
continuation see what leads to it and itself. Positions are those that each conversation has alone, so the log-probabilities and gradients
are those of the conversations one by one (tests/training). The head runs on scored positions only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from awares_bench.inference.decoding import padded, penalised
from awares_bench.models.base import HostModel, ImageInput

from .rendering import Conversation


@dataclass
class Packed:
    """Rows of groups, padded on the right. N scored tokens, ordered by conversation."""

    ids: Tensor
    """(B, L)"""

    positions: Tensor
    """(axes, B, L)"""

    mask: Tensor
    """(B, L) of tokens, or (B, 1, L, L) of who sees whom."""

    score_at: Tensor
    """(N, 2): row and column of the token before each scored one."""

    target: Tensor
    """(N,): the scored tokens."""

    conversation_index: Tensor
    """(N,): the number of each one's conversation."""

    weight: Tensor
    """(N,): its loss weight."""

    images: list[ImageInput]
    """Pictures in the order of their tokens."""

    tokens: int
    """How many go through the decoder, padding left out."""

    before: Tensor | None = None
    """(N, n): the tokens that a repetition penalty holds against each scored one, where there is a penalty (some named twice)."""


def pack(groups: list[list[Conversation]], host: HostModel, device: torch.device | str = "cpu", followed: bool = False) -> Packed:
    """Groups of conversations -> one batch; a group is best one that shares its prompt, or a long system message. One of one is an ordinary row.

    followed: also what each scored token follows, for a ``Scorer`` with a repetition penalty.
    """
    rows = [_row(group, host) for group in groups]
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), host.tokenizer.pad_token_id)
    positions = torch.zeros((host.position_axes, len(rows), length), dtype=torch.long)
    filled, mask = torch.zeros((len(rows), length), dtype=torch.long), torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    score_at, target, index, weight, images, conversations = [], [], [], [], [], 0
    for b, (row, group) in enumerate(zip(rows, groups, strict=True)):
        n = len(row.ids)
        ids[b, :n], positions[:, b, :n], filled[b, :n] = torch.tensor(row.ids), row.positions, 1
        mask[b, :n, :n] = row.sees  # padding, on the right, sees itself: a softmax over nothing is not a number
        for before, token, conversation, value in row.scored:
            score_at.append((b, before))
            target.append(token)
            index.append(conversations + conversation)
            weight.append(value)
        conversations += len(group)
        images += row.images
    alone = all(len(group) == 1 for group in groups)
    held = [seen for group in groups for c in group for seen in _followed(c)] if followed else None
    return Packed(
        ids.to(device),
        positions.to(device),
        (filled if alone else mask[:, None]).to(device),
        torch.tensor(score_at).reshape(-1, 2).to(device),
        torch.tensor(target).to(device),
        torch.tensor(index).to(device),
        torch.tensor(weight).to(device),
        images,
        sum(len(row.ids) for row in rows),
        padded(held).to(device) if held is not None else None,
    )


def _followed(c: Conversation) -> list[list[int]]:
    """The distinct tokens before each scored token of a conversation, in its order."""
    out: list[list[int]] = []
    seen: dict[int, None] = {}
    for token, weight in zip(c.ids, c.weights, strict=True):
        if weight:
            out.append(list(seen))
        seen[token] = None
    return out


@dataclass
class _Row:
    ids: list[int]
    positions: Tensor  # (axes, L)
    sees: Tensor  # (L, L): who sees whom
    scored: list[tuple[int, int, int, float]]  # column before, token, conversation, weight
    images: list[ImageInput]


def _row(group: list[Conversation], host: HostModel) -> _Row:
    """A group as one row.

    A tree: the prompt, then a branch for each reply with what was shown after it. Branches that are equal to the token and the
    picture, after equal ones, are one. Where prompts differ, their first common tokens are a branch of their own.
    """
    common = _common(group, host.image_token)
    ids: list[int] = []
    images, positions, scored = [], [], []
    columns: dict[tuple, tuple[int, int]] = {}  # path of branches -> columns of the last one
    lines: dict[tuple, list[tuple[int, int]]] = {}  # path -> columns of every branch on it
    for i, c in enumerate(group):
        alone, _ = host.positions(c.ids, c.images)
        path: tuple = ()
        before, waiting = -1, list(c.images)
        for start, end in _branches(c, common):
            # the pictures whose tokens stand in this branch
            visual, here = c.ids[start:end].count(host.image_token), []
            while visual:
                here.append(waiting.pop(0))
                visual -= here[-1].tokens
            parent, path = path, (*path, (tuple(c.ids[start:end]), tuple(image.key for image in here)))
            if path not in columns:
                columns[path] = len(ids), len(ids) + end - start
                lines[path] = [*lines.get(parent, []), columns[path]]
                ids += c.ids[start:end]
                images += here
                positions.append(alone[:, start:end])
            left, right = columns[path]
            for at in range(start, end):
                if c.weights[at]:
                    scored.append((before if at == start else left + at - start - 1, c.ids[at], i, c.weights[at]))
            before = right - 1
    sees = torch.zeros((len(ids), len(ids)), dtype=torch.bool)
    for path, (left, right) in columns.items():
        for start, end in lines[path]:
            sees[left:right, start:end] = True
    return _Row(ids, torch.cat(positions, 1), sees.tril(), scored, images)


def _common(group: list[Conversation], image_token: int) -> int:
    """Tokens that prompts which differ begin with, up to the first picture; 0 where all are the same."""
    prompts = [c.ids[: c.prompt] for c in group]
    if all(p == prompts[0] for p in prompts):
        return 0
    columns = enumerate(zip(*prompts, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1 or column[0] == image_token), min(map(len, prompts)))


def _branches(c: Conversation, common: int) -> list[tuple[int, int]]:
    """Spans of a conversation's ids: ``common`` tokens, the rest of the prompt, then every reply with what is shown after it."""
    cuts = [0, common, *(start for start, _ in c.replies), len(c.ids)]
    return [(start, end) for start, end in pairwise(cuts) if start < end]


class Scorer(torch.nn.Module):
    """A host model, plain or with adapters, as a function from packed rows to log-probabilities. What the trainers train.

    model: the host's own with adapters around it (None: the host's). banned: tokens that sampling never takes; temperature, penalty: of
    the sampling.
    """

    def __init__(
        self,
        host: HostModel,
        banned: tuple[int, ...] = (),
        temperature: float = 1.0,
        penalty: float = 1.0,
        model: PreTrainedModel | None = None,
    ):
        super().__init__()
        self.host, self.model = host, model or host.model
        self.banned, self.temperature, self.penalty = list(banned), temperature, penalty

    def forward(self, packed: Packed, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """features: of the packed pictures, ``joined`` -> log-probability (N,) of each scored token, and the entropy (N,) of its distribution
        without gradient."""
        hidden = self.host.hidden_states(packed.ids, features, packed.positions, packed.mask)
        logits = self.host.model.get_output_embeddings()(hidden[packed.score_at[:, 0], packed.score_at[:, 1]]).float()
        if self.penalty != 1:
            assert packed.before is not None  # packed with what is followed
            logits = penalised(logits, packed.before, self.penalty)
        logits = logits / self.temperature
        if self.banned:
            logits[:, self.banned] = float("-inf")
        scores = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(scores.exp() * scores.clamp(min=-1e9)).sum(-1)
        return scores.gather(1, packed.target[:, None])[:, 0], entropy
