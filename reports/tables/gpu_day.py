"""Tables of a GPU day. The device's name is in every title."""

from __future__ import annotations

import pandas as pd

from ..data import gpu_day
from ..data.gpu_day import GpuDay
from .table import DASH, Table, number, printed


def tables(day: GpuDay) -> list[Table]:
    """Those whose section measured anything."""
    return [t for t in (engine(day), equality(day), pruners(day), grpo(day), device(day), nano(day)) if t is not None]


def engine(day: GpuDay) -> Table | None:
    """Seconds a page of every way, a row per setting, and what the ratios of the clock say."""
    frame = gpu_day.engine(day)
    if frame.empty:
        return None
    rows, texts = [], []
    keys = ["section", "model", "dtype", "tokens", "batch", "call_rate"]
    ways = list(dict.fromkeys(frame["way"]))
    for (_, model, dtype, tokens, batch, rate), own in frame.groupby(keys, sort=False):
        of = own.set_index("way")
        row = {
            "model": model,
            "dtype": dtype,
            "tokens": tokens,
            "batch": batch,
            "call_rate": rate,
            "layout": own["layout"].iloc[0],
        }
        text = {("", "model"): f"{model}, {dtype}", ("", "tokens"): number(tokens, 0), ("", "batch"): str(batch)}
        text[("", "calls")] = number(rate, 1)
        for way in ways:
            for name in ("seconds", "floor", "peak_gib"):
                row[f"{way} {name}"] = of.at[way, name] if way in of.index else None
            text["milliseconds a page", way] = number(None if row[f"{way} seconds"] is None else 1000 * row[f"{way} seconds"], 1)
        row["rtr"] = of.at["AwaRes, ours", "rtr"] if "AwaRes, ours" in of.index else None
        pairs = {
            "AwaRes / full": ("AwaRes, ours seconds", "full, ours seconds"),
            "generate / ours, full": ("full, generate seconds", "full, ours seconds"),
            "generate / ours, AwaRes": ("AwaRes, generate twice seconds", "AwaRes, ours seconds"),
            "rectangle / ours": ("AwaRes, ours in a rectangle seconds", "AwaRes, ours seconds"),
            "steps from Python / recorded": ("AwaRes, ours, steps from Python seconds", "AwaRes, ours seconds"),
            "ours / floor": ("AwaRes, ours seconds", "AwaRes, ours floor"),
        }
        text["ratio", "RTR"] = number(row["rtr"], 2)
        for name, (top, bottom) in pairs.items():
            row[name] = _ratio(row.get(top), row.get(bottom))
            text["ratio", name] = number(row[name], 2)
        for way in ("full, ours", "AwaRes, ours", "AwaRes, generate twice"):
            text["peak GiB", way] = number(row.get(f"{way} peak_gib"), 1)
        rows.append(row)
        texts.append(text)
    notes = [
        "Medians of the rounds of one process, pictures' preparation included. Floor: operations counted from the shapes over the rate of a "
        "matrix product of this device; no memory traffic, no Python.",
        *day.notes,
    ]
    return Table("gpu_engine", f"The engine on one device: {day.device}", pd.DataFrame(rows), printed(texts), notes)


def equality(day: GpuDay) -> Table | None:
    """What differs between ways to compute the same scores."""
    frame = gpu_day.equality(day)
    if frame.empty:
        return None
    texts = [
        {
            ("", "precision"): r.dtype,
            ("", "what is compared"): r.question,
            ("", "scores of"): f"{r.compared:,} tokens",
            ("difference", "largest"): f"{r.largest:.2g}",
            ("difference", "relative"): DASH if pd.isna(r.relative) else f"{r.relative:.2g}",
            ("difference", "same choice"): DASH if pd.isna(r.same_choice) else f"{100 * r.same_choice:.1f} %",
        }
        for r in frame.itertuples()
    ]
    notes = [
        "Relative: norm of the difference over that of the scores. Log-probabilities where it says packed scoring, "
        "features where it says vision tower."
    ]
    return Table("gpu_equality", f"The same scores by every way: {day.device}", frame, printed(texts), [*notes, *day.notes])


def pruners(day: GpuDay) -> Table | None:
    """What pruners cost beside the prefill."""
    frame = gpu_day.pruners(day)
    if frame.empty:
        return None
    texts = [
        {
            ("", "pruner"): r.pruner,
            ("", "model"): r.model,
            ("", "tokens"): number(r.tokens, 0),
            ("", "retention"): f"{r.retention:g}",
            ("share of the prefill, %", "scoring"): number(100 * r.scoring, 2),
            ("share of the prefill, %", "with the cut"): number(100 * r.share, 2),
            ("", "extra MiB"): number(r.extra_mib, 0),
        }
        for r in frame.itertuples()
    ]
    return Table("gpu_pruners", f"Cost of deciding: {day.device}", frame, printed(texts), day.notes)


