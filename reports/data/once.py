"""Results that several tables and figures need are computed once: a function of documents is remembered by what the documents hold."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any

import pandas as pd

KEPT = 16
"""Results of each function."""


def content(frame: pd.DataFrame, columns: tuple[str, ...]) -> bytes:
    """A hash of some columns: values, types, order of rows and of categories."""
    state = hashlib.blake2b()
    for name in columns:
        column = frame[name]
        kind = [*map(repr, column.cat.categories)] if isinstance(column.dtype, pd.CategoricalDtype) else column.dtype
        state.update(f"{name} {kind} {len(column)}".encode())
        state.update(pd.util.hash_pandas_object(column, index=False).to_numpy().tobytes())
    return state.digest()


def once(*columns: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a function of a frame that reads these ``columns`` and returns a frame or a dict: what was computed before comes back as a copy."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        known: OrderedDict[Any, Any] = OrderedDict()

        @wraps(function)
        def remembered(frame: pd.DataFrame, *args, **kwargs):
            key = (content(frame, columns), args, tuple(sorted(kwargs.items())))
            if key not in known:
                known[key] = function(frame, *args, **kwargs)
                if len(known) > KEPT:
                    known.popitem(last=False)
            return deepcopy(known[key])

        return remembered

    return wrap
