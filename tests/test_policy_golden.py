"""AdaptVision, ERGO and the zoom loops beside outputs of the authors' own functions (``AWARES_GOLDEN``: another folder of that layout).

``compat=official`` agrees case by case. Where it does not, the rule is here and not the case: a reply that JSON and Python read
differently (released code evaluates it) is read as JSON, and what ends a released run is an outcome of ours.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from awares_bench.baselines import adaptvision, ergo, zoom_loop
from awares_bench.baselines.zoom_styles import mini_o3
from awares_bench.inference.session import Session
from awares_bench.methods.conversation import Event, Failure, Reply, Sample, Turn, chat_messages
from awares_bench.methods.registry import method_class
from awares_bench.methods.tool_calls import CallError, last_answer

from .helpers.tiny import chunk_ids, tiny_vlm

GOLDEN = Path(os.environ.get("AWARES_GOLDEN") or Path(__file__).parent / "golden")
OWN = Path(__file__).parent / "golden"


def read(method: str) -> dict:
    path = GOLDEN / method / "cases.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def cases(method: str, kind: str):
    """Parametrise over the cases of a kind; a skip where the folder has none."""
    found = read(method).get(kind, [])
    return pytest.mark.parametrize("case", found, ids=[f"{i}-{c.get('note', '')}"[:60] for i, c in enumerate(found)])


def prompts(method: str) -> dict:
    path = GOLDEN / method / "prompts.json"
    return json.loads((path if path.is_file() else OWN / method / "prompts.json").read_text())


@pytest.fixture(autouse=True)
def sizes_only(request, monkeypatch):
    """Resizing of plain pictures is most of the time here and changes nothing but their size."""
    if "pixels" not in request.node.name:
        monkeypatch.setattr(Image.Image, "resize", lambda self, size, *_, **__: Image.new(self.mode, tuple(size), (200, 30, 90)))


def blank(size) -> Image.Image:
    return Image.new("RGB", tuple(size), (200, 30, 90))


class Played:
    """A policy driven by scripted replies, the last of which repeats."""

    def __init__(self, policy, images, replies, question="q"):
        self.turns: list[Turn] = []
        self.events: list[Event] = []
        self.replies: list[str] = []
        generator, sent = policy.turns(Sample(tuple(images), question, "k", full_tokens=1 << 30)), None
        try:
            while True:
                step, sent = generator.send(sent), None
                if isinstance(step, Event):
                    self.events.append(step)
                    continue
                self.turns.append(step)
                self.replies.append(replies[min(len(self.turns), len(replies)) - 1])
                sent = Reply(self.replies[-1])
        except StopIteration as stop:
            self.outcome = stop.value
        self.answer = None if isinstance(self.outcome, Failure) else self.outcome.text

    @property
    def kinds(self) -> list[str]:
        return [e.kind for e in self.events]

    def sizes(self) -> list[list[list[int]]]:
        """Of each request: the sizes of all pictures sent so far."""
        return [[list(i.size) for t in self.turns[: n + 1] for i in t.images] for n in range(len(self.turns))]

    def messages(self) -> list[list[dict]]:
        """Of each request: the messages that it adds."""
        out, before = [], 0
        for n in range(len(self.turns)):
            made = chat_messages(self.turns[: n + 1], self.replies[:n])
            out.append([{"role": m["role"], "text": written(m["content"])} for m in made[before:]])
            before = len(made)
        return out

    def rendered(self) -> list[str]:
        """Of each request: the text that it adds in the chat template, one mark for each picture."""
        vlm, out = tiny_vlm(), []
        for n, turn in enumerate(self.turns):
            ids = chunk_ids(vlm, Session(self.turns[:n], self.replies[:n]), turn)
            text = re.sub(r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>", "<image>", vlm.tokenizer.decode(ids))
            out.append((self.replies[n - 1] if n else "") + text)
        return out


def written(content) -> str:
    return content if isinstance(content, str) else "".join("<image>" if p["type"] == "image" else p["text"] for p in content)


def first(system: str, user: str) -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def tokens(image: Image.Image) -> int:
    return tiny_vlm().host.count_tokens(tiny_vlm().host.processor, {"shortest_edge": 4 * 784, "longest_edge": 16384 * 784}, image)


def pixels(method: str):
    """The picture and what was made of it; the own folder keeps one picture for three methods, and digests of what was made."""
    path = GOLDEN / method / "pixels.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    held = dict(np.load(path))
    image = held.get("image")
    return Image.fromarray(np.load(OWN / "adaptvision" / "pixels.npz")["image"] if image is None else image), held


def equal(image: Image.Image, wanted: np.ndarray) -> bool:
    made = np.asarray(image)
    return hashlib.sha256(made.tobytes()).hexdigest() == str(wanted) if wanted.dtype.kind == "U" else np.array_equal(made, wanted)


def policy(name: str, **options):
    return method_class(name)(compat="official", **options)


def test_the_folder_holds_cases():
    assert any(read(m) for m in ("adaptvision", "ergo", "deepeyes", "mini-o3", "pixel-reasoner", "chain-of-focus"))


# ------------------------------------------------------------------ AdaptVision


@cases("adaptvision", "view")
def test_adaptvision_views(case):
    image = blank(case["size"])
    if case["view"] is None:  # longer than 1:200: left to the model, which pads it
        assert policy("adaptvision").view(image).width > 0
        return
    view, original = policy("adaptvision").view(image), policy("adaptvision").original(image)
    assert [list(view.size), list(original.size)] == [case["view"], case["original"]]
    assert [tokens(view), tokens(original), tokens(image)] == [case[f"{n}_tokens"] for n in ("view", "original", "full")]


@cases("adaptvision", "call")
def test_adaptvision_calls(case):
    look = policy("adaptvision")
    t = Played(look, [blank(case["size"])], [case["reply"], "<answer>x</answer>"])
    outcome = {"crash": "error"}.get(case["outcome"], case["outcome"])
    assert ("error" if "malformed_call" in t.kinds else "crop" if len(t.turns) == 2 else "answer") == outcome
    if outcome == "error" and case["outcome"] != "crash" and not case["leaked"]:
        assert t.turns[1].text == case["error"] + prompts("adaptvision")["error_suffix"]
    if outcome == "crop":
        image = blank(case["size"])
        asked = adaptvision.requested_box(case["reply"], "official")
        assert list(look.box(asked, look.view(image).size, look.original(image).size)) == case["box"]
        assert list(t.turns[1].images[0].size) == case["shown"]
        if case["double"]:
            corrected = method_class("adaptvision")()
            assert list(corrected.box(asked, look.view(image).size, look.original(image).size)) == case["box"]


@cases("adaptvision", "transcript")
def test_adaptvision_transcripts(case):
    t = Played(policy("adaptvision"), [blank(case["size"])] * case["images"], case["replies"], case["question"])
    said = prompts("adaptvision")
    user = said["user"].replace("<image>", "\n".join(["<image>"] * case["images"])).replace("{question}", case["question"])
    wanted = [first(said["system"], user) if r["added"] == "FIRST" else r["added"] for r in case["rounds"]]
    assert t.rendered() == wanted and t.sizes() == [r["images"] for r in case["rounds"]]
    assert "".join(t.replies) == case["output"]


def test_adaptvision_pixels():
    image, held = pixels("adaptvision")
    look, box = policy("adaptvision"), tuple(int(v) for v in held["box"])
    assert equal(look.view(image), held["view"]) and equal(look.original(image), held["original"])
    assert equal(
        adaptvision.rounded(look.original(image).crop(box), adaptvision.LEAST, adaptvision.MOST_OF_A_CROP), held["shown"]
    )


# ------------------------------------------------------------------ ERGO


@cases("ergo", "view")
def test_ergo_views(case):
    view = policy("ergo", cap=case["cap"]).shown(blank(case["size"]), Image.Resampling.BICUBIC)
    assert list(view.size) == case["view"] and tokens(view) == case["view_tokens"]


@cases("ergo", "crop")
def test_ergo_crops(case):
    t = Played(policy("ergo", cap=case["cap"]), [blank(case["size"])], [case["reply"], "<answer>x</answer>"])
    try:
        parsed = list(ergo.named_region(case["reply"], "official"))
    except CallError:
        parsed = None
    assert parsed == case["parsed"]
    result = case["result"]
    if "error" in result:
        assert isinstance(t.outcome, Failure) and len(t.turns) == 1
        return
    assert list(t.turns[1].boxes[0]) == result["box"] and ("malformed_box" in t.kinds) == result["whole"]
    assert list(t.turns[1].images[0].size) == result["shown"] and tokens(t.turns[1].images[0]) == result["tokens"]


@cases("ergo", "answer")
def test_ergo_answers(case):
    t = Played(policy("ergo"), [blank((300, 200))], ["", case["reply"]])
    if re.search("<answer>.*</answer>", case["reply"], re.DOTALL):
        assert t.answer == case["answer"].strip()
    else:
        assert (
            t.answer == case["reply"].strip()
        )  # an unclosed tag: their label counts what follows it, ours leaves it to the task


@cases("ergo", "transcript")
def test_ergo_transcripts(case):
    look, said = policy("ergo", cap=case["cap"]), prompts("ergo")
    t = Played(look, [blank(case["size"])], case["replies"], case["question"])
    assert (not isinstance(t.outcome, Failure)) == case["counted"]
    assert t.sizes() == [turn["images"] for turn in case["turns"]]
    options = "\n".join([case["question"], *case["options"], case["postfix"]])
    for n, (added, turn) in enumerate(zip(t.messages(), case["turns"], strict=True)):
        wanted = [{"role": "system", "text": said["system"]} if m == "SYSTEM" else m for m in turn["added"]]
        if n:  # their second turn adds the options, which ours has in both
            wanted[-1] = {"role": "user", "text": wanted[-1]["text"].replace(options, case["question"])}
        assert added == wanted
    again = Played(look, [blank(case["size"])], case["replies"], options)
    if case["counted"]:
        assert again.messages()[1][-1] == case["turns"][1]["added"][-1]
    assert look.budget == case["sampling"]["max_tokens"]


def test_ergo_pixels():
    image, held = pixels("ergo")
    look = policy("ergo", cap=int(held["cap"]))
    t = Played(look, [image], [str(held["reply"]), "x"])
    assert equal(t.turns[0].images[0], held["view"]) and list(t.turns[1].boxes[0]) == held["box"].tolist()
    assert equal(t.turns[1].images[0], held["shown"])


# ------------------------------------------------------------------ loops: what JSON and Python read differently


def as_python(text: str):
    """What ``eval`` makes of a literal; None where it is none."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def as_json(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return None


