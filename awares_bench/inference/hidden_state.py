"""What a decoder knows in its middle: the hidden state of a prompt's last token after some of the layers, the rest not run."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Reply
from awares_bench.methods.usage import Usage
from awares_bench.models.base import HostModel

from .padded_batch import attention_mask
from .session import Prepared, Request


def layers_of(share: float | None, layers: int) -> int:
    """Share of a decoder's depth, in (0, 1] -> number of layers to run, at least one. 0.5 of 28 is 14."""
    if share is None or not 0 < share <= 1:
        raise RunError(f"hidden_state_depth is {share!r}; it is a share of the decoder's layers, above 0 and at most 1")
    return max(1, round(share * layers))


@torch.inference_mode()
def last_hidden(host: HostModel, request: Request, prepared: Prepared) -> Reply:
    """One turn -> a reply without text, with ``hidden`` (D,) in float32, before any final norm; prefill is charged for the layers that ran."""
    images, marks = prepared.images, [time.perf_counter()]
    visual = host.encode(images)
    chunk = host.chunk(prepared.ids, images, visual, request.session.next_position)
    marks.append(time.perf_counter())
    run = layers_of(request.turn.hidden_state_depth, host.layers)
    hidden = chunk.embeds[None]
    rope = host.rope(hidden, chunk.positions[:, None])
    deepstack = None if chunk.deepstack is None else chunk.deepstack[:, None]
    everything = torch.ones(hidden.shape[:2], dtype=torch.bool, device=host.device)
    mask = attention_mask(host.attention, everything, hidden, gaps=False)
    for layer in range(run):
        hidden = host.layer(layer, hidden, rope, deepstack, attention_mask=mask)
    values = tuple(hidden[0, -1].float().tolist())  # waits for the device
    marks.append(time.perf_counter())
    request.session.events += prepared.events  # after all that may fail
    tokens = sum(image.tokens for image in images)
    encode, prefill = (b - a for a, b in pairwise(marks))
    usage = Usage(
        encoded=tokens,
        prefill=tokens * run / host.layers,
        text=len(prepared.ids) - tokens,
        preprocess_seconds=prepared.seconds,
        encode_seconds=encode,
        prefill_seconds=prefill,
    )
    return Reply("", usage=usage, hidden=values)
