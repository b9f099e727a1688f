"""SFT: one loss whatever the split into micro-batches and processes, exact resume, a result that evaluation loads, clear errors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from awares_bench.awares import AwaRes
from awares_bench.cli import main
from awares_bench.inference.local_model import LocalModel
from awares_bench.training import examples, recipe, sft
from awares_bench.training.nano import model as nano
from awares_bench.training.rendering import render

from ..helpers.ranks import FSDP2, launched, ranks
from ..helpers.tiny import picture, tiny_vlm

REPLIES = (["42"], ["GET_CROPS: ['1', '6']", "left"], ["GET_CROPS: ['3']", "19"], ["yes"])


def write_rows(path, count=8, **more):
    from datasets import Dataset, Image

    rows = [
        {"image": picture(112 + 56 * (i % 3), 112, i), "question": f"Number {i}?", "replies": REPLIES[i % 4], "answers": [REPLIES[i % 4][-1]]}
        | {k: v(i) for k, v in more.items()}
        for i in range(count)
    ]  # fmt: skip
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, folder / "start")
    write_rows(folder / "rows.parquet")
    return folder


def settings(place, out, **more):
    said = {"start": str(place / "start"), "data": str(place / "rows.parquet"), "out": str(place / out), "device": "cpu"}
    said |= {"batch": 4, "micro_batch": 4, "steps": 4, "lr": 1e-3, "log_every": 1, "save_every": 2, "lora_dropout": 0.0}
    return said | more


def train(place, out, **more):
    sft.run(recipe.check(sft.SFT, settings(place, out, **more)))
    return figures(place / out)


COMMAND = (
    "import sys, json; from awares_bench.training import recipe, sft; sft.run(recipe.check(sft.SFT, json.loads(sys.argv[1])))"
)
DIES = """
import os; from awares_bench.training import sft; old = sft.SFTTrainer.compute_loss
sft.SFTTrainer.compute_loss = lambda s, *a, **k: os.kill(os.getpid(), 9) if s.state.global_step == 3 else old(s, *a, **k)
"""


def figures(folder):
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    return {x["step"]: (x["loss"], x["grad_norm"]) for x in lines}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_loss_is_the_weighted_mean_and_the_same_for_every_micro_batch(place, tuning):
    whole = train(place, f"whole-{tuning}", tuning=tuning)
    parts = train(place, f"parts-{tuning}", tuning=tuning, micro_batch=1)
    packed = train(place, f"packed-{tuning}", tuning=tuning, packed=3)
    for step in whole:
        assert parts[step] == pytest.approx(whole[step], rel=1e-5)
        assert packed[step] == pytest.approx(whole[step], rel=1e-5)
    trainer = sft.build(recipe.check(sft.SFT, settings(place, f"whole-{tuning}", tuning=tuning)))
    order = next(iter(trainer.get_train_dataloader()))
    total = weight = 0.0
    for c in order:
        ids = torch.tensor([c.ids])
        with torch.no_grad():
            logits = trainer.vlm.host.model(
                input_ids=ids,
                pixel_values=torch.cat([v.inputs["pixel_values"] for v in c.images]),
                image_grid_thw=torch.cat([v.inputs["image_grid_thw"] for v in c.images]),
                mm_token_type_ids=(ids == trainer.vlm.host.image_token).int(),
            ).logits[0]
        for i, w in enumerate(c.weights):
            if w:
                total, weight = total - w * logits[i - 1].log_softmax(-1)[c.ids[i]].item(), weight + w
    assert whole[1][0] == pytest.approx(total / weight, rel=1e-4)
    assert whole[4][0] < whole[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_killed_after_a_checkpoint_resumes_to_the_same_digits(place, tuning):
    whole = train(place, f"uncut-{tuning}", tuning=tuning, lora_dropout=0.1)
    out = place / f"cut-{tuning}"
    said = settings(place, out.name, tuning=tuning, lora_dropout=0.1)
    done = subprocess.run([sys.executable, "-c", DIES + COMMAND, json.dumps(said)], capture_output=True)
    assert done.returncode == -9
    assert sorted(figures(out)) == [1, 2, 3] and not (out / "checkpoint").exists()
    (out / "checkpoint-3").mkdir()  # a save that the kill cut short
    assert train(place, out.name, tuning=tuning, lora_dropout=0.1) == whole


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(place):
    one = train(place, "one", tuning="full", micro_batch=2)
    assert ranks(COMMAND, settings(place, "two", tuning="full", micro_batch=2)) == [0, 0]
    two = figures(place / "two")
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_fsdp2_trains_resumes_and_exports_as_one_process(place, tuning):
    """FSDP2 shards the weights of both processes; killed between checkpoints, then resumed, with activations recomputed."""
    from safetensors.torch import load_file

    more = {"tuning": tuning, "micro_batch": 1, "lora_dropout": 0.0}
    one = train(place, f"alone-{tuning}", **more)
    said = settings(place, f"sharded-{tuning}", checkpointing=True, **more)
    assert ranks(FSDP2 + DIES + COMMAND, said, launched("fsdp2")) == [-9, -9]
    assert sorted(figures(place / f"sharded-{tuning}")) == [1, 2, 3]
    assert (place / f"sharded-{tuning}" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    assert ranks(FSDP2 + COMMAND, said, launched("fsdp2")) == [0, 0]
    two = figures(place / f"sharded-{tuning}")
    assert two.keys() == one.keys()
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5)
    files = (f"alone-{tuning}/checkpoint", f"sharded-{tuning}/checkpoint", "start")
    mine, theirs, start = (load_file(place / name / "model.safetensors") for name in files)
    apart, moved = (
        sum((w.float() - other[n].bfloat16().float()).abs().sum() for n, w in mine.items()) for other in (theirs, start)
    )
    assert mine.keys() == theirs.keys() and apart < 0.01 * moved


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_result_loads_in_evaluation_and_says_what_the_adapters_say(place, embeddings):
    out, more = f"merged-{embeddings}", {"steps": 2, "lr": 0.02, "embeddings": embeddings}
    train(place, out, **more)
    vlm = LocalModel.load(str(place / out / "checkpoint"), device="cpu")
    from awares_bench.methods.conversation import Sample
    from awares_bench.training.packing import Scorer, pack

    trainer = sft.build(recipe.check(sft.SFT, settings(place, out, **more)))
    trainer._load_from_checkpoint(str(place / out / "checkpoint-2"))
    c = render(vlm, AwaRes(), Sample((picture(112, 112),), "q?", "k"), REPLIES[1])
    packed = pack([[c]], vlm.host)
    with torch.no_grad():
        features = vlm.encode(packed.images)
        mine = Scorer(vlm.host)(packed, features)[0]
        adapted = trainer.scorer.eval()(packed, features)[0]
        start = Scorer(tiny_vlm().host)(packed, features)[0]
    moved = (adapted - start).abs().max()
    assert (mine - adapted).abs().max() < 0.1 * moved  # bfloat16 rounding of the merged weights, far below what training moved
    assert "lora_rank: 8" in (place / out / "checkpoint" / "README.md").read_text()
    alone = LocalModel.load(str(place / out / "adapter"), device="cpu")  # merged in float32, so nearer than the merged checkpoint
    with torch.no_grad():
        assert (Scorer(alone.host)(packed, features)[0] - adapted).abs().max() < 0.1 * moved
    before, tables = (
        LocalModel.load(str(place / "start"), device="cpu").host.model,
        (alone.host.model.get_input_embeddings().weight, alone.host.model.lm_head.weight),
    )
    assert torch.equal(*tables) == before.config.tie_word_embeddings
    assert torch.equal(tables[0], before.get_input_embeddings().weight) != embeddings


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("zero2", "DEEPSPEED"), ("fsdp2", "FSDP")])
def test_launch_files_are_read_by_accelerate(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = str(Path(recipe.__file__).parent / "launch" / f"{name}.yaml")
    config = load_config_from_file(path)  # refuses keys it does not know
    assert config.distributed_type == kind and config.mixed_precision == "no" and not config.use_cpu
    assert config.deepspeed_config.get("zero_stage") == (2 if name == "zero2" else None)
    told = ["--config_file", path, "--num_processes", "2", "-m", "awares_bench.cli", "train", "sft", "paper_sft_7b"]
    said = launch_command_parser().parse_args(told)
    assert said.training_script == "awares_bench.cli" and said.training_script_args == ["train", "sft", "paper_sft_7b"]


def test_sharding_that_accelerate_leaves_out_is_an_error(place, monkeypatch):
    """On CPUs accelerate drops FSDP without a word, and each process would hold everything."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(recipe.RecipeError, match="FSDP was asked for"):
        sft.build(recipe.check(sft.SFT, settings(place, "dropped")), dry=True)


