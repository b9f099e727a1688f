"""Calls and answers that a reply writes between tags: JSON goes through a parser and is never evaluated, boxes are finite numbers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

from .conversation import Reply
from .crop_grid import Box

FARTHEST = 1e9
"""Coordinates beyond it are no place in a picture; arithmetic with them overflows."""


class CallError(ValueError):
    """A call that cannot be obeyed; the message is what the model is told."""


def tagged(text: str, tag: str) -> list[str]:
    """What stands between ``<tag>`` and the next ``</tag>``, for every pair of them in order."""
    return re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)


def read_json(text: str) -> Any:
    """The JSON value that ``text`` is. Raises CallError at anything else, nesting that is too deep included."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallError(f"The call is not JSON: {text.strip()[:200]}") from error


def json_values(text: str) -> list:
    """The JSON values in ``text``, one after the other. Raises CallError at anything else."""
    decoder, out, at = json.JSONDecoder(), [], 0
    try:
        while text[at:].strip():
            at += len(text[at:]) - len(text[at:].lstrip())
            value, at = decoder.raw_decode(text, at)
            out.append(value)
    except (ValueError, RecursionError) as error:
        raise CallError(f"The call is not JSON: {text.strip()[:200]}") from error
    return out


def argument(call: Any, *names: str) -> Any:
    """The value under ``names``, one in the other. Raises CallError where one is missing."""
    for name in names:
        if not isinstance(call, dict) or name not in call:
            raise CallError(f"Missing `{name}` in the call.")
        call = call[name]
    return call


def numbers(value: Any, count: int = 4) -> tuple[float, ...]:
    """``count`` finite numbers. Raises CallError for a list of another length, texts, NaN, infinities and beyond ``FARTHEST``."""
    if not isinstance(value, list) or len(value) != count:
        raise CallError(f"Bounding box must contain {count} elements: {str(value)[:200]}")
    if not all(isinstance(v, (int, float)) and -FARTHEST <= v <= FARTHEST for v in value):  # NaN compares false
        raise CallError(f"All bounding box elements must be numeric: {str(value)[:200]}")
    return tuple(map(float, value))


def enclosing(box: tuple[float, ...], width: int, height: int) -> Box:
    """The whole pixels of a (width, height) image that ``box`` touches, at least one a side."""
    left, top = min(max(0, math.floor(box[0])), width - 1), min(max(0, math.floor(box[1])), height - 1)
    return left, top, max(min(math.ceil(box[2]), width), left + 1), max(min(math.ceil(box[3]), height), top + 1)


def share_of_box(box: Box, width: int, height: int) -> float:
    """The share of a (width, height) image that a box within it covers, at least that of a pixel (``Turn.shares``)."""
    area = max(1, box[2] - box[0]) * max(1, box[3] - box[1])
    return min(1.0, area / (width * height))


def last_answer(text: str) -> str:
    """What stands after the last ``<answer>`` and before the ``</answer>`` that follows it; all of the text without the tag."""
    return text.rpartition("<answer>")[2].split("</answer>")[0].strip()


def first_answer(text: str) -> str | None:
    """What stands between the first ``<answer>`` and ``</answer>``; None without them."""
    return next((answer.strip() for answer in tagged(text, "answer")), None)


def answered(reply: Reply, text: str) -> Reply:
    """The reply with ``text`` as the answer, and without the tokens, which the task's limit is not for."""
    return replace(reply, text=text, tokens=())
