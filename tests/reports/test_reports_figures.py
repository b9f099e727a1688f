"""The axes of every figure hold the data; methods keep colour and marker; labels do not cover one another."""

import json

import pandas as pd
import pytest
from matplotlib.colors import to_hex

from awares_bench.methods import registry
from awares_bench.reports.data import discover, load, names
from awares_bench.reports.plots import (
    accuracy_rtr,
    accuracy_seconds,
    accuracy_tasks,
    calibration,
    crop_selection,
    hard_documents,
    latency,
    learning_curves,
    rtr_distribution,
    scatter,
    style,
)

from ..helpers.runs import DOCUMENTS, full, low, write_run


@pytest.fixture
def frame(tmp_path):
    write_run(tmp_path, "awares_full", {"nano_doc": full(), "nano_chart": full()}, {"method": "full"})
    write_run(tmp_path, "awares_low", {"nano_doc": low(), "nano_chart": low()}, {"method": "low"})
    write_run(tmp_path, "awares", {"nano_doc": DOCUMENTS, "nano_chart": DOCUMENTS})
    for keep in (0.25, 0.5):
        documents = [(float(i > 0), [int(64 * keep)], []) for i in range(4)]
        write_run(
            tmp_path,
            f"visionzip-{keep}",
            {"nano_doc": documents, "nano_chart": documents},
            {"method": "visionzip", "fields": {"retention": keep}},
        )
    return discover.together(discover.runs([tmp_path])[0])


def test_accuracy_and_ratio_are_on_the_axes(frame):
    points = accuracy_rtr.data(frame).set_index("method")
    assert points.loc["awares", ["rtr", "accuracy"]].tolist() == [0.5625, 0.625]
    assert points["front"].to_dict() == {
        "awares_full": True, "awares_low": False, "awares": False, "visionzip-0.25": True, "visionzip-0.5": False,
    }  # fmt: skip
    figure = accuracy_rtr.draw(points.reset_index(), "nano", notes=("a caveat",))
    axes = figure.axes[0]
    drawn = {c.get_label(): c.lines[0] for c in axes.containers}
    assert [v.tolist() for v in drawn["awares"].get_data()] == [[0.5625], [62.5]]
    assert [v.tolist() for v in drawn["visionzip"].get_data()] == [[0.25, 0.5], [75, 75]]
    assert to_hex(drawn["awares"].get_color()) == names.colour("awares") and drawn["awares"].get_marker() == names.marker(
        "awares"
    )
    assert "ratio" in axes.get_xlabel() and "%" in axes.get_ylabel()
    assert {t.get_text() for t in axes.texts} == {"full resolution", "half size", "AwaRes", "VisionZip"}
    assert any("a caveat" in t.get_text() for t in figure.texts)


def test_a_run_far_below_the_front_stands_at_the_edge_with_its_number_and_no_mark_is_clipped(frame):
    points = accuracy_rtr.data(frame)
    points.loc[points["method"] == "awares_low", ["accuracy", "low", "high"]] = 0.9, 0.88, 0.92
    points.loc[points["method"] == "awares", ["accuracy", "low", "high"]] = 0.95, 0.93, 0.97
    points.loc[points["family"] == "visionzip", ["accuracy", "low", "high"]] = 0.2, 0.1, 0.3
    points.loc[points["family"] == "visionzip", "front"] = False
    axes = accuracy_rtr.draw(points, "nano").axes[0]
    bottom, top = axes.get_ylim()
    assert 80 < bottom < 90 and top > 100 and max(axes.get_yticks()) <= 100
    at_edge = [line for line in axes.lines if len(line.get_ydata()) == 1 and line.get_ydata()[0] == bottom]
    assert sorted(float(line.get_xdata()[0]) for line in at_edge) == [0.25, 0.5] and not any(x.get_clip_on() for x in at_edge)
    assert [t.get_text() for t in axes.texts if "↓" in t.get_text()] == ["↓20", "↓20"]
    assert not any(c.lines[0].get_clip_on() for c in axes.containers) and "visionzip" not in {
        c.get_label() for c in axes.containers
    }


def test_a_run_without_a_picture_is_on_no_front():
    rows = [("a", "full", 1.0, 0.9), ("b", "low", 0.25, 0.8), ("c", "no_picture", 0.0, 0.3), ("d", "pooling", 0.5, 0.2)]
    table = scatter.with_front(pd.DataFrame(rows, columns=["method", "family", "cost", "accuracy"]))
    assert table["front"].tolist() == [True, True, False, False]


def test_every_task_has_a_panel_with_its_own_front(frame):
    table = accuracy_tasks.data(frame)
    assert set(table["task"]) == {"nano_doc", "nano_chart"} and len(table) == 10
    own = table[table["task"] == "nano_doc"].set_index("method")
    assert own.loc["awares", ["rtr", "accuracy"]].tolist() == [0.5625, 0.625] and not own.at["awares", "front"]
    figure = accuracy_tasks.draw(table, "nano")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["nano chart", "nano doc"]
    assert accuracy_tasks.data(frame[frame["task"] == "nano_doc"]).empty


