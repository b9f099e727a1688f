"""The records of ``awares-bench bench gpu-day``: a folder with a file a section, each of one device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .load import ReportError

FORMAT = 1
SECTIONS = ("device", "equality", "engine", "engine_large", "pruners", "grpo", "nano")
WAYS = {
    "full: ours": "full, ours",
    "AwaRes: ours, one cache": "AwaRes, ours",
    "AwaRes: ours, one cache, rectangle": "AwaRes, ours in a rectangle",
    "AwaRes: ours, one cache, steps from Python": "AwaRes, ours, steps from Python",
    "AwaRes: ours, everything again": "AwaRes, ours without the cache",
    "full: model.generate": "full, generate",
    "AwaRes: model.generate twice": "AwaRes, generate twice",
}
"""What the engine bench calls a way to answer -> its name in print."""


@dataclass(frozen=True)
class GpuDay:
    """What one device said."""

    device: str
    scale: str
    """``full``, or ``tiny`` for a rehearsal."""
    sections: dict[str, dict]
    """Name -> the record, of the sections that began."""

    def items(self, section: str) -> dict[str, dict]:
        """Key -> result of what a section measured."""
        items = self.sections.get(section, {}).get("items", {})
        return {key: item["result"] for key, item in items.items() if "result" in item}

    @property
    def notes(self) -> list[str]:
        """What every table and figure says: the device, the weights, what is missing and what failed."""
        out = [f"Device: {self.device}. Random weights of published sizes."]
        if self.scale != "full":
            out.append(f"Scale {self.scale}: a rehearsal, whose seconds say nothing.")
        missing = [f"{name} ({', '.join(r['missing'])})" for name, r in self.sections.items() if r["missing"]]
        missing += [name for name in SECTIONS if name not in self.sections]
        if missing:
            out.append(f"Not measured: {'; '.join(missing)}.")
        failed = [f"{key}: {i['error']}" for r in self.sections.values() for key, i in r["items"].items() if "error" in i]
        failed += [f"{name}: {error}" for result in self.items("pruners").values() for name, error in result["failed"].items()]
        return out + [f"Failed: {sentence}" for sentence in dict.fromkeys(failed)]


def holds(path: Path) -> bool:
    """Whether a folder is one of these."""
    return path.is_dir() and any(_is_section(path / f"{name}.json") for name in SECTIONS)


def _is_section(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("section") == path.stem
    except (ValueError, AttributeError):
        return False


def read(path: Path) -> GpuDay:
    """Raises ReportError for records of several devices or scales, or of a format that is not known."""
    found = {name: path / f"{name}.json" for name in SECTIONS}
    sections = {name: json.loads(p.read_text(encoding="utf-8")) for name, p in found.items() if _is_section(p)}
    for name, record in sections.items():
        if record["format"] != FORMAT:
            raise ReportError(f"{found[name]} has format {record['format']}; this version reads {FORMAT}")
    for what in ("device", "scale"):
        values = {json.dumps(record[what], sort_keys=True) for record in sections.values()}
        if len(values) > 1:
            raise ReportError(
                f"{path} holds records of several {what}s ({' and '.join(sorted(values))}); report each folder apart"
            )
    first = next(iter(sections.values()))
    return GpuDay(first["device"], first["scale"]["name"], sections)


def engine(day: GpuDay) -> pd.DataFrame:
    """A row per model, setting and way: model, dtype, layout, tokens, batch, call_rate, way, seconds (a page), low, high (quartiles),
    rtr, floor (seconds a page), peak_gib."""
    rows = []
    for section in ("engine", "engine_large"):
        for result in day.items(section).values():
            about, full = result["about"], result["rows"][0]
            pages = about["batch"]
            for row in result["rows"]:
                same = {
                    "section": section,
                    "model": about["model"].split(" ")[0],
                    "dtype": about["dtype"],
                    "layout": about["layout"],
                }
                same |= {"tokens": about["tokens"], "batch": pages, "call_rate": about["call_rate"]}
                low, high = row["quartiles"]
                peak = row["peak_memory_bytes"]
                rows.append(
                    same
                    | {
                        "way": WAYS.get(row["name"], row["name"]),
                        "seconds": row["seconds"] / pages,
                        "low": low / pages,
                        "high": high / pages,
                        "rtr": row["visual_tokens"] / full["visual_tokens"],
                        "floor": None if row["floor_seconds"] is None else row["floor_seconds"] / pages,
                        "peak_gib": None if peak is None else peak / 2**30,
                    }
                )
    columns = [
        "section", "model", "dtype", "layout", "tokens", "batch", "call_rate", "way", "seconds", "low", "high", "rtr", "floor", "peak_gib",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def equality(day: GpuDay) -> pd.DataFrame:
    """A row per comparison: dtype, question, compared, largest, relative, same_choice."""
    rows = []
    for key, result in day.items("equality").items():
        dtype, _, question = key.partition(": ")
        if "differences" in result:  # of kernels
            continue
        parts = {name: part for name, part in result.items() if isinstance(part, dict)} or {"": result}
        for name, part in parts.items():
            asked = ", ".join(word for word in (question, name) if word)
            rows.append(
                {"dtype": dtype, "question": asked, "compared": part["compared"], "largest": part["largest"]}
                | {k: part.get(k) for k in ("relative", "same_choice")}
            )
    return pd.DataFrame(rows, columns=["dtype", "question", "compared", "largest", "relative", "same_choice"])


def pruners(day: GpuDay) -> pd.DataFrame:
    """A row per pruner and retention: model, tokens, retention, pruner, kept, scoring, share (of the prefill, with the cut), extra_mib."""
    rows = []
    for result in day.items("pruners").values():
        same = {"model": result["geometry"], "tokens": result["visual_tokens"], "retention": result["retention"]}
        for p in result["pruners"]:
            extra = p["extra_bytes"]
            shares = {"scoring": p["scoring_share"], "share": p["share"]}
            rows.append(
                same
                | {"pruner": p["pruner"], "kept": p["visual"], **shares, "extra_mib": None if extra is None else extra / 2**20}
            )
    return pd.DataFrame(rows, columns=["model", "tokens", "retention", "pruner", "kept", "scoring", "share", "extra_mib"])
