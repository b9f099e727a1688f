"""VisionSelector's scorer in training: soft top-k, a loss that no split changes, exact resume, a file that the pruner loads, clear errors."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from awares_bench.baselines.visionselector import VisionSelector
from awares_bench.cli import main
from awares_bench.methods.conversation import Turn
from awares_bench.methods.pruner import VisualTokens
from awares_bench.models.scorer import load_scorer
from awares_bench.training import recipe, token_scorer
from awares_bench.training.nano import model as nano
from awares_bench.training.packing import Scorer, pack
from awares_bench.training.rendering import Conversation
from awares_bench.training.token_scorer import FILE, soft_top_k

from ..helpers.tiny import picture, tiny_vlm

COMMAND = (
    "import sys, json; from awares_bench.training import recipe, token_scorer as t; "
    "t.run(recipe.check(t.ScorerRecipe, json.loads(sys.argv[1])))"
)
DIES = """
import os; from awares_bench.training import token_scorer as t; old = t.TokenScorerTrainer.compute_loss
t.TokenScorerTrainer.compute_loss = lambda s, *a, **k: os.kill(os.getpid(), 9) if s.state.global_step == 3 else old(s, *a, **k)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from datasets import Dataset, Image

    folder = tmp_path_factory.mktemp("scorer")
    nano.save(tiny_vlm().host.model, tiny_vlm().host.processor, folder / "start")
    rows = [
        {"image": picture(112 + 56 * (i % 3), 112, i), "question": f"Number {i}?", "answers": [str(40 + i)]} for i in range(8)
    ]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / "rows.parquet")
    return folder


def settings(place, out, **more):
    said = {"start": str(place / "start"), "data": str(place / "rows.parquet"), "out": str(place / out), "device": "cpu"}
    said |= {
        "batch": 4,
        "micro_batch": 4,
        "steps": 4,
        "lr": 1e-2,
        "retention": 0.25,
        "hidden": 8,
        "log_every": 1,
        "save_every": 2,
    }
    return said | more


def train(place, out, **more):
    token_scorer.run(recipe.check(token_scorer.ScorerRecipe, settings(place, out, **more)))
    return figures(place / out)


def figures(folder):
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    return {x["step"]: (x["loss"], x["grad_norm"]) for x in lines}


@pytest.mark.parametrize(("scores", "k"), [([0.0] * 7, 3), ([5.0, -5.0, 0.0, 100.0, -100.0], 2), ([1e-4, 2e-4, 0.0], 1)])
def test_soft_weights_sum_to_the_budget_and_keep_the_order(scores, k):
    scores = torch.tensor(scores)
    weight = soft_top_k(scores, k).sigmoid()
    assert weight.sum().item() == pytest.approx(k, abs=1e-4)
    assert (weight[scores.argsort()].diff() >= 0).all()


def test_the_gradient_of_soft_top_k_is_that_of_the_moving_threshold():
    scores = torch.randn(12, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_top_k(x, 5).sigmoid(), scores, eps=1e-5, atol=1e-6)
    assert soft_top_k(scores, 12).sigmoid().tolist() == [1.0] * 12


@pytest.mark.parametrize("weighs", ["features", "attention"])
def test_the_loss_falls_and_is_the_same_for_every_micro_batch(place, weighs):
    whole = train(place, f"whole-{weighs}", weighs=weighs)
    parts = train(place, f"parts-{weighs}", weighs=weighs, micro_batch=1)
    for step in whole:
        assert parts[step] == pytest.approx(whole[step], rel=1e-4)
    alone = train(place, f"alone-{weighs}", weighs=weighs, constraint_start=0.0, constraint_end=0.0, steps=20)
    assert min(loss for loss, _ in alone.values()) < alone[1][0]


def test_noise_is_of_a_picture_and_a_step_whatever_the_batch_and_drops_tokens_from_the_first_step(place):
    said = {"noise": 4.0, "weighs": "attention", "constraint_start": 0.0, "constraint_end": 0.0, "steps": 2}
    whole, parts = train(place, "noisy", **said), train(place, "noisy-parts", micro_batch=1, **said)
    assert whole.keys() == parts.keys() and all(parts[step] == pytest.approx(whole[step], rel=1e-4) for step in whole)
    module = token_scorer.build(recipe.check(token_scorer.ScorerRecipe, settings(place, "noisy-by-hand", **said))).scorer
    image = module.host.image_input(picture(168, 112))
    (run,) = module.host.encode([image])
    with torch.no_grad():
        first, again = (module.choose(run.features, [image])[0] for _ in range(2))
        module.step = 1
        later = module.choose(run.features, [image])[0]
        module.eval()
        quiet = module.choose(run.features, [image])[0].sigmoid()
    assert torch.equal(first, again) and not torch.allclose(first, later)
    assert quiet.max() - quiet.min() < 1e-3 and first.sigmoid().max() - first.sigmoid().min() > 0.8


