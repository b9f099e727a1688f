"""The report's page: columns fold, rows filter, figures say how to read them, documents that one loses and the other wins are linked."""

import io
import json
import re

import pandas as pd
import pytest
from PIL import Image

from awares_bench import cli
from awares_bench.reports import page, report, site
from awares_bench.reports.data import discover, load
from awares_bench.reports.gallery import pairs

from ..helpers.runs import DOCUMENTS, full, low, write_run


@pytest.fixture
def sweep(tmp_path):
    tasks = ("nano_doc", "nano_chart")
    write_run(tmp_path, "awares", {t: DOCUMENTS for t in tasks}, {"method": "awares", "policy": "awares"})
    write_run(tmp_path, "awares_full", {t: full() for t in tasks}, {"method": "full", "policy": "full"})
    write_run(tmp_path, "awares_low", {t: low() for t in tasks}, {"method": "low", "policy": "low"})
    data = io.BytesIO()
    Image.new("RGB", (224, 224), "white").save(data, "PNG")
    for task in tasks:
        rows = [{"image": {"bytes": data.getvalue()}, "question": f"question {i}?"} for i in range(4)]
        pd.DataFrame(rows).to_parquet(tmp_path / f"{task}.parquet")
    return tmp_path


def test_the_page_folds_tasks_filters_rows_reads_figures_and_needs_no_network(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "FITS", 8)  # as if the table were of six tasks
    monkeypatch.setattr(report, "_save", lambda name, data, figure, out, formats: (out / f"{name}.svg").write_text("<svg/>"))
    out = tmp_path / "out"
    report.write([sweep], out, formats=("svg",), gallery=5, images=sweep)
    text = (out / "index.html").read_text()
    assert not re.search(r'(src|href)="(https?:)?//', text) and "@import" not in text and "prefers-color-scheme:dark" in text
    table = text.split('<section class="table">')[1]
    folds = re.findall(r'<input type="checkbox" data-group="([^"]+)"( checked)?>', table.split("<table>")[0])
    assert dict(folds)["nano doc"] == dict(folds)["nano chart"] == "" and dict(folds)["mean"] == " checked"
    assert text.count("<figure>") >= 7 and all(len(c) > 40 for c in re.findall(r"<figcaption>(.*?)<a", text))
    assert "on one scale" in text and "columns:2" in text  # how to read the latencies; figures two a row
    link = re.search(r'<a href="(gallery/awares--awares_full.html)#outcome=lost&task=nano_doc">2</a>', text)
    assert link and re.search(r"<td>full resolution</td>", text)
    gallery = (out / link[1]).read_text()
    assert (
        gallery.count('data-outcome="lost"') == 4
        and "the first is wrong, the second right" in gallery
        and "location.hash" in gallery
    )
    assert "AwaRes (awares)" in gallery


def test_pairs_are_of_awares_and_the_best_run_of_each_other_family_and_count_by_hand(sweep):
    write_run(
        sweep,
        "visionzip-0.25",
        {t: low() for t in ("nano_doc", "nano_chart")},
        {"method": "visionzip", "fields": {"retention": 0.25}},
    )
    write_run(
        sweep,
        "visionzip-0.5",
        {t: full() for t in ("nano_doc", "nano_chart")},
        {"method": "visionzip", "fields": {"retention": 0.5}},
    )
    runs, _ = discover.runs([sweep])
    frame = discover.together(runs)
    assert set(pairs.chosen(frame)) == {("awares", "awares_full"), ("awares", "awares_low"), ("awares", "visionzip-0.5")}
    counts = pairs.outcomes(
        frame, "awares", "awares_low"
    )  # awares: right, wrong (0.5), wrong, right; low: wrong, right, wrong, right
    assert counts.loc["nano_doc"].to_dict() == {"lost": 1, "won": 1, "both right": 1, "both wrong": 1}
    section = pairs.section(frame, {})
    assert "<a " not in section and "--gallery" in section


def test_galleries_without_texts_or_with_a_negative_number_are_refused(sweep, tmp_path):
    report.write([sweep], tmp_path / "a", formats=(), compact=tmp_path / "compact")
    with pytest.raises(load.ReportError, match="compact records hold no texts"):
        report.write([tmp_path / "compact"], tmp_path / "b", formats=(), gallery=3)
    with pytest.raises(load.ReportError, match="--gallery is -1; it is a number of documents"):
        report.write([sweep], tmp_path / "c", formats=(), gallery=-1)


def test_cells_are_escaped_and_lists_of_values_are_given():
    table = pd.DataFrame([{"a": "<b>", "kind": "x"}, {"a": "2", "kind": "y"}])
    text = page.interactive(table, choices=("kind",))
    assert (
        "<td>&lt;b&gt;</td>" in text
        and '<select data-column="1"><option value="">all</option><option>x</option><option>y</option>' in text
    )
    assert "<td><b></td>" in page.interactive(table, escape=False)


def test_the_leaderboard_has_runs_and_published_numbers_each_with_its_source(sweep, tmp_path, capsys):
    assert cli.main(["report", str(sweep), "--site", str(tmp_path / "site")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "site" / "index.html")
    text = (tmp_path / "site" / "index.html").read_text()
    told = (tmp_path / "site" / "provenance.html").read_text()
    for name in ("awares", "awares_full", "awares_low"):
        anchor = f"{sweep.name}/{name}"
        assert f'<a href="provenance.html#{anchor}">' in text and f'<h2 id="{anchor}">' in told
    assert "3,136 to 12,845,056 px" in text and ">nano<" in text and "0.76 to 1.00" in text and "0.51 to 0.75" in text
    assert (
        "<td>run here</td>" in text
        and "<td>published</td>" in text
        and "https://arxiv.org/abs/" in text
        and "not comparable" in text
    )
    rows = re.findall(r"<tr>.*?</tr>", text, re.S)
    published = [r for r in rows if "<td>published</td>" in r]
    assert published and all("<td>Qwen2.5-VL-7B</td>" in r and "<td>not said</td>" in r for r in published)
    assert json.loads(re.search(r"<pre>(.*?)</pre>", told, re.S)[1].replace("&quot;", '"'))["identity"]["pretrained"] == "nano"
    for choice in site.CHOICES:
        assert f"<span>{choice} <select" in text


def test_budgets_are_told_by_their_upper_ends():
    assert [site._budget(r) for r in (0.25, 0.5, 0.51, 1.0, 1.25, None, float("nan"))] == [
        "at most 0.25", "0.26 to 0.50", "0.51 to 0.75", "0.76 to 1.00", "above 1", "not known", "not known",
    ]  # fmt: skip


def test_without_runs_the_committed_records_are_shown_or_their_absence_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "COMMITTED", tmp_path)
    with pytest.raises(load.ReportError, match="no committed records are at hand"):
        site.write([], tmp_path / "out")
