"""Patches as Qwen2.5-VL's image processor lays them out, for images whose sides are already multiples of 28 pixels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def patches(image: Image.Image) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """RGB image of (w, h) pixels -> (bytes (h/14 * w/14, 588), grid (1, h/14, w/14)); ``normalise`` makes pixel values of it."""
    if image.width % 28 or image.height % 28:
        raise ValueError(f"training images have sides that are multiples of 28 pixels; got {image.size}")
    rows, columns = image.height // 14, image.width // 14
    a = np.asarray(image).reshape(rows // 2, 2, 14, columns // 2, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)  # raster of 2x2 groups
    return torch.from_numpy(a.reshape(rows * columns, 588)), (1, rows, columns)


def normalise(values: torch.Tensor) -> torch.Tensor:
    """Bytes (N, 588) of 3 channels x 14 x 14 -> pixel values (N, 1176), as the processor's (tested): two identical frames."""
    mean, std = values.new_tensor(MEAN, dtype=torch.float32), values.new_tensor(STD, dtype=torch.float32)
    x = (values.float().unflatten(1, (3, 196)) / 255 - mean[:, None]) / std[:, None]
    return x[:, :, None].expand(-1, -1, 2, -1).reshape(len(x), 1176)