def test_every_figure_says_what_it_shows_and_below_it_on_what(frame):
    log = pd.DataFrame([{"run": "a", "step": s, "kind": "loss", "series": "loss", "value": 1.0} for s in (1, 2)])
    made = {
        module: draw(module.data(frame))
        for module, draw in (
            (accuracy_rtr, lambda d: accuracy_rtr.draw(d, "the suite")),
            (accuracy_tasks, lambda d: accuracy_tasks.draw(d, "the suite")),
            (accuracy_seconds, lambda d: accuracy_seconds.draw(d, "the suite", "a machine")),
            (latency, lambda d: latency.draw(d, "the suite", "a machine")),
            (crop_selection, lambda d: crop_selection.draw(d, "the suite")),
            (rtr_distribution, lambda d: rtr_distribution.draw(d, "the suite")),
            (hard_documents, lambda d: hard_documents.draw(d, "the suite")),
            (calibration, lambda d: calibration.draw(d, "the suite")),
        )
    } | {learning_curves: learning_curves.draw(log, "the suite")}
    titles = [figure._suptitle.get_text().strip() for figure in made.values()]
    assert titles == [module.TITLE for module in made] and len(set(titles)) == len(titles)
    for module, figure in made.items():
        assert [t.get_text() for t in figure.texts].count("the suite") == 1
        assert module.READING.endswith(".")


def test_the_papers_points_are_hollow(frame):
    hollow = pd.DataFrame([{"label": "x", "family": "awares", "rtr": 0.36, "accuracy": 0.803}])
    axes = accuracy_rtr.draw(accuracy_rtr.data(frame), "t", hollow).axes[1]
    (line,) = [x for x in axes.lines if x.get_markerfacecolor() == "none"]
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (0.36, pytest.approx(80.3))


def test_seconds_are_on_the_axis_and_unknown_ones_leave_the_run_out(frame):
    points = accuracy_seconds.data(frame).set_index("method")
    assert points.at["awares", "seconds"] == pytest.approx(0.045) and len(points) == 5
    frame.loc[frame["method"] == "awares", "seconds"] = None
    assert "awares" not in set(accuracy_seconds.data(frame)["method"])


def test_latency_is_split_by_phase_and_turn(frame):
    table = latency.data(frame).set_index(["method", "phase", "turn"])["seconds"]
    assert table["awares", "encode", "first"] == pytest.approx(0.01) and table["awares", "encode", "later"] == pytest.approx(
        0.005
    )
    panels = {a.get_title(loc="left"): a for a in latency.draw(latency.data(frame), "t", "a machine").axes}
    assert list(panels) == ["prepare", "tower", "prefill", "decode"]
    longest = {name: max(p.get_x() + p.get_width() for p in axes.patches) for name, axes in panels.items()}
    assert longest == pytest.approx({"prepare": 0, "tower": 15, "prefill": 30, "decode": 0})
    assert "45" in [t.get_text() for t in panels["decode"].texts]  # the sum of all phases of AwaRes


def test_crop_shares_add_up(frame):
    table = crop_selection.data(frame)
    shares = table[table["method"] == "awares"].set_index("crop")["share"]
    assert (shares["direct"], shares["top-left"], shares["all"], shares.sum()) == (0.5, 0.25, 0.25, 1)
    assert set(table["method"]) == {"awares"}
    axes = crop_selection.draw(table, "t").axes[0]
    assert max(p.get_x() + p.get_width() for p in axes.patches) == pytest.approx(100)


def test_the_distribution_of_ratios_ends_at_one(frame):
    table = rtr_distribution.data(frame)
    own = table[(table["method"] == "awares") & (table["task"] == "nano_doc")]
    assert own["rtr"].tolist() == [0.25, 0.5, 1.25] and own["share"].tolist() == [0.5, 0.75, 1.0]
    assert set(table["method"]) == {"awares"}
    rtr_distribution.draw(table, "t")


def test_where_half_size_is_wrong_only_those_documents_count(frame):
    table = hard_documents.data(frame).set_index("method")
    assert table.loc["awares", ["accuracy", "documents"]].tolist() == [0.5, 4]  # documents 0 and 2 of each task: 1.0 and 0.0
    assert table.at["awares_full", "accuracy"] == 1 and "awares_low" not in table.index
    axes = hard_documents.draw(table.reset_index(), "t").axes[0]
    assert axes.get_yticklabels()[0].get_text() == "full resolution"
    assert hard_documents.data(frame[frame["method"] != "awares_low"]).empty