def test_every_process_loads_on_its_own_gpu(place, monkeypatch):
    from awares_bench.training.trainer import device_of

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = {name: device_of(recipe.check(sft.SFT, settings(place, "x", device=name))) for name in ("auto", "cuda", "cpu")}
    assert said == {"auto": "cuda:3", "cuda": "cuda:3", "cpu": "cpu"}


def test_a_recipe_is_checked_before_anything_loads(place, capsys):
    path = place / "r.yaml"
    for said, words in (
        ({"learning_rat": 1}, "unknown option 'learning_rat'"),
        ({"lora_rnk": 4}, "Did you mean 'lora_rank'"),
        ({"lr": -1}, "lr is -1"),
        ({"lr": "1e-3x"}, "must be of type float"),
        ({"tuning": "all"}, "allowed: lora, full"),
        ({"save_every": 3, "log_every": 2}, "not a multiple of log_every"),
        ({"batch": 6}, "must be a multiple of 4"),
        ({"policy": "aware"}, "Did you mean awares"),
        ({"policy_options": {"promt": "paper"}}, "Did you mean 'prompt'"),
        ({"data": str(place / "none.parquet")}, "no data at"),
    ):
        path.write_text(json.dumps(settings(place, "never", start="nowhere") | said))
        assert main(["train", "sft", str(path)]) == 1
        assert words in capsys.readouterr().err
    path.write_text("- a\n- b\n")
    assert main(["train", "sft", str(path)]) == 1


