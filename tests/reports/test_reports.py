"""Every number in a table equals a hand computation from raw records; a rebuild gives the same bytes."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test

from awares_bench import cli
from awares_bench.models.flops import decoder_flops, vision_flops
from awares_bench.models.limits import NAMES as LIMITS
from awares_bench.reports import report
from awares_bench.reports.data import compact, discover, flops, published, stats, summary
from awares_bench.reports.data.load import ReportError
from awares_bench.reports.tables import details, main, render

from ..helpers.runs import DOCUMENTS, full, low, write_run


@pytest.fixture
def three(tmp_path):
    """full, low and awares on two tasks of four documents."""
    write_run(tmp_path, "awares_full", {"nano_doc": full(), "nano_chart": full()}, {"method": "full"})
    write_run(tmp_path, "awares_low", {"nano_doc": low(), "nano_chart": low()}, {"method": "low"})
    write_run(tmp_path, "awares", {"nano_doc": DOCUMENTS, "nano_chart": DOCUMENTS[::-1]})
    return tmp_path


def framed(path) -> tuple[list, pd.DataFrame]:
    runs, _ = discover.runs([path])
    return runs, discover.together(runs)


def test_the_summary_is_the_hand_computation(three):
    _, frame = framed(three)
    cell = summary.summary(frame)["awares"]["nano_doc"]
    assert cell == {
        "accuracy": 0.625,
        "rtr": (0.25 + 0.5 + 1.25 + 0.25) / 4,
        "documents": 4,
        "call_rate": 0.5,
        "malformed_rate": 0.0,
    }
    assert summary.summary(frame)["awares"]["mean"] == cell | {"documents": 8}


def test_the_mean_is_over_tasks_not_documents_and_null_without_all_of_them():
    rows = [("m", "a", 1.0, 0.25)] * 3 + [("m", "b", 0.0, 1.0), ("n", "a", 1.0, 1.0)]
    frame = pd.DataFrame(
        [{"method": m, "task": t, "score": s, "rtr": r, "called": False, "malformed": False} for m, t, s, r in rows]
    )
    found = summary.summary(frame)
    mean = found["m"]["mean"]
    assert (mean["accuracy"], mean["rtr"], mean["documents"], mean["malformed_rate"]) == (0.5, 0.625, 4, None)
    assert found["n"]["mean"]["accuracy"] is None and found["n"]["mean"]["documents"] == 1


def test_the_main_table_holds_percents_ratios_and_paired_differences(three):
    _, frame = framed(three)
    row = main.accuracy(frame, published.cells(*framed(three))).numbers.set_index("method").loc["awares"]
    assert row[["nano_doc acc", "nano_doc RTR", "mean acc", "mean RTR"]].tolist() == [62.5, 0.5625, 62.5, 0.5625]
    assert row["vs awares_full difference"] == -37.5 and "paper acc" not in row
    printed = main.accuracy(frame, published.cells(*framed(three))).printed
    assert printed.iloc[0].tolist()[:3] == ["full resolution", "100.0", "1.00"]
    assert printed[("against AwaRes", "points")].tolist() == ["+37.5", "−12.5", "–"]


def test_the_cost_table_adds_turns_and_takes_both_ratios(three):
    runs, frame = framed(three)
    row = main.cost(runs, frame).numbers.set_index("method").loc["awares"]
    tokens = (16 + 32 + 80 + 16) / 4
    assert (row["encoded"], row["prefill"], row["text"], row["output"]) == (tokens, tokens, 15, 3)
    assert row["ratio of sums"] == tokens / 64 and row["RTR"] == 0.5625
    assert row["RTR nominal"] == pytest.approx(0.25 + (0.25 + 1) / 4)
    assert row["seconds"] == pytest.approx(0.045) and row["seconds after turn 1"] == pytest.approx(0.015)
    assert (row["seconds q25"], row["seconds median"]) == (pytest.approx(0.03), pytest.approx(0.045))
    assert row["encode_seconds"] == pytest.approx(0.015) and row["preprocess_seconds"] == 0


def test_flops_of_one_token_are_counted_by_hand():
    vision = {"hidden_size": 8, "intermediate_size": 16, "depth": 2, "in_channels": 3, "temporal_patch_size": 2, "patch_size": 14}
    vision |= {"window_size": 112, "fullatt_block_indexes": [1], "out_hidden_size": 4}
    patches = 4
    embed = patches * 2 * (3 * 2 * 14 * 14) * 8
    blocks = patches * 2 * 2 * (4 * 64 + 3 * 8 * 16) + patches * 4 * 8 * (4 + 4)  # both kinds of attention see four patches
    merger = 2 * (32 * 32 + 32 * 4)
    assert vision_flops(np.array([1.0]), vision)[0] == embed + blocks + merger
    text = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "vocab_size": 10,
    }
    linear = 2 * (8 * 8 + 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16)
    assert decoder_flops(np.array([5.0]), text, scored=np.array([2.0]))[0] == 3 * 5 * (linear + 4 * 8 * 2.5) + 2 * 2 * 8 * 10


def test_flops_of_a_published_checkpoint_are_counted_and_those_of_another_family_are_missing():
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14, "window_size": 112, "in_chans": 3}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584}  # as released: no in_channels
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    text |= {"num_hidden_layers": 28, "vocab_size": 152064}
    shapes = flops.shapes({"model_config": {"vision_config": vision, **text}})
    assert set(shapes["text_config"]) == set(text) and set(shapes["vision_config"]) == set(vision) - {"in_chans"}
    document = {"encoded": 1200, "later_encoded": 300, "prefill": 1200, "text": 60, "output": 20, "turns": 2}
    weights = 1280 * 6.5e9 + 4800 * 0.63e9  # every token meets the decoder's, every patch the tower's; attention is small beside
    assert flops.of_documents(pd.DataFrame([document]), shapes)[0] == pytest.approx(2 * weights, rel=0.05)
    assert flops.shapes({"model_config": {"vision_config": {"depth": 27, "hidden_size": 1152}, "text_config": text}}) is None
    assert flops.shapes({"identity": {"pretrained": "no/such"}}) is flops.shapes({}) is None
    wide = {**text, "head_dim": 256}  # twice hidden_size / heads: wider attention, and the same everything else
    assert decoder_flops(1, wide) - decoder_flops(1, text) == 28 * (2 * (2 * 3584 * 3584 + 2 * 3584 * 512) + 4 * 3584 / 2)


def test_a_pair_of_differences_is_tested_as_mcnemar_would():
    """n discordant pairs that all favour one side: the exact two-sided p is 2 * 0.5**n."""
    n = 6
    rows = [{"method": m, "task": "t", "doc_id": i, "score": float(m == "a" or i >= n)} for m in "ab" for i in range(40)]
    row = stats.compare(pd.DataFrame(rows), "b").set_index(["method", "task"]).loc["a", "mean"]
    assert row["difference"] == pytest.approx(n / 40)
    assert row["p"] == pytest.approx(2 * 0.5**n, abs=4 * math.sqrt(2 * 0.5**n / stats.FLIPS))
    assert row["variance"] == pytest.approx(np.var([1.0] * n + [0.0] * 34, ddof=1))


def test_p_values_are_scipys_exact_ones():
    rng = np.random.default_rng(3)
    tasks = {task: rng.integers(-2, 4, n) / 3 for task, n in (("s", 12), ("t", 10))}
    frame = pd.DataFrame(
        {"method": m, "task": task, "doc_id": i, "score": d if m == "a" else 0.0}
        for task, differences in tasks.items() for i, d in enumerate(differences) for m in "ab"
    )  # fmt: skip
    rows = stats.compare(frame, "b").set_index("task")
    for task, d in tasks.items():
        exact = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert 0.01 < exact < 1 and rows.loc[task, "p"] == pytest.approx(exact, abs=4 * math.sqrt(exact / stats.FLIPS))


def test_the_interval_of_a_difference_is_narrower_when_paired():
    rng = np.random.default_rng(1)
    hard = rng.random(400)
    rows = [
        {"method": m, "task": "t", "doc_id": i, "score": float(hard[i] < bar)}
        for m, bar in (("a", 0.55), ("b", 0.5))
        for i in range(400)
    ]
    row = stats.compare(pd.DataFrame(rows), "b").iloc[0]
    deviation = np.std((hard < 0.55) * 1.0 - (hard < 0.5) * 1.0) / 20
    assert row["low"] == pytest.approx(row["difference"] - 1.96 * deviation, abs=0.004)
    assert row["high"] - row["low"] < 0.5 * 4 * math.sqrt(0.25 / 400)


def test_the_interval_covers_the_mean_of_a_known_sample_and_ignores_the_company():
    rows = [{"method": "m", "task": "t", "doc_id": i, "score": float(i % 2)} for i in range(400)]
    alone = stats.intervals(pd.DataFrame(rows)).set_index(["method", "task"]).loc["m", "mean"]
    assert 0.44 < alone["low"] < 0.46 and 0.54 < alone["high"] < 0.56  # 0.5 ± 1.96 * 0.5 / 20
    more = rows + [r | {"method": "other", "score": 1.0} for r in rows]
    assert stats.intervals(pd.DataFrame(more)).set_index(["method", "task"]).loc["m", "mean"].tolist() == alone.tolist()


def test_holm_and_documents_needed_are_the_textbook():
    assert stats.holm(np.array([0.01, 0.04, np.nan, 0.03])).tolist() == [0.03, 0.06, pytest.approx(np.nan, nan_ok=True), 0.06]
    assert stats.documents_needed(0.1, 0.25) == math.ceil((1.959964 + 0.841621) ** 2 * 0.25 / 0.01)
    assert stats.documents_needed(0.0, 0.25) == math.inf and math.isnan(stats.documents_needed(float("nan"), 0.25))


def test_a_gap_narrower_than_its_interval_is_warned_of():
    rows = [{"method": m, "task": "t", "doc_id": i, "score": float((i + (m == "a")) % 3 > 0)} for m in "ab" for i in range(50)]
    compared = stats.compare(pd.DataFrame(rows), "b")
    (said,) = stats.warnings(compared, "b")
    assert "a against b" in said and "wider than the gap" in said and "documents a task" in said
    assert not stats.warnings(compared.assign(low=0.01), "b")


def test_decisions_are_counted_against_what_full_resolution_gains(three):
    _, frame = framed(three)
    row = details.decisions(frame).set_index("method").loc["awares"]
    # half size is wrong on documents 0 and 2 of each task; awares calls on 1 and 2 of both orders
    assert (row["needed"], row["call_rate"], row["precision"], row["recall"], row["f1"], row["fpr"]) == (
        0.5,
        0.5,
        0.5,
        0.5,
        0.5,
        0.5,
    )
    assert (row["area"], row["all"], row["one"], row["direct"]) == (0.625, 0.25, 0.25, 0.5)


def test_the_paper_stands_beside_ours_with_its_doubts(tmp_path):
    write_run(
        tmp_path,
        "sparsevlm-0.5",
        {"docvqa_val": full()},
        {"method": "sparsevlm", "fields": {"retention": 0.5}, "pretrained": "q"},
    )
    runs, frame = framed(tmp_path)
    rows = main.against_paper(frame, published.cells(runs, frame)).numbers.set_index("quantity")
    assert (
        rows.at["accuracy", "paper"] == 83.6
        and rows.at["accuracy", "ours"] == 100
        and rows.at["accuracy", "ours - paper"] == pytest.approx(16.4)
    )
    assert "MMVet" in rows.at["accuracy", "doubt"] and rows.at["rtr", "paper"] == 0.5
    assert "mean" not in set(rows["task"])  # five tasks are missing


def test_published_averages_are_the_means_of_their_cells():
    cells = pd.concat(map(published.numbers, published.papers())).query("quantity == 'accuracy'")
    for (source, method, keep, variant), own in cells.groupby(["source", "method", "retention", "variant"], dropna=False):
        tasks = own[own["task"] != "mean"]["value"]
        if len(tasks) == 6:
            mean = own[own["task"] == "mean"]["value"].iloc[0]
            assert mean == pytest.approx(tasks.mean(), abs=0.06), (source, method, keep, variant)


def test_the_share_kept_that_angelslim_prints_is_the_mean_of_its_cells():
    cells = published.numbers("angelslim")
    full = cells[cells["method"] == "full"].set_index("task")["value"]
    for key, own in cells.groupby(["method", "variant", "retention"]):
        values = own.set_index("task")["value"]
        shares = [values[t] / full[t] for t in full.index if t != "mean"]
        assert len(shares) == 11 and values["mean"] == pytest.approx(100 * sum(shares) / 11, abs=0.02), key
    assert set(cells["limits"]) == {"angelslim"}
    assert set(pd.concat(map(published.numbers, published.papers()))["limits"]) <= {"", *LIMITS}


def test_whichever_table_is_asked_for_stands_beside_ours(tmp_path):
    write_run(tmp_path, "full", {"docvqa_val": full()}, {"method": "full", "pretrained": "q"})
    write_run(
        tmp_path, "divprune-0.25", {"docvqa_val": low()}, {"method": "divprune", "fields": {"retention": 0.25}, "pretrained": "q"}
    )
    runs, frame = framed(tmp_path)
    rows = main.against_paper(frame, published.cells(runs, frame, "angelslim")).numbers.set_index("method")
    assert rows.at["divprune-0.25", "paper"] == 85.32 and rows.at["full", "paper"] == 94.90
    assert (
        rows.at["divprune-0.25", "limits"] == "angelslim" and main._kept(summary.summary(frame), "divprune-0.25", "full") == 50.0
    )
    assert len(published.cells(runs, frame)) == 2 and published.papers()[:4] == ["awares", "angelslim", "adaptvision", "ergo"]
    with pytest.raises(
        ReportError, match="no published table 'visionzip'; known: awares, angelslim, adaptvision, ergo, uniprune"
    ):
        published.numbers("visionzip")
    about = {"identity": {"fields": {"cap": 640}}}
    assert published.variant_of("ergo", "ergo", about, "ergo") == "cap=640" and published.variant_of("ergo", "ergo") == ""
    assert published.variant_of("awares-sft", "awares") == "sft"


def test_nothing_published_is_set_beside_nano(three):
    assert published.cells(*framed(three)).empty
    assert main.against_paper(framed(three)[1], published.cells(*framed(three))) is None


def test_ablations_name_what_differs_and_the_papers_variant(three):
    write_run(
        three,
        "awares-sft",
        {"nano_doc": low(), "nano_chart": low()},
        {"method": "awares", "pretrained": "nano-sft", "weights": "w2"},
    )
    rows = details.ablations(*framed(three)).numbers.set_index("method")
    assert rows.at["awares-sft", "settings"] == "pretrained=nano-sft, weights=w2"
    assert rows.at["awares-sft", "paper accuracy"] == 79.70 and rows.at["awares", "paper accuracy"] == 80.30
    assert rows.at["awares-sft", "accuracy"] == 50


def test_a_foreign_model_has_a_score_and_no_invented_tokens(three):
    foreign = three / "elsewhere"
    shutil.copytree(three / "lmms" / "awares_full", foreign / "qwen")
    runs, _ = discover.runs([three, f"qwen2_5_vl={foreign / 'qwen'}"])
    frame = discover.together(runs)
    cell = summary.summary(frame)["qwen2_5_vl"]["mean"]
    assert (cell["accuracy"], cell["rtr"], cell["call_rate"]) == (1.0, None, 0.0)
    row = main.cost(runs, frame).printed.set_index(("", "method")).loc["qwen2 5 vl"]
    assert row["tokens", "prefill"] == "–" and row["milliseconds", "mean"] == "–"


def test_what_records_newly_hold_is_reported_and_what_they_lack_is_a_dash(three):
    path = three / "runs" / "awares" / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for usage in line["usage"]:
            usage |= {"auxiliary": {"encoded": 5}, "peak_memory_bytes": 2**21}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = main.cost(*framed(three))
    row = table.numbers.set_index("method").loc["awares"]
    assert row["auxiliary_encoded"] == 7.5 and row["peak_memory_bytes"] == 2**21
    printed = table.printed.set_index(("", "method"))
    assert printed.loc["AwaRes", ("", "peak memory (MiB)")] == "2" and printed.loc["half size", ("", "peak memory (MiB)")] == "–"


def test_the_report_is_rebuilt_to_the_byte_from_runs_and_from_compact_records(three, tmp_path):
    first, again = tmp_path / "a", tmp_path / "b"
    report.write([three], first, compact=first / "records", formats=("svg",))
    report.write([first / "records"], again, compact=again / "records", formats=("svg",))
    made = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert {
        "index.html",
        "table.csv",
        "table.md",
        "table.tex",
        "cost.csv",
        "accuracy_rtr.svg",
        "accuracy_rtr.csv",
        "summary.json",
    } <= set(map(str, made))
    for path in made:
        assert (first / path).read_bytes() == (again / path).read_bytes(), path


def test_compact_records_name_no_folder_of_the_machine(three, tmp_path):
    told = json.loads((three / "runs" / "awares" / "run.json").read_text())
    told |= {"command": "awares-bench run --out /data/me/x,output_dir=/data/me/y"}
    told["identity"]["pretrained"] = "/data/me/model"
    (three / "runs" / "awares" / "run.json").write_text(json.dumps(told))
    compact.write(discover.runs([three])[0], tmp_path / "small")
    about = compact.read(tmp_path / "small")[0].about
    assert about["command"] == "awares-bench run --out …/x,output_dir=…/y" and about["identity"]["pretrained"] == "…/model"
    assert str(tmp_path) not in (tmp_path / "small" / compact.RUNS).read_text()


def test_compact_records_keep_names_and_every_number(three, tmp_path):
    write_run(three, "cell-7", {"nano_doc": low(), "nano_chart": low()}, {"method": "visionzip", "fields": {"retention": 0.5}})
    compact.write(discover.runs([three])[0], tmp_path / "small")
    before, after = framed(three)[1].drop(columns="answer"), framed(tmp_path / "small")[1].drop(columns="answer")
    assert "VisionZip 50 %" in set(after["label"])
    pd.testing.assert_frame_equal(before, after[before.columns], check_dtype=False, check_categorical=False)


def test_one_method_alone_is_reported(tmp_path):
    write_run(tmp_path, "awares", {"nano_doc": DOCUMENTS})
    _, frame, said = report.write([tmp_path], tmp_path / "out", formats=("png",))
    assert len(frame) == 4 and "nano" in said[0].lower()
    assert "low wrong" in (tmp_path / "out" / "index.html").read_text()  # named as not drawn


def test_latex_and_markdown_escape_and_group():
    printed = pd.DataFrame(
        [["a_b", "50 %", "–"]], columns=pd.MultiIndex.from_tuples([("", "method"), ("x & y", "acc"), ("x & y", "RTR")])
    )
    tex = render.latex(printed, "100 %", "t", ["<0.1"])
    assert (
        r"a\_b & 50 \% & -- \\" in tex
        and r"\multicolumn{2}{c}{x \& y}" in tex
        and r"\cmidrule(lr){2-3}" in tex
        and "$<$0.1" in tex
    )
    assert render.markdown(printed).splitlines()[0] == "| method | x & y acc | x & y RTR |"
    assert "<td>50 %</td>" in render.to_html(printed) and 'colspan="2">x &amp; y' in render.to_html(printed)


def test_the_command_writes_a_report_and_refuses_with_a_sentence(three, tmp_path, capsys):
    out = tmp_path / "r"
    assert cli.main(["report", str(three), "--out", str(out), "--formats", "png", "--records", str(out / "records")]) == 0
    assert (out / "index.html").exists() and "| AwaRes |" in capsys.readouterr().out
    assert cli.main(["report"]) == 1
    assert cli.main(["report", str(tmp_path / "nothing")]) == 1
    assert "nothing does not exist" in capsys.readouterr().err


def test_the_committed_nano_records_can_be_read():
    folder = Path(__file__).parents[2] / "reports" / "published" / "nano" / "records"
    _, frame = framed(folder)
    found = summary.summary(frame)
    assert 0.9 < found["full"]["mean"]["accuracy"] <= 1 and found["full"]["mean"]["rtr"] == 1


@pytest.mark.parametrize("paper", ["uniprunebench", "uniprunebench_internvl3"])
def test_the_means_of_uniprunebench_are_those_of_its_columns_or_carry_a_doubt(paper):
    cells = published.numbers(paper).fillna({"retention": 1.0})
    tasks, means = cells[cells["task"] != "mean"], cells[cells["task"] == "mean"].set_index(["method", "retention"]).sort_index()
    own = tasks.groupby(["method", "retention"])["value"].mean()
    assert list(own.index) == list(means.index) and len(tasks) == len(own) * tasks["task"].nunique()
    far = (own - means["value"]).abs() > 0.06
    assert (means["doubt"].str.contains("own mean") == far).all() and far.sum() <= 3
