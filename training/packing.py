"""Log-probabilities of what a model wrote, in one forward pass: conversations side by side, or groups that share what they begin with.

A group is packed into one row, a tree: the beginning once, then every continuation, those that are equal once, under a mask that
lets a continuation see what leads to it and itself. Positions are those each conversation has alone, so the log-probabilities and gradients are those of the
conversations one by one (tests/test_scoring.py). The head runs on scored positions only.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from awares_bench.inference.decoding import padded, penalised
from awares_bench.inference.local_model import VLM, mrope_positions
from awares_bench.inference.session import Session
from awares_bench.methods.conversation import Failure, Reply, Sample, Turn

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class View:
    """A picture as the vision tower takes it. key: names its content. pixels: (P, 1176). grid: (1, rows, columns) in patches."""

    key: str
    pixels: Tensor
    grid: Grid

    @classmethod
    def of(cls, vlm: VLM, image: Image.Image, known: dict[str, View] | None = None) -> View:
        """known: views made before, by key; a picture among them is not processed again."""
        settings = repr((image.size, vlm.limits)).encode()[:64]
        key = hashlib.blake2b(image.tobytes(), digest_size=16, key=settings).hexdigest()
        if known is not None and key in known:
            return known[key]
        pixels, grid, _ = vlm.pixels(image)
        view = cls(key, pixels, grid)
        if known is not None:
            known[key] = view
        return view


@dataclass
class Conversation:
    """A conversation as fed: token ids, the loss weight of each (0 where the model did not write it), its views in order.

    prompt: tokens before the first reply. replies: spans of ids that the model wrote, its end token included.
    """

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    prompt: int = 0
    replies: list[tuple[int, int]] = field(default_factory=list)

    def shown(self, ids: list[int], views: list[View]) -> None:
        self.ids += ids
        self.weights += [0.0] * len(ids)
        self.views += views
        if not self.replies:
            self.prompt = len(self.ids)

    def wrote(self, ids: list[int], weight: float = 1.0) -> None:
        self.replies.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.weights += [weight] * len(ids)


def render(vlm: VLM, policy, sample: Sample, replies: list[str], call_weight: float = 1.0, max_length: int | None = None):
    """Play a policy against fixed replies -> the Conversation that evaluation would have fed, to the token.

    call_weight: loss weight of every reply but the last (paper Sec. 3.3: 5). Raises ValueError when the policy wants more or
    fewer turns than there are replies, when the conversation is longer than ``max_length`` tokens, or when the question or a
    reply holds the text of an image mark.
    """
    for text, what in ((sample.question, "the question"), *((reply, "the reply") for reply in replies)):
        try:
            vlm.check(text, what)
        except ValueError as error:
            raise ValueError(f"sample {sample.key!r}: {error}") from error
    out, session, end = Conversation(), Session(), vlm.tokenizer.eos_token_id
    for turn, reply, weight in turns(policy.turns(sample), replies, call_weight):
        views = [View.of(vlm, image) for image in turn.images]
        ids = vlm.chunk(session, turn, [v.grid for v in views])
        out.shown(ids[1:] if session.replies else ids, views)  # the end of the reply before is written already
        out.wrote([*vlm.tokenizer(reply, add_special_tokens=False)["input_ids"], end], weight)
        session.turns.append(turn)
        session.replies.append(reply)
    if max_length and len(out.ids) > max_length:
        raise ValueError(
            f"sample {sample.key!r} has {len(out.ids)} tokens, max_length allows {max_length}; raise it, or drop the row"
        )
    return out


def turns(look, replies: list[str], call_weight: float) -> Iterator[tuple[Turn, str, float]]:
    """The turns a policy takes when it is told ``replies``, each with its reply and the reply's weight."""
    told, sent = None, 0
    while True:
        try:
            step = look.send(told)
            while not isinstance(step, Turn):
                step = look.send(None)
        except StopIteration as stop:
            if isinstance(stop.value, Failure):
                raise ValueError(stop.value.error) from None
            if sent < len(replies):
                raise ValueError(f"the row has {len(replies)} replies, the policy ends after {sent}: {replies!r}") from None
            return
        if step.forced_reply is None:
            if sent == len(replies):
                raise ValueError(f"the row has {len(replies)} replies, the policy asks for more: {replies!r}")
            sent += 1
            yield step, replies[sent - 1], 1.0 if sent == len(replies) else call_weight
            told = Reply(replies[sent - 1])
        else:
            yield step, step.forced_reply, 0.0  # the policy puts it into the model's mouth
            told = Reply(step.forced_reply)