def read_differently(text: str) -> bool:
    return as_python(text) != as_json(text)


# ------------------------------------------------------------------ DeepEyes


@cases("deepeyes", "tool")
def test_deepeyes_reads_as_its_training_does(case):
    t = Played(method_class("zoom_loop")(), [blank(case["size"])], [case["reply"], "<answer>x</answer>"])
    got = "error" if "malformed_call" in t.kinds else "crop" if len(t.turns) == 2 else "answer"
    if "image_rotate_tool" in case["reply"]:  # a tool that the prompt does not offer is unknown
        assert got == "error" and "Unknown tool name" in t.turns[1].text
        return
    assert got == {"crash": "error"}.get(case["outcome"], case["outcome"])
    if got == "error" and case["outcome"] == "error" and not case["leaked"]:
        assert t.turns[1].text == case["error"]
    if got == "crop":
        (crop,), (box,) = t.turns[1].images, t.turns[1].boxes
        assert tokens(crop) == case["tokens"]
        assert all(abs(a - b) < 1 for a, b in zip(box, case["box"], strict=True))
        call = zoom_loop.DeepEyes().read(case["reply"], False)
        image = zoom_loop.Picture(blank(case["size"]), blank(case["size"]), (0, 0, *case["size"]))
        _, region = zoom_loop.DeepEyes().region(call, [image], 1, False)
        assert list(region) == case["box"]
        assert [round(region[2]) - round(region[0]), round(region[3]) - round(region[1])] == case["shown"]


