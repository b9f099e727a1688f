"""Chat exchanges to token ids and loss weights. The ids equal those that the engine feeds (tested)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image

from awares_bench.models.qwen2_5_vl import mrope_positions

from .pixels import patches

DEFAULT_SYSTEM = "You are a helpful assistant."  # the chat template's own


@dataclass
class TrainingRow:
    """One conversation of a batch."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """Loss weight of each token; 0 where the model did not write it."""
    pixels: list[torch.Tensor] = field(default_factory=list)
    """Bytes (P, 588) of each image, see ``pixels.patches``."""
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    """(1, rows, columns) of each image, in patches."""
    replies: list[tuple[int, int]] = field(default_factory=list)
    """Spans of ``ids`` that the model wrote."""
    hints: list[tuple[int, int]] = field(default_factory=list)
    """(position, token): the token must be known at this position after the first layer."""


class RowEncoder:
    """Encodes exchanges with one tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad = tokenizer.pad_token_id
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def encode_row(self, exchanges: list[tuple[list[Image.Image], str, str, float]], system: str = DEFAULT_SYSTEM) -> TrainingRow:
        """(images, user text, reply, loss weight) of each turn -> a row. Sides of images are multiples of 28 pixels."""
        out = TrainingRow()

        def append(ids: list[int], weight: float = 0.0) -> None:
            out.ids += ids
            out.weights += [weight] * len(ids)

        append(self.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"))
        for i, (images, text, reply, weight) in enumerate(exchanges):
            if i:
                append(self.encode("\n<|im_start|>user\n"))
            for image in images:
                pixels, grid = patches(image)
                out.pixels.append(pixels)
                out.grids.append(grid)
                tokens = [self.image_token] * (len(pixels) // 4)
                append(self.encode("<|vision_start|>") + tokens + self.encode("<|vision_end|>"))
            append(self.encode(f"{text}<|im_end|>\n<|im_start|>assistant\n"))
            start = len(out.ids)
            append([*self.encode(reply), self.end], weight)
            out.replies.append((start, len(out.ids)))
        return out


def collate(rows: list[TrainingRow], encoder: RowEncoder) -> dict:
    """Rows -> one batch, padded on the right.

    ids, mask, weights (B, L); positions (3, B, L); pixels (P, 588), bytes of all patches; grids (I, 3); hints (H, 3): row,
    position, token.
    """
    length = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), length), encoder.pad)
    weights, mask = torch.zeros(len(rows), length), torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    for b, r in enumerate(rows):
        n = len(r.ids)
        ids[b, :n], weights[b, :n], mask[b, :n] = torch.tensor(r.ids), torch.tensor(r.weights), 1
        positions[:, b, :n] = mrope_positions(
            r.ids, [(rows // 2, columns // 2) for _, rows, columns in r.grids], encoder.image_token
        )[0]
    pixels = torch.cat([p for r in rows for p in r.pixels])
    grids = torch.tensor([g for r in rows for g in r.grids])
    hints = torch.tensor([(b, at, token) for b, r in enumerate(rows) for at, token in r.hints], dtype=torch.long).reshape(-1, 3)
    return {
        "ids": ids,
        "mask": mask,
        "weights": weights,
        "positions": positions,
        "pixels": pixels,
        "grids": grids,
        "hints": hints,
    }