def test_a_folder_of_another_recipe_is_left_alone(place):
    train(place, "mine", steps=2)
    with pytest.raises(recipe.RecipeError, match=r"lr was 0\.001, is 0\.002"):
        train(place, "mine", steps=2, lr=0.002)
    shutil.rmtree(place / "mine")


def test_rows_that_lack_something_are_named(tmp_path):
    from datasets import Dataset

    Dataset.from_list([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(examples.DataError, match="no rows"):
        examples.rows(str(tmp_path / "empty.parquet"), ("image",))
    write_rows(tmp_path / "rows.parquet", question=lambda i: "" if i == 3 else "q")
    with pytest.raises(examples.DataError, match=r"1 of 8 rows have no question, the first at \[3\]"):
        examples.rows(str(tmp_path / "rows.parquet"), ("image", "question"))
    write_rows(tmp_path / "blind.parquet", image=lambda i: None if i == 2 else picture(56, 56))
    with pytest.raises(examples.DataError, match=r"1 of 8 rows have no image, the first at \[2\]"):
        examples.rows(str(tmp_path / "blind.parquet"), ("image", "question"))
    with pytest.raises(examples.DataError, match="no column 'quest'"):
        examples.rows(str(tmp_path / "rows.parquet"), ("question",), {"question": "quest"})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "q", "answer": "1"}) + "\n")
    picture(56, 56).save(tmp_path / "a.png")
    table = examples.rows(str(tmp_path / "rows.jsonl"), ("image", "question", "answers"))
    assert examples.pictures(table[0], 2000)[0].size == (56, 56) and examples.answers(table[0]) == ("1",)
    assert examples.pictures(table[0], 28)[0].size == (28, 28)