def grpo(day: GpuDay) -> Table | None:
    """A GRPO step beside its floor."""
    rows, texts = [], []
    for key, r in day.items("grpo").items():
        row = {
            "step": key,
            "prompts": r["prompts"],
            "group": r["group"],
            "visual_tokens": r["visual_tokens"],
            "seconds": r["seconds"],
        }
        row |= {
            "floor": r["floor"]["seconds"],
            "over_floor": r["over_floor"],
            "peak_gib": r["peak_memory_bytes"] and r["peak_memory_bytes"] / 2**30,
        }
        row |= {f"floor {part}": value for part, value in r["floor"]["parts"].items()}
        row |= {f"tokens {kind}": value for kind, value in r["tokens"].items()}
        rows.append(row)
        text = {
            ("", "step"): key,
            ("", "prompts x group"): f"{r['prompts']} x {r['group']}",
            ("", "seconds"): number(r["seconds"], 2),
        }
        text |= {("floor, seconds", part): number(value, 3) for part, value in r["floor"]["parts"].items()}
        text |= {("floor, seconds", "sum"): number(row["floor"], 2), ("", "over the floor"): number(row["over_floor"], 2)}
        text |= {("", "peak GiB"): number(row["peak_gib"], 1)}
        texts.append(text)
    if not rows:
        return None
    return Table("gpu_grpo", f"A GRPO step: {day.device}", pd.DataFrame(rows), printed(texts), day.notes)


def device(day: GpuDay) -> Table | None:
    """Rates of the device."""
    result = day.items("device").get("rates")
    if result is None:
        return None
    known = {
        "matrix product, bfloat16, TFLOP/s": result["matmul_flops"]["bfloat16"] / 1e12,
        "matrix product, float32, TFLOP/s": result["matmul_flops"]["float32"] / 1e12,
        "memory, read and written, GB/s": result["memory_bytes"] / 1e9,
        "to the device, pinned, GB/s": result.get("to_device_bytes", {}).get("pinned"),
        "to the device, pageable, GB/s": result.get("to_device_bytes", {}).get("pageable"),
        "from the device, pinned, GB/s": result.get("from_device_bytes"),
        "a small operation, microseconds": result["small_operation_seconds"] * 1e6,
    }
    known = {k: v / 1e9 if v is not None and "device" in k else v for k, v in known.items()}
    for kernel, value in result["attention"].items():
        known[f"attention of {result['attention_tokens']:,} tokens, {kernel.replace('_', ' ')}, microseconds"] = (
            value * 1e6 if isinstance(value, float) else None
        )
    for step in result["step_attention"]:
        for way in ("fused", "products"):
            known[f"attention of a step, {step['batch']} rows on {step['keys']:,} keys, {way}, microseconds"] = step[way] * 1e6
    kernels = day.items("equality").get("bfloat16: kernels", {"differences": {}})["differences"]
    for kernel, value in kernels.items():
        known[f"difference from the reference, {kernel}"] = value if isinstance(value, float) else None
    rows = [{"what": what, "value": value} for what, value in known.items()]
    texts = [{("", "what"): r["what"], ("", "value"): number(r["value"], 3)} for r in rows]
    return Table("gpu_device", f"What the device can do: {day.device}", pd.DataFrame(rows), printed(texts), day.notes)


def nano(day: GpuDay) -> Table | None:
    """The larger nano's tower: accuracy on validation scenes."""
    result = day.items("nano").get("tower")
    if result is None or not result["evaluation"]:
        return None
    rows = [{"view": view, **cells} for view, cells in result["evaluation"].items()]
    texts = [
        {("", "view and size"): r["view"]} | {("accuracy", k): number(v, 3) for k, v in r.items() if k != "view"} for r in rows
    ]
    g = result["geometry"]
    notes = [
        f"Tower of {g['vision_depth']} blocks and width {g['vision_width']}, decoder width {g['width']}: {result['steps']} steps on "
        f"{result['pictures']} pictures in {result['seconds']:.0f} s.",
        *day.notes,
    ]
    return Table("gpu_nano", f"A larger nano's tower: {day.device}", pd.DataFrame(rows), printed(texts), notes)


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom or top != top or bottom != bottom else top / bottom
