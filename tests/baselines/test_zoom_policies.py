"""AdaptVision, ERGO and the zoom loops: hostile replies have stated outcomes, views are capped, many turns share one cache."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from awares_bench.baselines import zoom_loop
from awares_bench.baselines.zoom_styles.mini_o3 import within_pixels
from awares_bench.inference.engine import Engine, Job, Scripted
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Failure, Sample
from awares_bench.methods.registry import build, method_class
from awares_bench.methods.tool_calls import enclosing

from ..helpers.tiny import chunk_ids, picture, pixels, tiny_vlm
from ..test_policy_golden import Played

STYLES = tuple(zoom_loop.STYLES)
POLICIES = [("adaptvision", {}), ("ergo", {}), *(("zoom_loop", {"style": style}) for style in STYLES)]
LABELS = [options.get("style", name) for name, options in POLICIES]
EACH = pytest.mark.parametrize(("name", "options"), POLICIES, ids=LABELS)


def call(style: str, box: str, extra: str = "") -> str:
    """A call as the style writes it, whatever stands in the place of the box."""
    if style == "mini-o3":
        return f'<grounding>{{"bbox_2d": {box}, "source": "original_image"{extra}}}</grounding>'
    if style == "ergo":
        return f"<zoom>{box}</zoom>"
    tool = {"adaptvision": "request_local_region", "pixel-reasoner": "crop_image_normalized"}.get(style, "image_zoom_in_tool")
    target = ', "target_image": 1' if style == "pixel-reasoner" else ""
    return f'<tool_call>{{"name": "{tool}", "arguments": {{"bbox_2d": {box}{target}{extra}}}}}</tool_call>'


GOOD = {"mini-o3": "[0.1, 0.2, 0.5, 0.6]", "pixel-reasoner": "[0.1, 0.2, 0.5, 0.6]"}
FINAL = {"pixel-reasoner": "\\boxed{42}"}


def label(name, options):
    return options.get("style", name)


def play(name, options, replies, images=1, size=(448, 336)):
    return Played(method_class(name)(**options), [picture(*size, seed) for seed in range(images)], replies)


@EACH
def test_a_call_is_answered_with_the_crop_and_its_place(name, options):
    style = label(name, options)
    t = play(name, options, [call(style, GOOD.get(style, "[40, 60, 200, 160]")), FINAL.get(style, "<answer>42</answer>")])
    assert t.answer == "42" and not t.events and len(t.turns) == 2 and t.outcome.tokens == ()
    ((left, top, right, bottom),) = t.turns[1].boxes
    assert 0 <= left < right <= 448 and 0 <= top < bottom <= 336 and len(t.turns[1].images) == 1
    assert all(turn.until == () and turn.min_reply_tokens > 4 for turn in t.turns)
    assert [turn.is_final for turn in t.turns] == [False, name != "zoom_loop"]


HOSTILE = {
    "code": "__import__('os').system('true')",
    "power": "[9**9**9, 0, 1, 1]",
    "infinity": "[0, 0, Infinity, 100]",
    "nan": "[NaN, 0, 100, 100]",
    "overflow": "[0, 0, 1e999, 1e999]",
    "far": "[-1e300, -1e300, 1e300, 1e300]",
    "digits": f"[{'9' * 5000}, 0, 100, 100]",
    "nested": "[" * 100_000,
    "null": "null",
    "object": '{"x1": 0}',
    "texts": '["a", "b", "c", "d"]',
    "booleans and null": "[true, null, 3, 4]",
    "three": "[1, 2, 3]",
    "six": "[1, 2, 3, 4, 5, 6]",
    "inverted": "[200, 160, 40, 60]",
    "point": "[40, 60, 40, 60]",
    "outside": "[90000, 90000, 99000, 99000]",
    "empty": "[]",
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("compat", ["corrected", "official"])
@EACH
def test_a_call_that_cannot_be_obeyed_is_an_event_and_the_document_goes_on(name, options, compat, hostile):
    style = label(name, options)
    replies = [call(style, HOSTILE[hostile]), FINAL.get(style, "<answer>42</answer>")]
    t = play(name, {**options, "compat": compat}, replies)
    if isinstance(t.outcome, Failure):  # the released ERGO leaves the document out, and so it says
        assert (name, compat) == ("ergo", "official") and "leaves such a document out" in t.outcome.error
        return
    if hostile == "six" and (style, compat) == ("pixel-reasoner", "official"):
        assert not t.events  # as released, further numbers are ignored
        return
    if style == "pixel-reasoner" and compat == "official" and hostile in ("point", "inverted"):
        assert t.answer == "42"  # as released, the margins make a region of it
        return
    assert t.kinds == ["malformed_box" if name == "ergo" else "malformed_call"], t.events
    assert len(t.events[0].detail) < 400 and t.answer in ("42", replies[0])
    assert t.answer == "42" or (style, compat) == ("deepeyes", "official")  # there the reply stands as the answer


SAID = {
    "deepeyes": "Error: ",
    "mini-o3": "ERROR occurs during grounding. Error Information: ",
    "pixel-reasoner": "\nExecution error:\n",
    "adaptvision": "All bounding box elements must be numeric",
}


@EACH
def test_the_model_is_told_what_was_wrong(name, options):
    style = label(name, options)
    t = play(name, options, [call(style, '["a", 1, 2, 3]'), "<answer>x</answer>"])
    if style in SAID:
        assert t.turns[1].text.startswith(SAID[style]) and not t.turns[1].images
    else:  # ERGO and Chain-of-Focus have no words for it: the picture is shown again
        assert t.turns[1].images[0].size == t.turns[0].images[0].size


@EACH
def test_an_unclosed_call_and_plain_words_are_answers(name, options):
    style = label(name, options)
    cut = call(style, GOOD.get(style, "[40, 60, 200, 160]")).rpartition("</")[0]
    for reply in ("plain words", "", cut):
        t = play(name, options, [reply, "<answer>42</answer>"])
        if style == "ergo":  # which always looks twice
            assert t.kinds == ["malformed_box"] and t.answer == "42"
        elif style == "chain-of-focus" and reply == cut:
            assert t.kinds == ["malformed_call"]
        else:
            assert len(t.turns) == 1 and t.answer == reply.strip() and not t.events


@EACH
def test_documents_without_a_picture_and_with_several(name, options):
    style = label(name, options)
    asked = call(style, GOOD.get(style, "[40, 60, 200, 160]"))
    t = play(name, options, [asked], images=0)
    assert t.kinds == ["no_image"] and len(t.turns) == 1
    t = play(name, options, [asked, FINAL.get(style, "<answer>42</answer>")], images=2)
    if name == "ergo":
        assert t.kinds == ["several_images"] and len(t.turns) == 1 and len(t.turns[0].images) == 2
    else:
        assert t.answer == "42" and [len(turn.images) for turn in t.turns] == [2, 1] and t.turns[1].boxes == ()


@pytest.mark.parametrize("style", STYLES)
def test_a_loop_that_never_answers_ends_at_the_limit_without_an_answer(style):
    t = play("zoom_loop", {"style": style, "calls": 3}, [call(style, GOOD.get(style, "[40, 60, 200, 160]"))])
    assert len(t.turns) == 4 and t.kinds == ["call_limit"] and t.answer == ""
    assert [turn.is_final for turn in t.turns] == [False] * 3 + [True]
    own = play("zoom_loop", {"style": style}, [call(style, GOOD.get(style, "[40, 60, 200, 160]"))])
    assert len(own.turns) == {"deepeyes": 11, "mini-o3": 12, "pixel-reasoner": 5, "chain-of-focus": 6}[style]


def tokens(image):
    return round(image.width / 28) * round(image.height / 28)


@pytest.mark.parametrize("style", STYLES)
def test_views_and_crops_are_capped_and_boxes_still_name_the_same_place(style):
    box = GOOD.get(style, "[45, 34, 134, 101]")
    size, seen = (896, 672), {}
    for view, crop in ((0, 0), (48, 16)):
        t = play("zoom_loop", {"style": style, "view_tokens": view, "crop_tokens": crop}, [call(style, box), "x"], size=size)
        seen[view] = t
        if view:
            assert tokens(t.turns[0].images[0]) <= 48 and tokens(t.turns[1].images[0]) <= 16
    whole, capped = seen[0], seen[48]
    if style in GOOD:  # boxes in shares
        assert whole.turns[1].boxes == capped.turns[1].boxes
    else:  # boxes in pixels of what was shown
        wide = 896 / capped.turns[0].images[0].width
        (left, *_), (was, *_) = capped.turns[1].boxes[0], whole.turns[1].boxes[0]
        assert left == pytest.approx(was * wide, abs=wide + 1)


def test_mini_o3_cuts_crops_of_crops_from_the_original_pixels():
    inner = '<grounding>{"bbox_2d": [0.5, 0.5, 1.0, 1.0], "source": "observation_1"}</grounding>'
    t = play("zoom_loop", {"style": "mini-o3"}, [call("mini-o3", "[0.5, 0.5, 1.0, 1.0]"), inner, "<answer>x</answer>"])
    assert t.turns[1].boxes == ((224, 168, 447, 335),) and t.turns[2].boxes[0][:2] == (335, 251)
    source = picture(448, 336).crop((224, 168, 447, 335))
    raw = source.crop((111, 83, 222, 166))
    assert t.turns[2].images[0].tobytes() == within_pixels(raw, Image.Resampling.NEAREST).tobytes()


def test_the_corrected_readers_differ_from_the_released_ones_where_they_say():
    fenced = call("adaptvision", "[40, 60, 200, 160]").replace("<tool_call>", "<tool_call>\n```json\n").replace("</", "\n```\n</")
    spaced = call("adaptvision", "[40,\n 60, 200, 160]").replace("}}", "} }")
    for reply in (fenced, spaced):
        assert not play("adaptvision", {}, [reply, "<answer>x</answer>"]).events
        assert play("adaptvision", {"compat": "official"}, [reply, "<answer>x</answer>"]).kinds == ["malformed_call"]
    corners = {
        c: method_class("adaptvision")(compat=c).box((0, 0, 840, 1092), (840, 1092), (1708, 2212))
        for c in ("corrected", "official")
    }
    assert corners == {"corrected": (0, 0, 1708, 2212), "official": (0, 0, 1680, 2184)}
    whole = call("pixel-reasoner", "[0, 0, 1, 1]")
    released, ours = (
        play("zoom_loop", {"style": "pixel-reasoner", "compat": c}, [whole, "x"]) for c in ("official", "corrected")
    )
    assert ours.turns[1].boxes == ((0, 0, 448, 336),) and released.turns[1].boxes[0][2] < 60
    beyond = call("chain-of-focus", "[200, 200, 900, 900]")
    released, ours = (
        play("zoom_loop", {"style": "chain-of-focus", "compat": c}, [beyond, "x"]) for c in ("official", "corrected")
    )
    assert released.kinds == ["malformed_call"] and not ours.events
    for box in ("[ 40, 60, 200, 160 ]", "[40.5, 60, 200, 160]", "[-4, 60, 200, 160]"):
        assert not play("ergo", {}, [call("ergo", box), "x"]).events
        official = play("ergo", {"compat": "official"}, [call("ergo", box), "x"])
        assert official.kinds == ["malformed_box"] and official.turns[1].images[0].size == (448, 336)
    capped = play("ergo", {"cap": 20}, ["no box", "x"])
    assert tokens(capped.turns[1].images[0]) <= 22  # rounding may exceed the cap


def test_the_adaptvision_original_above_its_limit_is_an_event():
    t = play("adaptvision", {"largest": 280}, [call("adaptvision", "[10, 10, 100, 100]"), "<answer>x</answer>"])
    assert t.kinds == ["original_shrunk"] and "448x336" in t.events[0].detail


@pytest.mark.parametrize(
    "wrong", [("adaptvision", "budget", 0), ("ergo", "cap", 3), ("zoom_loop", "view_tokens", 2), ("zoom_loop", "calls", -1)]
)
def test_options_that_cannot_be_are_refused(wrong):
    name, option, value = wrong
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        build(name, {option: value})
    with pytest.raises(ValueError, match="allowed: 'deepeyes', 'mini-o3'"):
        build("zoom_loop", {"style": "thyme"})


def test_the_released_deepeyes_cuts_for_nothing_after_an_answer_and_fails_on_a_box_that_cannot_be_cut():
    good, bad = (f"<answer>7</answer>{call('deepeyes', box)}" for box in ("[40, 60, 200, 160]", "[200, 160, 40, 60]"))
    options = {"style": "deepeyes", "compat": "official"}
    assert play("zoom_loop", options, [good]).answer == "7" and play("zoom_loop", options, [bad]).answer == bad
    assert play("zoom_loop", {"style": "deepeyes"}, [bad]).answer == "7"  # in its training an answer wins over a call


def test_an_enclosing_box_is_in_the_image_and_not_empty():
    assert enclosing((-5.0, 2.2, 7.1, 9.9), 100, 8) == (0, 2, 8, 8)
    assert enclosing((200.0, 200.0, 300.0, 300.0), 100, 100) == (99, 99, 100, 100)


def test_four_turns_on_one_cache_have_the_logits_of_a_fresh_prefill():
    vlm, image = tiny_vlm(), picture(224, 168)
    asked = [call("deepeyes", f"[{n}0, 20, 200, 150]") for n in (1, 2, 3)]
    policy, turns, session = method_class("zoom_loop")(budget=3), [], Session()
    generator, sent = policy.turns(Sample((image,), "What is it?", "k", full_tokens=48)), None
    vlm.trace = []
    try:
        for reply in asked:
            turn = generator.send(sent)
            turns.append(turn)
            (sent,) = vlm.reply([Request(session, replace(turn, forced_reply=reply), 3)])
            assert sent.text == reply
        turns.append(generator.send(sent))
        vlm.trace = []
        vlm.reply([Request(session, replace(turns[-1], is_final=True), 1)])
        kept = vlm.trace[0]
    finally:
        vlm.trace = None
    ids = []
    for n, turn in enumerate(turns):
        ids += chunk_ids(vlm, Session(turns[:n], asked[:n]), turn)
        ids += vlm.tokenizer(asked[n])["input_ids"] if n < 3 else []
    made = [pixels(vlm, i) for turn in turns for i in turn.images]
    assert len(made) == 4
    ids = torch.tensor([ids])
    with torch.no_grad():
        whole = vlm.host.model(
            input_ids=ids,
            pixel_values=torch.cat([p for p, _, _ in made]),
            image_grid_thw=torch.tensor([g for _, g, _ in made]),
            mm_token_type_ids=(ids == vlm.host.image_token).int(),
        ).logits[0, -1]
    assert (kept[0] - whole).abs().max() < 1e-4


def test_loops_of_different_lengths_share_batches():
    script = {}
    images = [picture(224, 224), picture(224, 168, 1), picture(168, 224, 2)]
    for n in range(3):
        replies = [call("deepeyes", "[10, 10, 120, 120]")] * n + [f"<answer>{n}</answer>"]
        script[zoom_loop.DeepEyes.user.format(question=f"q{n}")] = replies
    jobs = [Job(Sample((image,), f"q{n}", str(n)), 4) for n, image in enumerate(images)]
    outcomes = dict(Engine(Scripted(script), method_class("zoom_loop")(), 3).run(jobs))
    assert [(outcomes[n].answer, len(outcomes[n].turns)) for n in range(3)] == [("0", 1), ("1", 2), ("2", 3)]


def test_a_tiny_model_runs_every_policy_to_its_end():
    vlm: LocalModel = tiny_vlm()
    for name, options in POLICIES:
        policy = method_class(name)(**options, budget=4)
        ((_, t),) = Engine(vlm, policy, 1).run([Job(Sample((picture(112, 84),), "What?", "k"), 4)])
        assert not isinstance(t, Failure) and t.usage.prefill > 0


def seen(t: Played):
    """All that a model is shown, asked and allowed."""
    turns = [([i.tobytes() for i in x.images], x.text, x.system, x.image_prefixes, x.min_reply_tokens, x.boxes) for x in t.turns]
    return turns, t.answer, t.kinds


@pytest.mark.parametrize(
    ("name", "option", "value", "box"),
    [
        ("adaptvision", "budget", 7, "[40, 60, 200, 160]"),
        ("adaptvision", "largest", 140, "[10, 10, 60, 60]"),
        ("adaptvision", "compat", "official", "[40,\n 60, 200, 160]"),
        ("ergo", "cap", 64, "[40, 60, 100, 100]"),
        ("ergo", "budget", 7, "[40, 60, 100, 100]"),
        ("ergo", "prompt", "demo", "[40, 60, 100, 100]"),
        ("ergo", "compat", "official", "[ 40, 60, 100, 100 ]"),
        ("zoom_loop", "style", "chain-of-focus", "[40, 60, 200, 160]"),
        ("zoom_loop", "calls", 1, "[40, 60, 200, 160]"),
        ("zoom_loop", "budget", 7, "[40, 60, 200, 160]"),
        ("zoom_loop", "view_tokens", 48, "[40, 60, 200, 160]"),
        ("zoom_loop", "crop_tokens", 9, "[40, 60, 200, 160]"),
        ("zoom_loop", "compat", "official", "[200, 160, 40, 60]"),
    ],
    ids=lambda v: str(v)[:14],
)
def test_every_option_changes_what_is_shown_asked_or_answered(name, option, value, box):
    asked = call({"zoom_loop": "deepeyes"}.get(name, name), box)
    replies = [asked, asked if name == "zoom_loop" else "<answer>x</answer>", "<answer>x</answer>"]
    assert seen(play(name, {}, replies)) != seen(play(name, {option: value}, replies))


def test_the_options_of_that_test_are_all_there_are():
    from awares_bench.methods.options import options

    (marks,) = test_every_option_changes_what_is_shown_asked_or_answered.pytestmark
    tried = {(name, option) for name, option, *_ in marks.args[1]}
    assert tried == {(n, o) for n in ("adaptvision", "ergo", "zoom_loop") for o in options(method_class(n))}