class Features:
    """Vision features by content, computed once while the tower is frozen; the oldest leave when ``megabytes`` are used."""

    def __init__(self, vlm: VLM, megabytes: int = 1024):
        self.vlm, self.room = vlm, megabytes * 2**20
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes, self.encoded = 0, 0

    def forget(self) -> None:
        """Drop everything held. Features differ in the last bit with the pictures encoded beside them, so what one step
        holds must not reach the next: a resumed run has not seen it."""
        self._held.clear()
        self._bytes = 0

    def __call__(self, views: list[View]) -> Tensor | None:
        """Merged features (V, D) of the views, in order; None for no views."""
        if not views:
            return None
        new = list({v.key: v for v in views if v.key not in self._held}.values())
        fresh: dict[str, Tensor] = {}
        if new:
            sizes = [v.grid[1] * v.grid[2] // self.vlm.processor.image_processor.merge_size**2 for v in new]
            encoded = self.vlm.encode([v.pixels for v in new], [v.grid for v in new]).clone()
            fresh = dict(zip((v.key for v in new), encoded.split(sizes), strict=True))
            self.encoded += len(new)
        out = torch.cat([fresh[v.key] if v.key in fresh else self._held[v.key] for v in views])
        for view in views:
            if view.key in self._held:
                self._held.move_to_end(view.key)
        for name, value in fresh.items():
            self._held[name] = value.clone()
            self._bytes += value.nbytes
        while self._bytes > self.room:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return out


@dataclass
class Packed:
    """Rows of groups, padded on the right. N scored tokens, ordered by conversation.

    ids (B, L); positions (3, B, L); mask (B, L) of tokens, or (B, 1, L, L) of who sees whom; where (N, 2): row and column of
    the token before; target, owner, weight (N,): the token, the number of its conversation, its loss weight. views: pictures in
    the order of their tokens; tokens: how many go through the decoder, padding left out. before (N, n): the tokens that a repetition
    penalty holds against each scored one, where there is a penalty (some named twice).
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    where: Tensor
    target: Tensor
    owner: Tensor
    weight: Tensor
    views: list[View]
    tokens: int
    before: Tensor | None = None


def pack(groups: list[list[Conversation]], vlm: VLM, device: torch.device | str = "cpu", followed: bool = False) -> Packed:
    """Groups of conversations -> one batch; a group is best one that shares its prompt, or a long system message. One of one is an ordinary row.

    followed: also what each scored token follows, for a ``Scorer`` with a repetition penalty.
    """
    merge = vlm.processor.image_processor.merge_size
    built = [_row(group, vlm.image_token, merge) for group in groups]
    length, rows = max(len(ids) for ids, *_ in built), len(built)
    ids = torch.full((rows, length), vlm.tokenizer.pad_token_id)
    positions = torch.zeros((3, rows, length), dtype=torch.long)
    on, mask = torch.zeros((rows, length), dtype=torch.long), torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
    where, target, owner, weight, views, seen = [], [], [], [], [], 0
    for b, (row, places, sees, scored, shown) in enumerate(built):
        n = len(row)
        ids[b, :n], positions[:, b, :n], on[b, :n] = torch.tensor(row), places, 1
        mask[b, :n, :n] = sees  # padding, on the right, sees itself: a softmax over nothing is not a number
        for before, token, whose, value in scored:
            where.append((b, before))
            target.append(token)
            owner.append(seen + whose)
            weight.append(value)
        seen += len(groups[b])
        views += shown
    mask = on if all(len(g) == 1 for g in groups) else mask[:, None]
    tokens = sum(len(row) for row, *_ in built)
    scored = torch.tensor(where).reshape(-1, 2), torch.tensor(target), torch.tensor(owner), torch.tensor(weight)
    out = Packed(ids, positions, mask, *scored, views, tokens)
    if followed:
        out.before = padded([row for group in groups for c in group for row in _followed(c)]).to(device)
    for name in ("ids", "positions", "mask", "where", "target", "owner", "weight"):
        setattr(out, name, getattr(out, name).to(device))
    return out


def _followed(c: Conversation) -> list[list[int]]:
    """The distinct tokens before each scored token of a conversation, in its order."""
    out, seen = [], {}
    for token, weight in zip(c.ids, c.weights, strict=True):
        if weight:
            out.append(list(seen))
        seen[token] = None
    return out


def _row(group: list[Conversation], image_token: int, merge: int) -> tuple:
    """-> ids, positions (3, L), who sees whom (L, L), (column before, token, conversation, weight) of each scored token, views.

    A tree: the prompt, then a branch for each reply with what was shown after it. Branches that are equal to the token and the
    picture, after equal ones, are one. Where prompts differ, their first common tokens are a branch of their own.
    """
    common = _common(group, image_token)
    ids, views, places, scored = [], [], [], []
    known: dict[tuple, tuple[int, int]] = {}  # path of branches -> columns of the last one
    lines: dict[tuple, list[tuple[int, int]]] = {}  # path -> columns of every branch on it
    for i, c in enumerate(group):
        whole, _ = mrope_positions(c.ids, [v.grid for v in c.views], image_token, merge)
        path, before, waiting = (), -1, list(c.views)
        for start, end in _branches(c, common):
            tokens, here = c.ids[start:end].count(image_token), []
            while tokens:
                here.append(waiting.pop(0))
                tokens -= here[-1].grid[1] * here[-1].grid[2] // merge**2
            parent, path = path, (*path, (tuple(c.ids[start:end]), tuple(v.key for v in here)))
            if path not in known:
                known[path] = len(ids), len(ids) + end - start
                lines[path] = [*lines.get(parent, []), known[path]]
                ids += c.ids[start:end]
                views += here
                places.append(whole[:, start:end])
            left, right = known[path]
            for at in range(start, end):
                if c.weights[at]:
                    scored.append((before if at == start else left + at - start - 1, c.ids[at], i, c.weights[at]))
            before = right - 1
    sees = torch.zeros((len(ids), len(ids)), dtype=torch.bool)
    for path, (left, right) in known.items():
        for start, end in lines[path]:
            sees[left:right, start:end] = True
    return ids, torch.cat(places, 1), sees.tril(), scored, views


def _common(group: list[Conversation], image_token: int) -> int:
    """Tokens that prompts which differ begin with, up to the first picture; 0 where all are the same."""
    prompts = [c.ids[: c.prompt] for c in group]
    if all(p == prompts[0] for p in prompts):
        return 0
    columns = enumerate(zip(*prompts, strict=False))
    return next((i for i, some in columns if len(set(some)) > 1 or some[0] == image_token), min(map(len, prompts)))


def _branches(c: Conversation, common: int) -> list[tuple[int, int]]:
    """Spans of a conversation's ids: ``common`` tokens, the rest of the prompt, then every reply with what is shown after it."""
    cuts = [0, common, *(start for start, _ in c.replies), len(c.ids)]
    return [(start, end) for start, end in pairwise(cuts) if start < end]


class Scorer(torch.nn.Module):
    """A Qwen2.5-VL, plain or with adapters, as a function from packed rows to log-probabilities. What the trainers train.

    banned: tokens that sampling never takes; temperature, penalty: of the sampling.
    """

    def __init__(self, model, banned: tuple[int, ...] = (), temperature: float = 1.0, penalty: float = 1.0):
        super().__init__()
        self.model, self.banned, self.temperature, self.penalty = model, list(banned), temperature, penalty

    @property
    def core(self):
        """The Qwen2.5-VL inside the adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, packed: Packed, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> log-probability (N,) of each scored token, and the entropy (N,) of its distribution without gradient."""
        core = self.core
        embeds = core.get_input_embeddings()(packed.ids)
        if features is not None:
            here = (packed.ids == core.config.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(here, features.to(embeds.dtype))
        decoder = core.model.language_model
        hidden = decoder(
            inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
        ).last_hidden_state
        logits = core.lm_head(hidden[packed.where[:, 0], packed.where[:, 1]]).float()  # (N, vocabulary)
        if self.penalty != 1:
            logits = penalised(logits, packed.before, self.penalty)
        logits = logits / self.temperature
        if self.banned:
            logits[:, self.banned] = float("-inf")
        scores = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(scores.exp() * scores.clamp(min=-1e9)).sum(-1)
        return scores.gather(1, packed.target[:, None])[:, 0], entropy
