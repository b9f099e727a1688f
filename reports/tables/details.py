"""The tables behind the main one: how surely methods differ, when and where they look, what an ablation changed, where numbers come from."""

from __future__ import annotations

import numpy as np
import pandas as pd

from awares_bench.methods.crop_grid import PAPER_GRID

from ..data import names, stats
from ..data.load import Run
from ..data.published import numbers, variant_of
from ..data.summary import labels, reference, summary
from .table import DASH, Table, chance, number, percent, printed, span


def differences(frame: pd.DataFrame, gap: float = 0.01) -> Table | None:
    """Paired differences to full resolution and AwaRes per task, with the documents that the difference, and ``gap``, would need."""
    name = labels(frame)
    rows, printed_rows = [], []
    for family in ("full", "awares"):
        against = reference(frame, family)
        if against is None or frame["method"].nunique() < 2:
            continue
        for r in stats.compare(frame, against).itertuples():
            wide = r.low <= 0 <= r.high
            row: dict = {"method": r.method, "against": against, "task": r.task}
            row |= {k: percent(getattr(r, k)) for k in ("difference", "low", "high")}
            row |= {"p": r.p, "p_holm": r.p_holm, "documents": r.documents, "needed": r.needed, "smallest seen": percent(r.seen)}
            row |= {f"needed for {100 * gap:g} points": stats.documents_needed(gap, r.variance), "wider than the gap": wide}
            rows.append(row)
            if r.task == "mean":
                text = {"method": name[r.method], "against": name[against], "points": number(row["difference"], 1, sign=True)}
                text |= {"95 %": span(row["low"], row["high"]), "p": chance(r.p), "p (Holm)": chance(r.p_holm)}
                text |= {"smallest gap these documents show": number(row["smallest seen"], 1)}
                text |= {
                    "documents a task for this gap": document_count(r.needed),
                    f"for a gap of {100 * gap:.1f}": document_count(row[f"needed for {100 * gap:g} points"]),
                }
                text["interval wider than the gap"] = "yes" if wide else "no"
                printed_rows.append({("", k): v for k, v in text.items()})
    if not rows:
        return None
    note = "Points of accuracy, mean over tasks, same documents; documents needed at a level of 0.05 and a power of 0.8."
    return Table(
        "differences",
        f"What these documents can tell apart: {names.suite(frame)}",
        pd.DataFrame(rows),
        printed(printed_rows),
        [note],
    )


def document_count(n: float) -> str:
    """A number of documents in print."""
    return DASH if n != n else ("none is enough" if n == float("inf") else f"{n:,.0f}")


def decisions(frame: pd.DataFrame) -> pd.DataFrame:
    """Documents -> a row per method that ever calls: when it looks closer and where.

    Columns: method, call_rate, malformed_rate (of calls), area (mean share of the image that well-formed calls fetch), crops (per call),
    direct, one, several and all (shares of documents); with full and half size in the frame also needed (share of documents where
    full resolution scores higher than half size: the paper's label HR), precision, recall, f1 and fpr of the call against it.
    """
    full, low = reference(frame, "full"), reference(frame, "low")
    # The label HR of a document needs both ends; without them only what the method did is known.
    need = None
    if full and low:
        scores = frame[frame["method"].isin([full, low])].pivot(index=["task", "doc_id"], columns="method", values="score")
        need = (scores[full] > scores[low]).rename("need").reset_index()
    rows = []
    for method, own in frame.groupby("method", sort=False, observed=True):
        if not own["called"].any():
            continue
        crops = own["crops"].astype(str)
        fetched = crops[crops != ""]
        count = fetched.str.count(",") + 1
        # Crops of another grid than the paper's have no known area.
        known = [c for c in fetched if set(c.split(",")) <= {*PAPER_GRID.names, "all"}]
        row: dict = {"method": str(method), "documents": len(own), "call_rate": own["called"].mean()}
        row |= {"malformed_rate": own["malformed"].sum() / own["called"].sum()}
        row |= {"area": float(np.mean([PAPER_GRID.area(c.split(",")) for c in known])) if known else None}
        row |= {"crops": count.mean() if len(count) else None, "direct": 1 - own["called"].mean(), "all": (crops == "all").mean()}
        row |= {"one": ((count == 1) & (fetched != "all")).sum() / len(own), "several": (count > 1).sum() / len(own)}
        if need is not None:  # the call as a classifier of the label
            both = own.astype({"task": str}).merge(need.astype({"task": str}), on=["task", "doc_id"])
            hit = (both["called"] & both["need"]).sum()
            called, needed = both["called"].sum(), both["need"].sum()
            precision, recall = (hit / called if called else None), (hit / needed if needed else None)
            row |= {"needed": both["need"].mean(), "precision": precision, "recall": recall}
            row["f1"] = 2 * hit / (called + needed) if called + needed else None
            row["fpr"] = (called - hit) / (len(both) - needed) if len(both) > needed else None
        rows.append(row)
    return pd.DataFrame(rows)


def diagnostics(frame: pd.DataFrame) -> Table | None:
    """``decisions`` as a table; None when no method calls."""
    rates = decisions(frame)
    if rates.empty:
        return None
    name = labels(frame)
    columns = [c for c in rates.columns if c not in ("method", "documents")]
    printed_rows = [
        {("", "method"): name[r["method"]]} | {("", c): number(r[c], 2) for c in columns} for r in rates.to_dict("records")
    ]
    notes = [
        "needed: full resolution scores higher than half size (the paper's label HR, by score). Shares are fractions of documents."
    ]
    return Table("diagnostics", f"When and where methods look closer: {names.suite(frame)}", rates, printed(printed_rows), notes)