@cases("deepeyes", "evaluate")
def test_deepeyes_evaluation(case):
    letters = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", case["options"], strict=False)) + "\n"
    look = policy("zoom_loop")
    t = Played(look, [blank(case["size"])], case["replies"], f"{case['question']}\nOptions: {letters}")
    said = prompts("deepeyes")
    literal = [r.partition("<tool_call>")[2].partition("</tool_call>")[0] for r in case["replies"] if "<tool_call>" in r]
    if any(map(read_differently, literal)):
        odd = next(n for n, text in enumerate(literal) if read_differently(text))
        assert ("malformed_call" in t.kinds) == (as_json(literal[odd]) is None)
        return
    turns = [turn for turn in case["turns"] if turn["added"]]  # greedy, so a repeated question has a repeated answer
    wanted = [[{"role": "system", "text": said["system"]} if m == "SYSTEM" else m for m in turn["added"]] for turn in turns]
    assert t.messages() == wanted and t.sizes() == [turn["images"] for turn in turns]
    assert t.answer == case["answer"].strip() or t.answer == case["answer"]
    assert ("malformed_call" in t.kinds) == (case["status"] == "error")
    assert zoom_loop.DeepEyes.budget == case["sampling"]["max_tokens"] and look.compat == "official"


# ------------------------------------------------------------------ Mini-o3

