"""Chat trajectories to token ids with a loss weight on every token the model writes. Same tokens as the engine feeds (tested)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image

from awares_bench.inference.local_model import mrope_positions

from .pixels import patches

DEFAULT_SYSTEM = "You are a helpful assistant."  # the chat template's own


@dataclass
class TrainingRow:
    """One conversation. weights: loss weight of each token, 0 where the model did not write it."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    pixels: list[torch.Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    replies: list[tuple[int, int]] = field(default_factory=list)  # spans of ids that the model wrote
    hints: list[tuple[int, int]] = field(default_factory=list)  # (position, token that must be known there after a layer)


class RowEncoder:
    """Writes rows with one tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad = tokenizer.pad_token_id
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def encode_row(self, exchanges: list[tuple[list[Image.Image], str, str, float]], system: str = DEFAULT_SYSTEM) -> TrainingRow:
        """(images, user text, reply, loss weight) per turn -> a row. Sides of images are multiples of 28 pixels."""
        out = TrainingRow()

        def say(ids: list[int], weight: float = 0.0) -> None:
            out.ids += ids
            out.weights += [weight] * len(ids)

        say(self.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"))
        for i, (images, text, reply, weight) in enumerate(exchanges):
            if i:
                say(self.encode("\n<|im_start|>user\n"))
            for image in images:
                p, grid = patches(image)
                out.pixels.append(p)
                out.grids.append(grid)
                say(self.encode("<|vision_start|>") + [self.image_token] * (len(p) // 4) + self.encode("<|vision_end|>"))
            say(self.encode(f"{text}<|im_end|>\n<|im_start|>assistant\n"))
            start = len(out.ids)
            say([*self.encode(reply), self.end], weight)
            out.replies.append((start, len(out.ids)))
        return out


def collate(rows: list[TrainingRow], encoder: RowEncoder) -> dict:
    """Rows -> one right-padded batch: ids, mask, weights (B, L), positions (3, B, L), bytes of all patches, grids (I, 3), hints (H, 3)."""
    length = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), length), encoder.pad)
    weights, mask = torch.zeros(len(rows), length), torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    for b, r in enumerate(rows):
        n = len(r.ids)
        ids[b, :n], weights[b, :n], mask[b, :n] = torch.tensor(r.ids), torch.tensor(r.weights), 1
        positions[:, b, :n] = mrope_positions(r.ids, r.grids, encoder.image_token)[0]
    pixels = torch.cat([p for r in rows for p in r.pixels])
    grids = torch.tensor([g for r in rows for g in r.grids])
    hints = torch.tensor([(b, at, token) for b, r in enumerate(rows) for at, token in r.hints], dtype=torch.long).reshape(-1, 3)
    out = {"ids": ids, "mask": mask, "weights": weights, "positions": positions, "pixels": pixels, "grids": grids}
    return out | {"hints": hints}
