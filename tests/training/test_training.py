"""Training sees what evaluation sees: the same pixels, the same tokens; loss only on what the model writes; exact resume."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from awares_bench.inference.session import Session
from awares_bench.methods.conversation import Turn
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.models.qwen_vision import windowed_attention
from awares_bench.tasks.nano import world
from awares_bench.training.nano import language, stages, tower
from awares_bench.training.nano import model as nano
from awares_bench.training.nano.loop import LoopSettings, ParameterGroup, train
from awares_bench.training.nano.pixels import normalise, patches
from awares_bench.training.nano.rows import RowEncoder, collate

from ..helpers.tiny import GEOMETRY, chunk_ids, picture, pixels, tiny_tokenizer, tiny_vlm


def test_pixels_are_the_processors():
    for size in ((224, 224), (112, 56), (280, 140)):
        image = picture(*size)
        theirs, grid, _ = pixels(tiny_vlm(), image)
        values, mine = patches(image)
        assert mine == grid and (normalise(values) - theirs).abs().max() < 1e-6


def test_tokens_are_the_engines():
    vlm = tiny_vlm()
    encoder = RowEncoder(vlm.tokenizer)
    image = picture(224, 224)
    crops = PAPER_GRID.cut(image, ("top-right", "bottom"))
    call = "GET_CROPS: ['1', '6']"
    row = encoder.encode_row([([half(image)], "What is it?\nAnswer.", call, 5.0), (crops, "", "42", 1.0)], PAPER_GRID.prompt)
    one = Turn((half(image),), "What is it?\nAnswer.", system=PAPER_GRID.prompt, is_final=False)
    two = Turn(tuple(crops))
    engine = chunk_ids(vlm, Session(), one) + vlm.tokenizer(call)["input_ids"]
    engine += chunk_ids(vlm, Session(turns=[one], replies=[call]), two) + vlm.tokenizer("42")["input_ids"]
    assert row.ids[:-1] == engine and row.ids[-1] == encoder.end
    plain = encoder.encode_row([([image], "q", "a", 1.0)])
    assert plain.ids[:-2] == chunk_ids(vlm, Session(), Turn((image,), "q"))


def test_only_what_the_model_writes_is_weighted_and_the_call_five_times():
    encoder = RowEncoder(tiny_vlm().tokenizer)
    row = encoder.encode_row([([picture(56, 56)], "q", "GET_CROPS: ['3']", 5.0), ([picture(56, 56)], "", "42", 1.0)])
    said = {
        w: "".join(encoder.tokenizer.decode([i for i, x in zip(row.ids, row.weights, strict=True) if x == w])) for w in (5.0, 1.0)
    }
    assert said == {5.0: "GET_CROPS: ['3']<|im_end|>", 1.0: "42<|im_end|>"}


def test_the_weighted_loss_is_the_hand_computed_one():
    vlm = tiny_vlm()
    encoder = RowEncoder(vlm.tokenizer)
    rows = [
        encoder.encode_row([([picture(56, 56)], "q", "GET_CROPS: ['3']", 5.0), ([picture(84, 56)], "", "42", 1.0)]),
        encoder.encode_row([([picture(112, 56)], "a longer question", "yes", 1.0)]),
    ]
    learner = language.Learner(vlm.host.model)
    with torch.no_grad():
        loss, _ = learner.loss(collate(rows, encoder))
        total = weight = 0.0
        for row in rows:
            ids = torch.tensor([row.ids])
            logits = (
                vlm.host.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=normalise(torch.cat(row.pixels)),
                    image_grid_thw=torch.tensor(row.grids),
                    mm_token_type_ids=(ids == encoder.image_token).int(),
                )
                .logits[0]
                .log_softmax(-1)
            )
            for i, w in enumerate(row.weights):
                if w:
                    total, weight = total - w * logits[i - 1, row.ids[i]].item(), weight + w
    assert abs(loss.item() - total / weight) < 1e-4


def test_a_joint_crop_row_asks_only_what_its_crops_hold_and_learns_no_call_that_is_wider_than_needed():
    encoder, phase, wide, later = RowEncoder(tiny_vlm().tokenizer), stages.PHASES["joint"][-1], 0, 0
    for family in world.FAMILIES:
        for seed in range(12):
            row = stages.make_row(encoder, family, seed, "crop", phase)
            rng = world.stream(family, seed)
            image, panels = world.family_scene(rng, family)
            boxes = {p.key: [q.box for q in panels if q.key == p.key] for p in panels}
            text = encoder.tokenizer.decode(row.ids)
            asked = [
                k
                for turn in text.split("user\n")[1:]
                for k in boxes
                if f" {k} " in turn or f"field {k}?" in turn or f"the {k}?" in turn
            ]
            (s, e), *answers = row.replies
            names = PAPER_GRID.parse(encoder.tokenizer.decode(row.ids[s : e - 1])).names
            assert len(asked) == len(answers) and all(PAPER_GRID.holds(names, boxes[k], *image.size) for k in asked)
            cheapest = PAPER_GRID.area(PAPER_GRID.cheapest_cover(boxes[asked[0]], *image.size))
            assert set(row.weights[s:e]) == {1.0 if PAPER_GRID.area(names) == cheapest and row.weights[s] else 0.0}
            wide, later = wide + (row.weights[s] == 0), later + len(answers) - 1
    assert 5 < wide < 36 and later > 10  # a quarter of 72


def test_hints_name_the_key_of_the_question_where_the_answer_to_a_crop_is_written():
    encoder, phase, encode = RowEncoder(tiny_vlm().tokenizer), stages.PHASES["fetch"][-1], tiny_vlm().tokenizer
    for mode in ("crop", "blind", "low"):
        row = stages.make_row(encoder, "doc", 3, mode, phase)
        if mode == "low":
            assert not row.hints
            continue
        start, end = row.replies[1]
        assert [at for at, _ in row.hints] == list(
            range(start - 1, end - 2)
        )  # each position whose output is a token of the answer
        (key,) = {encode.decode([token]) for _, token in row.hints}
        assert f"in field{key}?" in encode.decode(row.ids[: row.replies[0][0]])
        assert mode == "crop" or not any(row.weights[slice(*row.replies[0])])


def test_a_fresh_bottom_layer_changes_nothing_yet_and_learns():
    old, encoder = tiny_vlm().host.model, RowEncoder(tiny_vlm().tokenizer)
    new = nano.build(tiny_vlm().tokenizer, replace(GEOMETRY, layers=GEOMETRY.layers + 1))
    language.load(new, old)
    batch = stages.make_batch(encoder, "fetch", 0, 10, 4)
    one, two = language.Learner(old), language.Learner(new)
    assert torch.equal(one.hidden(batch).last_hidden_state, two.hidden(batch).last_hidden_state)
    two.loss(batch)[0].backward()
    bottom = new.model.language_model.layers[0]
    assert bottom.self_attn.o_proj.weight.grad.abs().max() > 0 < bottom.mlp.down_proj.weight.grad.abs().max()


def test_tower_targets_point_at_what_is_drawn():
    vocabulary = tower.Vocabulary()
    panel = world.Panel("chart", "red", "47", True, (28, 28, 84, 84))
    t = tower.targets([panel], (0, 0, 112, 112), 1, vocabulary, (112, 112))
    on = t[:, 0] == vocabulary.keys["red"]
    assert set(on.nonzero()[0]) == {5, 6, 9, 10}  # tokens of 28 pixels, four a row
    assert t[5, 1] == 2 and t[5, 2] == vocabulary.contents["4"] and t[5, 3] == vocabulary.contents["7"]
    assert t[:, -3].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 and t[:, -2].tolist() == [0, 1, 2, 3] * 4
    assert set(t[on, -1]) == {vocabulary.regions[("center",)]} and set(t[~on, -1]) == {-100}
    left_half = tower.targets([panel], (0, 0, 56, 112), 1, vocabulary, (112, 112))
    assert set(left_half[:, 0]) == {0, -100}  # cut by the view's edge: no lesson
    right_half = tower.targets([panel], (56, 0, 112, 112), 1, vocabulary, (112, 112))
    assert right_half[:, -2].tolist() == [2, 3] * 4  # places are the whole picture's


def test_where_lists_name_the_cheapest_region_of_each_panel():
    encoder = RowEncoder(tiny_vlm().tokenizer)
    panels = [
        world.Panel("chart", "red", "47", True, (0, 0, 48, 60)),
        world.Panel("chart", "blue", "12", False, (120, 30, 160, 200)),
        world.Panel("chart", "black", "33", False, (90, 60, 140, 130)),
    ]
    regions = [stages.region_id(p, (224, 224)) for p in panels]
    assert [PAPER_GRID.ids.get(r, r) for r in regions] == ["top-left", "right", "center"]
    row = stages.list_row(encoder, picture(112, 112), panels, regions)
    assert encoder.tokenizer.decode([i for i, w in zip(row.ids, row.weights, strict=True) if w]) == "".join(regions)
    assert encoder.tokenizer.decode(row.ids).endswith("red{}, blue{}, black{},".format(*regions))
    assert [encoder.tokenizer.decode(row.ids[s:e]) for s, e in row.replies] == regions


def test_grouped_attention_equals_the_windows_one_by_one_with_and_without_gradients():
    model = nano.build(tiny_tokenizer(), GEOMETRY)
    values = normalise(torch.cat([patches(picture(224, 168))[0], patches(picture(84, 140))[0]]))
    grid = torch.tensor([[1, 12, 16], [1, 10, 6]])
    plain = model.model.visual(values, grid_thw=grid).pooler_output
    with windowed_attention(model.model.visual):
        grouped = model.model.visual(values, grid_thw=grid).pooler_output
        with torch.no_grad():
            silent = model.model.visual(values, grid_thw=grid).pooler_output
    assert (grouped - plain).abs().max() < 1e-5 and (silent - plain).abs().max() < 1e-5


@pytest.mark.parametrize("cut", [2, 3])
def test_a_resumed_run_equals_one_that_was_not_cut(tmp_path, cut):
    def go(out, stop):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)

        def make_batch(step):
            if step >= stop:
                raise KeyboardInterrupt
            return {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(step))}

        def loss_of(b, step):
            return module(b["x"]).float().square().mean(), {}

        with contextlib.suppress(KeyboardInterrupt):
            groups = [ParameterGroup(list(module.parameters()), 0.1)]
            settings = LoopSettings(5, warmup=1, log_every=1, evaluate_every=1, workers=0)
            train({"m": module}, groups, make_batch, loss_of, lambda s: {}, out, settings)
        return {
            json.loads(x)["step"]: json.loads(x).get("loss") for x in (out / "log.jsonl").read_text().splitlines() if "loss" in x
        }

    whole = go(tmp_path / "whole", 99)
    go(tmp_path / "cut", cut)
    resumed = go(tmp_path / "cut", 99)
    assert resumed == whole and len(whole) == 5