MINI = {"style": "mini-o3"}


@cases("mini-o3", "view")
def test_mini_o3_views(case):
    view = zoom_loop.STYLES["mini-o3"].view(blank(case["size"]))[1]
    if isinstance(case["view"], dict):  # under 28 pixels a side: an assertion there, enlarged here
        assert min(view.size) >= 28
    else:
        assert list(view.size) == case["view"]


@cases("mini-o3", "observation")
def test_mini_o3_observations(case):
    assert list(zoom_loop.STYLES["mini-o3"].crop(blank(case["cut"]))[1].size) == case["shown"]


@cases("mini-o3", "box")
def test_mini_o3_boxes(case):
    reply = f'<grounding>{{"bbox_2d": {json.dumps(case["bbox"])}, "source": "original_image"}}</grounding>'
    t = Played(policy("zoom_loop", **MINI), [blank(case["size"])], [reply, "x"])
    if case["box"] is None:
        assert t.kinds == ["malformed_call"]
        assert case["error"] == "AssertionError" or f"Error Information: {case['error']}.\n" in t.turns[1].text
        return
    assert list(t.turns[1].boxes[0]) == case["box"] and list(t.turns[1].images[0].size) == case["shown"]


@cases("mini-o3", "call")
def test_mini_o3_calls(case):
    t = Played(policy("zoom_loop", **MINI), [blank(case["size"])], [*case["before"], case["reply"], "<answer>x</answer>"])
    n = len(case["before"]) + 1
    events = t.kinds[sum(k == "malformed_call" for k in t.kinds[: len(case["before"])]) :] if case["before"] else t.kinds
    got = "error" if "malformed_call" in events else "crop" if len(t.turns) > n else "answer"
    written_box = re.findall(r'"bbox_2d": (.*?), "source"', case["reply"])
    if case["outcome"] == "crop" and written_box and read_differently(written_box[-1]):
        assert got == "error"
        return
    assert got == {"crash": "error"}.get(case["outcome"], case["outcome"])
    if got == "error" and case["outcome"] == "error" and not case["leaked"]:
        assert t.turns[n].text.startswith(case["error"])
    if got == "crop":
        assert list(t.turns[n].images[0].size) == case["shown"] and tokens(t.turns[n].images[0]) == case["tokens"]
        action, observation = case["numbers"]
        assert (
            f"Action {action}, " in t.turns[n].image_prefixes[0]
            and f"(Observation {observation})" in t.turns[n].image_prefixes[0]
        )


@cases("mini-o3", "answer")
def test_mini_o3_answers(case):
    answer = zoom_loop.STYLES["mini-o3"].answer(case["turns"][-1])
    tagged_last = "<answer>" in case["turns"][-1]

    def right(gold: str) -> bool:
        """Their comparison: the same, or the letter with what multiple choice puts round it."""
        letter = re.match(r"\(?([A-Z])\)?(?![A-Za-z])", answer)
        return tagged_last and (answer == gold or (letter is not None and letter[1] == gold))

    assert [g for g in ("A", "B", "C", "12", "yes") if right(g)] == case["right_for"]


@cases("mini-o3", "transcript")
def test_mini_o3_transcripts(case):
    limits = case.get("limits", {})
    calls = min(limits.get("rounds", 12), limits.get("images", 12)) - 1
    t = Played(policy("zoom_loop", calls=calls, **MINI), [blank(case["size"])], case["replies"], "Which?")
    said = prompts("mini-o3")
    rendered = t.rendered()
    assert rendered[0] == first(said["system"], "<image>Which?")
    assert rendered[1:] == [turn["added"] for turn in case["turns"][1:]]
    assert t.sizes() == [turn["images"] for turn in case["turns"]] and len(t.turns) == case["rounds"]
    assert ("call_limit" in t.kinds) == case["exceeded"] and (t.answer == "") >= case["exceeded"]


def test_mini_o3_pixels():
    image, held = pixels("mini-o3")
    view, shown = (tuple(map(int, held[k])) for k in ("view_limits", "limits"))
    assert equal(mini_o3.within_pixels(image, Image.Resampling.LANCZOS, *view), held["view"])
    source = zoom_loop.Picture(image, image, (0, 0, *image.size))
    call = {"bbox_2d": held["bbox"].tolist(), "source": "original_image"}
    _, region = zoom_loop.STYLES["mini-o3"].region(call, [source], 1, True)
    assert list(region) == held["box"].tolist() and equal(image.crop(region), held["cut"])
    assert equal(mini_o3.within_pixels(image.crop(region), Image.Resampling.NEAREST, *shown), held["shown"])