def test_calls_stand_against_need(frame):
    row = calibration.data(frame).set_index(["method", "task"]).loc["awares", "nano_doc"]
    assert row[["needed", "called", "called_needed", "called_not_needed"]].tolist() == [0.5, 0.5, 0.5, 0.5]
    lines = calibration.draw(calibration.data(frame), "t").axes[0].lines
    assert any(list(x.get_xdata()) == [50.0, 50.0] for x in lines)
    assert calibration.data(frame[frame["method"] != "awares_full"]).empty


def test_learning_curves_read_losses_means_and_groups(tmp_path):
    lines = [
        {"step": 10, "seconds": 1, "loss": 2.0, "part": 1.0},
        {"step": 10, "evaluation": {"full": {"a": 0.2, "mean": 0.4}, "low": {"a": 0.1, "b": 0.3}}},
    ]
    path = tmp_path / "sft" / "log.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo')
    table = learning_curves.data(learning_curves.read([path]))
    found = table.set_index(["kind", "series"])["value"].to_dict()
    assert found == {("loss", "loss"): 2.0, ("evaluation", "full"): 0.4, ("evaluation", "low"): pytest.approx(0.2)}
    assert set(table["run"]) == {"sft"}
    figure = learning_curves.draw(table, "t")
    assert len(figure.axes) == 2 and figure.axes[0].lines[0].get_ydata().tolist() == [2.0]
    path.write_text("nonsense\n" + json.dumps(lines[0]))
    with pytest.raises(load.ReportError, match="line 1 is not JSON"):
        learning_curves.read([path])


def test_labels_cover_neither_one_another_nor_a_mark():
    figure, axes = style.subplots(3)
    points = [(x, y, f"label {x} {y}", "black") for x in range(3) for y in range(3)]
    axes.plot([p[0] for p in points], [p[1] for p in points], "o")
    axes.margins(0.3)
    assert style.place_labels(axes, points) == []
    renderer = figure.canvas.get_renderer()
    boxes = [style.text_box(t, renderer) for t in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert style.place_labels(axes, [(1, 1, "x" * 200, "black")]) == ["x" * 200]


def test_two_hundred_methods_and_long_names_fit(tmp_path):
    rows = []
    for i in range(200):
        same = {
            "method": f"m{i}",
            "label": f"a method with a very long name, number {i}",
            "family": f"m{i}",
            "rtr": 0.1 + i / 200,
        }
        rows.append(same | {"accuracy": 0.5 + i / 500, "low": 0.4, "high": 1.0, "front": i % 40 == 0})
    figure = accuracy_rtr.draw(pd.DataFrame(rows), "nano")
    style.save(figure, tmp_path / "x.png")
    assert len(figure.axes[0].containers) == 200 and any("200 runs" in t.get_text() for t in figure.texts)
    assert names.short("a method with a very long name, number 7").endswith("number 7") and len(names.short("x" * 99)) == 26


def test_known_methods_look_different_and_unknown_ones_look_the_same_twice():
    assert set(registry.own_names()) <= set(names.METHODS)  # none stands raw in print
    looks = [(names.colour(f), names.marker(f)) for f in names.METHODS]
    assert len(set(looks)) == len(looks)
    assert (names.colour("mine"), names.marker("mine")) == (names.colour("mine"), names.marker("mine"))
    assert names.family("x", {"method": "visionzip", "policy": "awares", "pruner": "visionzip"}) == "awares+visionzip"
    both = {"method": "awares", "policy": "awares", "pruner": "visionzip", "fields": {"retention": 0.5}}
    assert names.label("x", both, "awares+visionzip retention=0.5 prompt=adapter") == "AwaRes + VisionZip prompt=adapter 50 %"
    assert names.label("x", both, "my own words") == "my own words"
    assert names.label("x", {"method": "awares", "policy": "awares", "pruner": None}, "awares_sft") == "AwaRes, SFT"
    assert [names.readable(n) for n in ("visionthink_grpo", "all_crops", "awares-light", "my_run", "mine", "awares_full")] == [
        "VisionThink, GRPO", "all crops", "AwaRes, light", "my run", "mine", "full resolution",
    ]  # fmt: skip
    assert names.family("x", {"method": "mine.py:Mine", "policy": "mine.py:Mine", "pruner": None}) == "Mine"
    assert names.label("visionzip-0.5", {"method": "visionzip", "fields": {"retention": 0.5}}) == "VisionZip 50 %"


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_a_figure_is_saved_twice_to_the_same_bytes_and_embeds_its_fonts(frame, tmp_path, kind):
    for name in ("a", "b"):
        style.save(accuracy_rtr.draw(accuracy_rtr.data(frame), "nano"), tmp_path / f"{name}.{kind}")
    saved = (tmp_path / f"a.{kind}").read_bytes()
    assert saved == (tmp_path / f"b.{kind}").read_bytes()
    if kind == "pdf":
        assert b"FontFile2" in saved and b"/Type3" not in saved
