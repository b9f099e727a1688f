"""The gallery chooses by expression, escapes what it shows, and sets two methods side by side."""

import io

import pandas as pd
import pytest
from PIL import Image

from awares_bench.reports.data import discover, load
from awares_bench.reports.gallery import markup, select

from ..helpers.runs import DOCUMENTS, full, write_run


@pytest.fixture
def sweep(tmp_path):
    write_run(tmp_path, "awares", {"nano_doc": DOCUMENTS, "nano_chart": DOCUMENTS})
    write_run(tmp_path, "awares_full", {"nano_doc": full(), "nano_chart": full()}, {"method": "full"})
    data = io.BytesIO()
    Image.new("RGB", (224, 224), "white").save(data, "PNG")
    for task in ("nano_doc", "nano_chart"):
        rows = [{"image": {"bytes": data.getvalue()}, "question": f"question {i}?"} for i in range(4)]
        pd.DataFrame(rows).to_parquet(tmp_path / f"{task}.parquet")
    return tmp_path


def test_a_run_is_shown_with_views_calls_crops_and_costs(sweep):
    out = sweep / "g.html"
    assert select.write(str(sweep / "runs" / "awares"), out, images=sweep) == 8
    page = out.read_text()
    assert page.count("<article") == 8 and page.count("GET_CROPS: [&#x27;3&#x27;]") == 4
    assert (
        "half-size view, enlarged" in page and "where it looked" in page and "16 visual, 10 text, 2 output tokens; 30 ms" in page
    )
    assert 'data-task="nano_chart" data-right="wrong" data-called="called"' in page and "http" not in page


def test_where_chooses_documents(sweep):
    shown = lambda where: select.write(str(sweep / "runs" / "awares"), sweep / "g.html", where, images=sweep)  # noqa: E731
    assert shown("task=='nano_doc' and not correct") == 2
    assert shown("called and rtr < 1") == 2
    assert shown("crops in ['all', 'top-left'] or 0.9 < score <= 1") == 8


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("scor < 1", r"unknown option 'scor'. Did you mean 'score'"),
        ("__import__('os').system('true')", r"Call is not allowed|Attribute is not allowed"),
        ("@pd.DataFrame", r"is not an expression"),
        ("score.values", r"Attribute is not allowed"),
        ("score", r"not true or false for each document"),
        ("task > 3", r"cannot be evaluated"),
        ("score > 2", r"no document of awares is left where score > 2"),
        ("task ==", r"is not an expression"),
    ],
)
def test_what_is_not_a_comparison_of_columns_is_refused(sweep, where, said):
    with pytest.raises(load.ReportError, match=said):
        select.write(str(sweep / "runs" / "awares"), sweep / "g.html", where, images=sweep)


def test_two_runs_stand_side_by_side_where_they_differ(sweep):
    count = select.write(
        str(sweep / "runs" / "awares"), sweep / "g.html", compare=str(sweep / "runs" / "awares_full"), images=sweep
    )
    page = (sweep / "g.html").read_text()
    assert count == 4 and page.count("<section>") == 8 and page.count('data-right="differs"') == 4 and "awares_full" in page
    count = select.write(
        str(sweep / "runs" / "awares"), sweep / "g.html", "other_rtr > rtr", str(sweep / "runs" / "awares_full"), sweep
    )
    assert count == 6


def test_text_is_escaped(sweep):
    path = sweep / "runs" / "awares" / "records.jsonl"
    path.write_text(path.read_text().replace('"replies": ["a"]', '"replies": ["<script>alert(1)</script>"]'))
    select.write(str(sweep / "runs" / "awares"), sweep / "g.html", images=sweep)
    page = (sweep / "g.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_pictures_of_another_suite_and_missing_ones_are_refused(sweep):
    frame = pd.read_parquet(sweep / "nano_doc.parquet").assign(question="something else?")
    frame.to_parquet(sweep / "nano_doc.parquet")
    with pytest.raises(load.ReportError, match=r"another suite; pass --images FOLDER"):
        select.write(str(sweep / "runs" / "awares"), sweep / "g.html", images=sweep)
    with pytest.raises(load.ReportError, match=r"not at hand .*pass --images FOLDER with nano_doc.parquet"):
        select.write(str(sweep / "runs" / "awares"), sweep / "g.html", "task == 'nano_doc'", images=sweep / "nowhere")


def test_a_folder_of_several_runs_asks_for_one(sweep):
    with pytest.raises(load.ReportError, match=r"holds 2 runs; name one: .*/runs/awares"):
        select.write(str(sweep), sweep / "g.html", images=sweep)


def test_a_dozen_holds_every_kind(tmp_path):
    write_run(tmp_path, "x", {"nano_doc": [(1.0, [16], []), (0.0, [16, 16], ["top-left"])] * 10})
    frame = discover.one(tmp_path).documents
    chosen = markup.choose(frame)
    assert len(chosen) == 12 and set(chosen["called"]) == {True, False}
    assert len(markup.choose(frame[frame["score"] < 0.5])) == 10


def test_a_view_that_cannot_be_put_together_says_so():
    image = Image.new("RGB", (224, 224))
    row = {"family": "cropvlm", "score": 1.0, "rtr": 0.5, "called": True, "crops": "", "answer": "a", "task": "t", "doc_id": 0}
    texts = {
        "question": "q",
        "target": "a",
        "replies": ["b", "a"],
        "usage": [],
        "events": [],
        "image_sizes": [[[112, 112]], [[50, 30]]],
    }
    page = markup.card(image, [markup.Side("cropvlm", row, texts)])
    assert "a picture of 50×30 whose place is not recorded" in page and "tokens not known" in page
