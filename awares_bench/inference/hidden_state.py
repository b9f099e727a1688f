"""What a decoder knows in its middle: the hidden state of a prompt's last token after some of the layers, the rest not run."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import Tensor

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Reply
from awares_bench.methods.usage import Usage

from .local_model import VLM, mrope_positions
from .session import Request


class _Reached(Exception):
    """The layer asked for has run; carries its output (1, L, D)."""


def layer_of(share: float, layers: int) -> int:
    """Share of a decoder's depth, in (0, 1] -> number of layers to run, at least one. 0.5 of 28 is 14."""
    if not 0 < share <= 1:
        raise RunError(f"hidden_state_depth is {share!r}; it is a share of the decoder's layers, above 0 and at most 1")
    return max(1, round(share * layers))


@torch.inference_mode()
def last_hidden(vlm: VLM, request: Request) -> Reply:
    """One turn -> a reply without text, with ``hidden`` (D,) in float32; prefill is charged for the layers that ran."""
    turn, marks = request.turn, [time.perf_counter()]
    views = [vlm.pixels(image) for image in turn.images]
    grids = [grid for _, grid, _ in views]
    ids = vlm.chunk(request.session, turn, grids)
    vlm.room(request.session, ids, grids)
    marks.append(time.perf_counter())
    images = vlm.see([patches for patches, _, _ in views], grids)
    vlm.synchronise()
    marks.append(time.perf_counter())

    merge = vlm.processor.image_processor.merge_size
    chunk = vlm.embed(ids, mrope_positions(ids, grids, vlm.image_token, merge), images)
    run = layer_of(turn.hidden_state_depth, len(vlm.decoder.layers))
    hidden = _until(vlm.decoder, run, chunk.embeds[None], chunk.positions[:, None])[0, -1].float().tolist()
    marks.append(time.perf_counter())

    visual, share = sum(rows * columns // merge**2 for _, rows, columns in grids), run / len(vlm.decoder.layers)
    spans = [b - a for a, b in pairwise(marks)]
    request.session.events += [e for _, _, events in views for e in events]  # after all that may fail
    usage = Usage(visual, visual * share, len(ids) - visual, 0, *spans)
    return Reply("", usage=usage, hidden=tuple(hidden))


def _until(decoder, layers: int, embeds: Tensor, positions: Tensor) -> Tensor:
    """Output (1, L, D) of the first ``layers`` layers, before any final norm."""

    def stop(module, inputs, output):
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = decoder.layers[layers - 1].register_forward_hook(stop)
    try:
        decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"layer {layers} of the decoder was never run")