def test_the_loss_is_the_answers_and_the_distance_from_a_hard_choice(place):
    said = recipe.check(token_scorer.ScorerRecipe, settings(place, "by-hand"))
    first = train(place, "by-hand")[1][0]
    trainer = token_scorer.build(said)
    talks = next(iter(trainer.get_train_dataloader()))
    module, host, nll, scored, distance, visual = trainer.scorer, trainer.vlm.host, 0.0, 0, 0.0, 0
    for talk in talks:
        (run,) = host.encode(talk.images)
        packed = pack([[talk]], host)
        with torch.no_grad():
            scores = module.scorer.scores(run.features)
            weight = soft_top_k(scores, max(1, int(len(scores) * 0.25))).sigmoid()
            out, _ = Scorer(host)(packed, run.features * weight[:, None])
        best = scores.argsort(descending=True, stable=True)[: max(1, int(len(scores) * 0.25))]
        hard = torch.zeros_like(scores).index_fill_(0, best, 1.0)
        nll, scored = nll - out.sum().item(), scored + len(out)
        distance += torch.nn.functional.binary_cross_entropy(weight, hard, reduction="sum").item()
        visual += len(scores)
    assert first == pytest.approx(nll / scored + 0.1 * distance / visual, rel=1e-4)


def test_weights_at_their_ends_are_the_prompt_without_the_dropped_tokens():
    """What ``weighs: attention`` tends to is what the pruner does: rows whose dropped tokens are left out score the same."""
    vlm = tiny_vlm()
    host, image = vlm.host, vlm.host.image_input(picture(112, 112))
    talk = Conversation()
    talk.add_context(host.render([Turn((picture(112, 112),), "What?")], [], [image]), [image])
    talk.add_reply([*host.reply_tokens("42"), host.end_of_turn])
    packed, (run,) = pack([[talk]], host), host.encode([image])
    module = token_scorer.SoftSelection(host, recipe.check(token_scorer.ScorerRecipe, {"start": "", "data": "", "out": ""}))
    kept = torch.zeros(len(run.features), dtype=torch.bool)
    kept[[1, 4, 6, 11]] = True
    logits = torch.where(kept, 50.0, -200.0)
    mask = module.weighted(packed, logits, torch.float32)
    places = (packed.ids[0] == host.image_token).nonzero()[:, 0]
    left = torch.ones(packed.ids.shape[1], dtype=torch.bool)
    left[places[~kept]] = False
    with torch.no_grad():
        soft = host.hidden_states(packed.ids, run.features, packed.positions, mask)[0, left]
        hard = host.hidden_states(
            packed.ids[:, left], run.features[kept], packed.positions[..., left], torch.ones(1, int(left.sum()), dtype=torch.long)
        )[0]
    torch.testing.assert_close(soft, hard, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("weighs", ["features", "attention"])
def test_a_run_killed_after_a_checkpoint_resumes_to_the_same_digits(place, weighs):
    whole = train(place, f"uncut-{weighs}", weighs=weighs)
    said = settings(place, f"cut-{weighs}", weighs=weighs)
    assert subprocess.run([sys.executable, "-c", DIES + COMMAND, json.dumps(said)], capture_output=True).returncode == -9
    assert not (place / f"cut-{weighs}" / FILE).exists()
    assert train(place, f"cut-{weighs}", weighs=weighs) == whole
    uncut, cut = (load_file(place / f"{name}-{weighs}" / FILE) for name in ("uncut", "cut"))
    assert all(torch.equal(uncut[part], cut[part]) for part in uncut)


def test_a_run_goes_on_from_its_checkpoint(place):
    """In one process: the run of four steps again, after its last two are forgotten."""
    whole = train(place, "forgets", keep=3)
    done = load_file(place / "forgets" / FILE)
    shutil.rmtree(place / "forgets" / "checkpoint-4")
    (place / "forgets" / FILE).unlink()
    assert train(place, "forgets", keep=3) == whole
    again = load_file(place / "forgets" / FILE)
    assert all(torch.equal(done[part], again[part]) for part in done)


def test_the_file_is_what_the_pruner_loads_and_keeps_the_same_tokens(place, capsys):
    said = recipe.check(token_scorer.ScorerRecipe, settings(place, "file"))
    path = token_scorer.run(said)
    assert load_scorer(str(path)).fingerprint in capsys.readouterr().out
    trainer = token_scorer.build(said)
    trainer._load_from_checkpoint(str(place / "file" / "checkpoint-4"))
    image = trainer.vlm.host.image_input(picture(168, 112))
    (run,) = trainer.vlm.host.encode([image])
    with torch.no_grad():
        _, kept = trainer.scorer.choose(run.features, [SimpleNamespace(seed=0, runs=(run.grid,))])
    pruner = VisionSelector(0.25, str(path))
    n = pruner.tokens_to_keep(len(run.features), 0.25)
    chosen = pruner.select(VisualTokens(run.features, run.grid), n)
    assert kept.nonzero()[:, 0].tolist() == chosen.tolist() and len(chosen) == n
    token_scorer.write(trainer.scorer, path, torch.bfloat16)
    assert load_file(path)["q_proj.weight"].dtype == torch.bfloat16 and load_file(path)["q_proj.weight"].shape == (8, 64)


def test_the_command_shows_a_batch_and_refuses_what_it_cannot_train_on(place, tmp_path, capsys):
    words = [f"{k}={json.dumps(v)}" for k, v in settings(place, "dry").items()]
    assert main(["train", "scorer", "nano_scorer", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "visual tokens kept" in said and "no step was taken" in said and not (place / "dry").exists()
    assert main(["train", "scorer", "nano_scorer", *words, "retention=1.0"]) == 1
    assert "retention is 1.0; it must be at most 0.99" in capsys.readouterr().err
    assert main(["train", "scorer", "nano_scorer", *words, "data=nano:some"]) == 1
    assert "nano rows are asked for as nano:COUNT" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "question": "Which?"}\n')
    assert main(["train", "scorer", "nano_scorer", *words, f"data={tmp_path / 'rows.jsonl'}"]) == 1
    assert "has neither replies nor answers" in capsys.readouterr().err
