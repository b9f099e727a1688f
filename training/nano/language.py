"""Trains nano's language stages: the model learns to answer questions, then where things are, then to ask for crops.

``stages`` describes them; the last one makes the base model, nano-base, from which the recipes ``nano_sft`` and ``nano_grpo``
start.

    awares-bench nano language --stage base --tower runs/tower --out runs/base --steps 3000 --stop 2000
    awares-bench nano tower --start runs/base/checkpoint --walls 0 --steps 800 --lr 1e-3 --out runs/place
    awares-bench nano language --stage light --start runs/base/checkpoint --tower runs/place \
        --steps 600 --lr 1e-3 --out runs/light
    awares-bench nano language --stage where --start runs/light/checkpoint --steps 500 --out runs/where
    awares-bench nano language --stage joint --start runs/where/checkpoint --steps 3600 --lr 1.5e-3 \
        --tower-lr 3e-4 --tower-frozen 0 --out runs/joint
    awares-bench nano language --stage read --start runs/joint/checkpoint --steps 2400 --lr 4e-4 \
        --tower-lr 1e-4 --tower-frozen 0 --out runs/read
    awares-bench nano language --stage fetch --start runs/read/checkpoint --steps 1400 --lr 2e-4 \
        --fresh-lr 1.5e-3 --out runs/fetch
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from awares_bench.models.qwen_vision import windowed_attention
from awares_bench.tasks.nano import world

from .. import script
from . import model as nano
from .loop import LoopSettings, ParameterGroup, autocast, train
from .pixels import normalise
from .rows import RowEncoder, TrainingRow, collate
from .stages import KINDS, PHASES, STAGES, make_batch, make_row, train_seed


class Learner:
    """Weighted cross-entropy of a Qwen2.5-VL on a batch of ``collate``. The tower runs without gradients while it is frozen."""

    def __init__(self, model):
        self.model, self.tower_learns = model, False

    def hidden(self, batch: dict):
        """-> the decoder's output, with the hidden states of every layer."""
        core = self.model.model
        with torch.set_grad_enabled(self.tower_learns and torch.is_grad_enabled()):
            features = core.visual(normalise(batch["pixels"]), grid_thw=batch["grids"]).pooler_output
        embeds = core.get_input_embeddings()(batch["ids"])
        is_image = (batch["ids"] == self.model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(is_image, features.to(embeds.dtype))
        return core.language_model(
            inputs_embeds=embeds,
            attention_mask=batch["mask"],
            position_ids=batch["positions"],
            use_cache=False,
            output_hidden_states=True,
        )

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """-> the loss, and the mean cross-entropy of each kind of row."""
        out = self.hidden(batch)
        hidden, weights = out.last_hidden_state[:, :-1], batch["weights"][:, 1:]
        mask = weights > 0
        losses = cross_entropy(self.model.lm_head(hidden[mask]).float(), batch["ids"][:, 1:][mask], reduction="none")
        parts, kinds = {}, batch["kinds"][:, None].expand_as(mask)[mask] if "kinds" in batch else torch.zeros(0)
        for kind in kinds.unique().tolist():
            parts[KINDS[kind]] = losses[kinds == kind].mean().item()
        loss = (losses * weights[mask]).sum() / weights[mask].sum()
        if len(batch["hints"]):
            hint = self.hint_loss(out.hidden_states[1], batch["hints"])
            parts["hint"] = hint.item()
            loss = loss + batch["hint"] * hint
        return loss, parts

    def hint_loss(self, states: torch.Tensor, hints: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of picking each hint's token among all hinted ones, by the likeness of states to embeddings.

        states (B, L, D) after a layer; hints (H, 3): row, position, token.
        """
        row, position, token = hints.unbind(1)
        queries = states[row, position].float()
        queries = queries / queries.square().mean(-1, keepdim=True).sqrt()
        candidates, target = token.unique(return_inverse=True)
        return cross_entropy(queries @ self.model.get_input_embeddings().weight[candidates].float().T, target)

    @torch.no_grad()
    def writes_replies(self, rows: list[TrainingRow], encoder: RowEncoder, device: str) -> list[bool]:
        """Whether the last reply of each row is the greedy one, given what precedes it."""
        batch = {k: v.to(device) for k, v in collate(rows, encoder).items()}
        with autocast(device):
            hidden = self.hidden(batch).last_hidden_state
            out = []
            for i, row in enumerate(rows):
                start, end = row.replies[-1]
                greedy = self.model.lm_head(hidden[i, start - 1 : end - 1]).argmax(-1)
                out.append(bool((greedy == batch["ids"][i, start:end]).all()))
        return out


def load(model, start) -> None:
    """Copy the weights of ``start`` into ``model``.

    If the model has one layer more, its bottom layer is new, and is set to pass on its input unchanged.
    """
    state = start.state_dict()
    if len(model.model.language_model.layers) == len(start.model.language_model.layers) + 1:
        bottom = model.model.language_model.layers[0]
        for last in (bottom.self_attn.o_proj, bottom.mlp.down_proj):
            torch.nn.init.zeros_(last.weight)
        lower = r"(model\.language_model\.layers\.)(\d+)"
        state = {re.sub(lower, lambda m: f"{m[1]}{int(m[2]) + 1}", name): value for name, value in state.items()}
        state |= {f"model.language_model.layers.0.{name}": value for name, value in bottom.state_dict().items()}
    model.load_state_dict(state)


def calibrate(model, encoder: RowEncoder) -> None:
    """Scale the tower's output and the token embeddings alike: zero mean, standard deviation 0.1.

    Without this the first gradients of the language model collapse the features to a constant (measured).
    """
    phase = PHASES["base"][-1]
    rows = [make_row(encoder, world.FAMILIES[i % 6], train_seed("base", 0, i), "full", phase) for i in range(48)]
    batch = collate(rows, encoder)
    pixels, grids = normalise(batch["pixels"]).to(model.device), batch["grids"].to(model.device)
    with torch.no_grad():
        features = model.model.visual(pixels, grid_thw=grids).pooler_output
        last = model.model.visual.merger.mlp[2]
        scale = 0.1 / features.std(0).mean()
        last.bias.sub_(features.mean(0))
        last.weight.mul_(scale)
        last.bias.mul_(scale)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tower", type=Path, help="run folder of the tower stage (base, light)")
    parser.add_argument("--start", type=Path, help="checkpoint folder to go on from (all but base)")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stop", type=int, help="stop after this step of the schedule (default: --steps)")
    parser.add_argument("--rows", type=int, default=36, help="conversations per step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--fresh-lr", type=float, help="learning rate of the bottom layer (fetch)")
    parser.add_argument("--tower-lr", type=float, default=1e-4)
    parser.add_argument("--tower-frozen", type=float, default=1.0, help="share of the steps before the tower learns too")
    parser.add_argument("--device", default="cpu")


def main(args: argparse.Namespace) -> int:
    # 1) Build the model, and load a checkpoint or a tower or both.
    torch.manual_seed(STAGES[args.stage])
    tokenizer = nano.nano_tokenizer()
    encoder = RowEncoder(tokenizer)
    model = nano.build(tokenizer, nano.Geometry(layers=4 + (args.stage == "fetch"))).to(args.device)
    if args.start:
        load(model, type(model).from_pretrained(args.start, dtype=torch.float32))
    if args.tower:
        state = torch.load(args.tower / "checkpoint.pt", map_location=args.device, weights_only=True)
        model.model.visual.load_state_dict(state["tower"])
        if not args.start:
            calibrate(model, encoder)

    # 2) Group the parameters: language, tower, and the bottom layer where it has a learning rate of its own.
    learner, frozen_steps = Learner(model), int(args.steps * args.tower_frozen)
    tower = list(model.model.visual.parameters())
    bottom = [p for n, p in model.named_parameters() if args.fresh_lr and ".language_model.layers.0." in n]
    language = [p for n, p in model.named_parameters() if ".visual." not in n and not (args.fresh_lr and ".layers.0." in n)]
    groups = [ParameterGroup(language, args.lr), ParameterGroup(tower, args.tower_lr, frozen_steps)]
    groups += [ParameterGroup(bottom, args.fresh_lr)] if bottom else []

    def loss_of(batch: dict, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        learner.tower_learns = step >= frozen_steps
        return learner.loss(batch)

    def evaluate(step: int) -> dict:
        """Accuracy on validation documents, by kind of row and family of questions."""
        accuracy: dict[str, dict[str, float]] = {}
        first = world.SEEDS["validation"].start
        phase = PHASES[args.stage][-1]
        for mode in ("where", "ask where", "full", "low", "crop", "blind"):
            accuracy[mode] = {}
            for family in world.FAMILIES:
                rows = [make_row(encoder, family, first + i, mode, phase, questions=1) for i in range(48)]
                outcomes = learner.writes_replies([r for r in rows if r.replies], encoder, args.device)
                accuracy[mode][family] = round(sum(outcomes) / len(outcomes), 3)
            accuracy[mode]["mean"] = round(sum(accuracy[mode].values()) / len(world.FAMILIES), 3)
        return accuracy

    # 3) Train, and save a checkpoint that transformers loads.
    with windowed_attention(model.model.visual):
        train(
            {"model": model},
            groups,
            lambda step: make_batch(encoder, args.stage, step, args.steps, args.rows),
            loss_of,
            evaluate,
            args.out,
            LoopSettings(args.steps, stop=args.stop, device=args.device, evaluate_every=200),
        )
    nano.save(model, nano.processor(tokenizer), args.out / "checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(script.run(__doc__, add_arguments, main))