def test_a_dry_run_shows_masks_and_counts_and_takes_no_step(place, capsys):
    sft.dry_run(recipe.check(sft.SFT, settings(place, "dry")))
    said = capsys.readouterr().out
    assert "weight 5: \"GET_CROPS: ['1', '6']<|im_end|>\"" in said and "weighted loss" in said
    assert not (place / "dry").exists()


def test_the_recipes_that_ship_are_read_and_name_their_start():
    from awares_bench.training import grpo, token_scorer
    from awares_bench.training.curation import pipeline

    folder = Path(recipe.__file__).parent / "recipes"
    kinds = {"sft": sft.SFT, "grpo": grpo.GRPO, "curate": pipeline.Curate, "scorer": token_scorer.ScorerRecipe}
    found = sorted(p.stem for p in folder.glob("*.yaml"))
    assert len(found) >= 7
    for name in found:
        cls = next(c for word, c in kinds.items() if word in name)
        made = recipe.load(cls, name, ["out=elsewhere"])
        assert made.out == "elsewhere" and made.start
    paper = recipe.load(grpo.GRPO, "paper_grpo_7b")
    assert (paper.miss, paper.use, paper.area, paper.group, paper.beta, paper.lr) == (2, 0.25, 0.01, 8, 0.05, 1e-5)
    assert recipe.load(sft.SFT, "paper_sft_7b").call_weight == 5


ODD_ROWS = {
    "question": (
        {"question": lambda i: "What is <|image_pad|>?" if i == 5 else "What?"},
        "row 5: the question holds the text '<|image_pad|>'",
    ),
    "reply": ({"replies": lambda i: ["a", "<|video_pad|>"][i == 3 :][:1]}, "row 3: the reply holds the text '<|video_pad|>'"),
}


@pytest.mark.parametrize("kind", ODD_ROWS)
def test_a_row_with_a_mark_of_a_picture_is_named_before_training(place, tmp_path, kind):
    columns, said = ODD_ROWS[kind]
    write_rows(tmp_path / "odd.parquet", **columns)
    with pytest.raises(examples.DataError, match=re.escape(said)):
        train(place, tmp_path / "out", data=str(tmp_path / "odd.parquet"))


def test_a_row_that_cannot_be_rendered_is_named(place):
    from awares_bench.methods.conversation import Sample

    for question, replies in (("What is <|image_pad|>?", ["a"]), ("What?", ["<|vision_end|>"]), ("What \ud800?", ["a"])):
        with pytest.raises(ValueError, match=r"sample 'k': the (question|reply) holds"):
            render(tiny_vlm(), AwaRes(), Sample((picture(112, 112),), question, "k"), replies)
    table = examples.rows(str(place / "rows.parquet"), ("image", "question", "replies"))
    data = sft.Trajectories(table, tiny_vlm(), AwaRes(), recipe.check(sft.SFT, settings(place, "never", max_length=16)))
    with pytest.raises(examples.DataError, match=r"rows\.parquet', row 2: sample '2' has"):
        data[2]


def test_pictures_of_a_row_may_be_odd_and_a_row_without_a_name_is_numbered(tmp_path):
    import numpy as np

    picture(60, 40).save(tmp_path / "a.png")
    for image in (str(tmp_path / "a.png"), {"bytes": (tmp_path / "a.png").read_bytes()}, np.zeros((40, 60), np.uint16)):
        assert examples.pictures({"image": image}, 1000)[0].size == (60, 40)
    for image, said in (
        (None, "NoneType"),
        ({}, "without bytes"),
        (b"x", "cannot be decoded"),
        ("https://x.org/a.png", "nothing is"),
    ):
        with pytest.raises(examples.DataError, match=f"row 4: the image cannot be read: .*{said}"):
            examples.sample({"image": image, "question": "Which?"}, 4, 1000)


def test_an_address_in_a_json_file_is_not_taken_for_a_path(tmp_path):
    rows = [{"image": "https://example.com/a.png", "question": "Which?", "replies": ["a"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = examples.rows(str(tmp_path / "rows.jsonl"), ("image", "question", "replies"))
    with pytest.raises(examples.DataError, match=r"row 0: .*the address https://example\.com/a\.png"):
        examples.sample(table[0], 0, 1000)
