"""One bar for a run: documents, tokens a second, time left, calls so far. Nothing is printed where nobody watches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from awares_bench.methods.conversation import Failure, Trajectory


class Progress:
    """The bar; a context manager.

    total: documents to answer. file: where it is drawn, the error stream unless another is given. shown: False for processes that
    stay quiet. Where the file is no terminal nothing is drawn.
    """

    def __init__(self, total: int, label: str, file: TextIO | None = None, shown: bool = True) -> None:
        out = sys.stderr if file is None else file
        self.tokens = self.calls = self.failures = 0
        form = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} documents [{elapsed}, {remaining} left{postfix}]"
        self.bar = tqdm(
            total=total,
            desc=label,
            file=out,
            disable=None if shown else True,
            bar_format=form,
            mininterval=0.2,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def answered(self, outcome: Trajectory | Failure) -> None:
        """A document is answered, or could not be."""
        if isinstance(outcome, Failure):
            self._add(0, False, True)
        else:
            spent = outcome.usage
            called = bool(outcome.crops) or outcome.malformed_call is not None
            self._add(spent.prefill + spent.text + spent.output, called, False)

    def recorded(self, record: dict) -> None:
        """The same, of a line of ``records.jsonl`` that another process wrote."""
        usage = record.get("usage") or []
        tokens = sum(u.get("prefill", 0) + u.get("text", 0) + u.get("output", 0) for u in usage)
        called = bool(record.get("crops")) or record.get("malformed_call") is not None
        self._add(tokens, called, record.get("error") is not None)

    def _add(self, tokens: float, called: bool, failed: bool) -> None:
        self.tokens += round(tokens)
        self.calls += called
        self.failures += failed
        if not self.bar.disable:
            seconds = self.bar.format_dict["elapsed"]
            rate = [f"{self.tokens / seconds:,.0f} tokens/s"] if seconds > 0 else []
            lost = [f"{self.failures} failed"] if self.failures else []
            self.bar.set_postfix_str(", ".join([*rate, f"{self.calls} calls", *lost]), refresh=False)
        self.bar.update()


class Follower:
    """Tells a bar what another process adds to a run's ``records.jsonl``, as far as whole lines are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read = path.stat().st_size if path.is_file() else 0
        """Bytes that were there before, or are told already."""

    def tell(self, bar: Progress) -> None:
        """Tell the bar every record since the last call."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.read += len(line)
                bar.recorded(json.loads(line))