def ablations(runs: list[Run], frame: pd.DataFrame) -> Table | None:
    """Runs of one method that differ in settings or weights, side by side, with the paper's ablation of that name; None without any."""
    name, summaries = labels(frame), summary(frame)
    families = {str(m): str(f) for m, f in frame.drop_duplicates("method")[["method", "family"]].to_numpy()}
    means = stats.intervals(frame).query("task == 'mean'").set_index("method")
    published = numbers().query("task == 'mean'")
    rows = []
    for family in dict.fromkeys(families.values()):
        own = [r for r in runs if families[r.name] == family]
        if len(own) < 2:
            continue
        settings = {r.name: _settings(r) for r in own}
        keys = dict.fromkeys(k for s in settings.values() for k in s)
        differing = [k for k in keys if len({str(s.get(k)) for s in settings.values()}) > 1]
        for run in own:
            cell, chosen = summaries[run.name]["mean"], settings[run.name]
            row: dict = {"method": run.name, "settings": ", ".join(f"{k}={chosen.get(k)}" for k in differing) or DASH}
            row |= {"accuracy": percent(cell["accuracy"])}
            row |= {k: percent(means.at[run.name, k]) for k in ("low", "high")}
            row |= {"RTR": cell["rtr"], "call rate": cell["call_rate"]}
            # The paper's cell of the same ablation and share of tokens.
            same = published[(published["method"] == family) & (published["variant"] == variant_of(run.name, family))]
            same = same[same["retention"].isna() | (same["retention"] == chosen.get("retention"))].set_index("quantity")
            row |= {"paper accuracy": same["value"].get("accuracy"), "paper RTR": same["value"].get("rtr")}
            row["doubt"] = "; ".join(dict.fromkeys(d for d in same.loc[same.index.isin(["accuracy", "rtr"]), "doubt"] if d))
            rows.append(row)
    if not rows:
        return None
    printed_rows = []
    paper = "paper, 7B on its six tasks"
    for r in rows:
        text = {("", "method"): name[r["method"]], ("", "run"): r["method"], ("", "settings"): r["settings"]}
        text |= {("", "accuracy"): number(r["accuracy"], 1), ("", "95 %"): span(r["low"], r["high"])}
        text |= {("", "RTR"): number(r["RTR"], 2), ("", "call rate"): number(r["call rate"], 2)}
        text[paper, "accuracy"] = number(r["paper accuracy"], 2) + ("†" if r["doubt"] else "")
        text[paper, "RTR"] = number(r["paper RTR"], 2)
        printed_rows.append(text)
    note = "The paper's column is another model on other tasks unless this table is of its six: compare directions, not values. † doubted, see the CSV."
    return Table("ablations", f"Ablations: {names.suite(frame)}", pd.DataFrame(rows), printed(printed_rows), [note])


def _settings(run: Run) -> dict:
    identity = run.about.get("identity") or {}
    return {
        **(identity.get("fields") or {}),
        **{k: v for k, v in identity.items() if k in ("pretrained", "weights", "seed", "policy", "pruner")},
    }


IDENTITY = ("pretrained", "weights", "min_pixels", "max_pixels", "dtype", "attn_implementation", "seed")


def provenance(runs: list[Run], frame: pd.DataFrame) -> Table:
    """What each run is made of: weights, limits, precision, machine, versions, commit, command. Unknown stays empty."""
    sizes = frame.groupby("method", observed=True)["batch_size"].agg(
        lambda s: "/".join(f"{b:g}" for b in sorted(s.dropna().unique()))
    )
    counts = frame.groupby("method", observed=True).size()
    rows, printed_rows = [], []
    for run in runs:
        about = run.about
        identity, versions, commit = about.get("identity") or {}, about.get("versions") or {}, about.get("commit") or {}
        machine = ", ".join(str(v) for v in (about.get("machine") or {}).values()) or None
        row: dict = {"method": run.name, "status": about.get("status"), "documents": int(counts[run.name])}
        row |= {"limit": (about.get("evaluation") or {}).get("limit"), "fields": _pairs(identity.get("fields") or {})}
        row |= {k: identity.get(k) for k in IDENTITY}
        row |= {"batch size": sizes[run.name] or None, "machine": machine}
        row |= {k: versions.get(k) for k in ("awares-bench", "lmms-eval", "torch", "transformers")}
        row |= {"commit": commit.get("head"), "uncommitted changes": commit.get("dirty")}
        row |= {"started": about.get("started"), "command": about.get("command")}
        rows.append(row)
        text = {"run": run.name, "status": row["status"], "settings": row["fields"]}
        text["weights"] = f"{row['pretrained']} {row['weights'] or ''}".strip()
        text["pixels"] = None if row["max_pixels"] is None else pixels(identity)
        text |= {"dtype": row["dtype"], "attention": row["attn_implementation"], "seed": row["seed"]}
        text |= {"batch": row["batch size"], "machine": machine}
        text |= {k: row[k] for k in ("lmms-eval", "transformers", "torch")}
        text["commit"] = f"{(row['commit'] or DASH)[:10]}{' + changes' if row['uncommitted changes'] else ''}"
        text["started"] = row["started"]
        printed_rows.append({("", k): DASH if v in (None, "", "None") else str(v) for k, v in text.items()})
    return Table("provenance", "Where the numbers come from", pd.DataFrame(rows), printed(printed_rows))


def pixels(identity: dict) -> str:
    """A run's processor limits: both numbers, and the set that they are, where the run says it."""
    name = f" (limits={identity['limits']})" if identity.get("limits") else ""
    return f"{identity['min_pixels']:,} to {identity['max_pixels']:,}{name}"


def _pairs(fields: dict) -> str:
    return ", ".join(f"{k}={v}" for k, v in fields.items())