# ------------------------------------------------------------------ Pixel Reasoner


@cases("pixel-reasoner", "view")
def test_pixel_reasoner_views(case):
    source, shown = zoom_loop.STYLES["pixel-reasoner"].view(blank(case["size"]))
    assert list(source.size) == case["view"] and tokens(shown) == case["view_tokens"]
    assert tokens(blank(case["size"])) == case["full_tokens"]


@cases("pixel-reasoner", "tool")
def test_pixel_reasoner_calls(case):
    style = zoom_loop.STYLES["pixel-reasoner"]
    pictures = [zoom_loop.Picture(i, i, (0, 0, *i.size)) for i in map(blank, [case["view"], *case["shown_before"]])]
    try:
        call = style.read(case["reply"], True)
        found = None if call is None else style.region(call, pictures, 1, True)
    except CallError as error:
        assert case["outcome"] in ("error", "crash")
        assert case.get("leaked") or case["outcome"] == "crash" or str(error) == case["error"]
        return
    if found is None:
        assert case["outcome"] == "answer"
        return
    assert case["outcome"] == "crop"
    index, region = found
    assert index == max(case["source"] - 1, 0) or case["source"] == 0
    assert region == pytest.approx(case["region"], abs=1e-6)
    made = policy("zoom_loop", style="pixel-reasoner").cut(style, pictures[index], region)
    assert list(made.source.size) == case["shown"] and tokens(made.shown) == case["tokens"]
    left, top, right, bottom = map(round, region)
    assert [right - left, bottom - top] == case["cut"]


def test_pixel_reasoner_says_what_the_authors_say():
    said, reply = prompts("pixel-reasoner"), '<tool_call>{"name": "crop_image_normalized", "arguments": %s}</tool_call>'
    good, bad = (reply % a for a in ('{"bbox_2d": [0.1, 0.1, 0.4, 0.4], "target_image": 1}', '{"bbox_2d": [0.1, 0.1, 0.4, 0.4]}'))
    t = Played(policy("zoom_loop", style="pixel-reasoner"), [blank((640, 480))], [good, bad, "\\boxed{A}"], "Which?")
    assert t.messages()[0] == [
        {"role": "system", "text": said["system"]},
        {"role": "user", "text": said["user"].replace("{question}", "Which?")},
    ]
    size = zoom_loop.STYLES["pixel-reasoner"].crop(blank((322, 238)))[0].size
    assert t.messages()[1][-1]["text"] == said["after_crop"].format(width=size[0], height=size[1])
    assert t.messages()[2][-1]["text"] == said["after_error"].format(error=t.events[-1].detail) and t.answer == "A"


# ------------------------------------------------------------------ Chain-of-Focus

FOCUS = {"style": "chain-of-focus"}


@cases("chain-of-focus", "view")
def test_chain_of_focus_views(case):
    assert list(zoom_loop.STYLES["chain-of-focus"].view(blank(case["size"]))[1].size) == case["view"]


@cases("chain-of-focus", "call")
def test_chain_of_focus_calls(case):
    t = Played(policy("zoom_loop", **FOCUS), [blank(case["size"])], [case["reply"], "<answer>x</answer>"])
    assert list(t.turns[0].images[0].size) == case["view"]
    got = "none" if "malformed_call" in t.kinds else "crop" if len(t.turns) == 2 else "answer"
    assert got == case["outcome"]
    if got != "answer":
        assert list(t.turns[1].images[0].size) == case["shown"] and tokens(t.turns[1].images[0]) == case["tokens"]
    if got == "crop":
        style, view = zoom_loop.STYLES["chain-of-focus"], t.turns[0].images[0]
        picture = zoom_loop.Picture(view, view, (0, 0, *case["size"]))
        assert list(style.region(style.read(case["reply"], True), [picture], 1, True)[1]) == case["box"]


@cases("chain-of-focus", "transcript")
def test_chain_of_focus_transcripts(case):
    t = Played(policy("zoom_loop", **FOCUS), [blank(case["size"])], case["replies"], "{text}")
    said = prompts("chain-of-focus")
    wanted = [
        [{"role": "system", "text": said["system"]} if m == "SYSTEM" else m for m in turn["added"]] for turn in case["turns"]
    ]
    assert t.messages() == wanted and t.sizes() == [turn["images"] for turn in case["turns"]]
    assert t.answer == last_answer(case["answer"])
