"""Trains the language stages of nano: the whole model learns to answer, then where things are, then to ask for crops.

The stages are those of ``nano_stages.py``; the last makes the base model, nano-base. SFT and GRPO start from there, by the
recipes ``nano_sft`` and ``nano_grpo``.

    python -m awares_bench.training.nano.language --stage base --tower runs/tower --out runs/base --steps 3000 --stop 2000
    python -m awares_bench.training.nano.tower --start runs/base/checkpoint --walls 0 --steps 800 --lr 1e-3 --out runs/place
    python -m awares_bench.training.nano.language --stage light --start runs/base/checkpoint --tower runs/place \
        --steps 600 --lr 1e-3 --out runs/light
    python -m awares_bench.training.nano.language --stage where --start runs/light/checkpoint --steps 500 --out runs/where
    python -m awares_bench.training.nano.language --stage joint --start runs/where/checkpoint --steps 3600 --lr 1.5e-3 \
        --tower-lr 3e-4 --tower-frozen 0 --out runs/joint
    python -m awares_bench.training.nano.language --stage read --start runs/joint/checkpoint --steps 2400 --lr 4e-4 \
        --tower-lr 1e-4 --tower-frozen 0 --out runs/read
    python -m awares_bench.training.nano.language --stage fetch --start runs/read/checkpoint --steps 1400 --lr 2e-4 \
        --fresh-lr 1.5e-3 --out runs/fetch
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from awares_bench.models.qwen2_5_vl_vision import windowed_attention
from awares_bench.tasks.nano import world

from . import model as nano
from .loop import ParameterGroup, autocast, train
from .pixels import normalise
from .rows import RowEncoder, TrainingRow, collate
from .stages import KINDS, PHASES, STAGES, make_batch, make_row, train_seed


class Learner:
    """Weighted cross-entropy of a Qwen2.5-VL on a collated batch; the tower runs without gradients while it is frozen."""

    def __init__(self, model):
        self.model, self.tower_learns = model, False

    def hidden(self, b: dict):
        """-> the decoder's output for a batch of ``collate``, with the hidden states of every layer."""
        core = self.model.model
        with torch.set_grad_enabled(self.tower_learns and torch.is_grad_enabled()):
            features = core.visual(normalise(b["pixels"]), grid_thw=b["grids"]).pooler_output
        embeds = core.get_input_embeddings()(b["ids"])
        where = (b["ids"] == self.model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(where, features.to(embeds.dtype))
        decoder = core.language_model
        return decoder(
            inputs_embeds=embeds,
            attention_mask=b["mask"],
            position_ids=b["positions"],
            use_cache=False,
            output_hidden_states=True,
        )

    def loss(self, b: dict) -> tuple[torch.Tensor, dict[str, float]]:
        out = self.hidden(b)
        hidden, weights = out.last_hidden_state[:, :-1], b["weights"][:, 1:]
        on = weights > 0
        losses = cross_entropy(self.model.lm_head(hidden[on]).float(), b["ids"][:, 1:][on], reduction="none")
        parts, kind = {}, b["kinds"][:, None].expand_as(on)[on] if "kinds" in b else torch.zeros(0)
        for k in kind.unique().tolist():
            parts[KINDS[k]] = losses[kind == k].mean().item()
        loss = (losses * weights[on]).sum() / weights[on].sum()
        if len(b["hints"]):
            hint = self.hint(out.hidden_states[1], b["hints"])
            parts["hint"] = hint.item()
            loss = loss + b["hint"] * hint
        return loss, parts

    def hint(self, states: torch.Tensor, hints: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the hinted tokens (H, 3: row, position, token) among those of the batch, by likeness to their embeddings."""
        row, at, token = hints.unbind(1)
        known = states[row, at].float()
        known = known / known.square().mean(-1, keepdim=True).sqrt()
        keys, which = token.unique(return_inverse=True)
        return cross_entropy(known @ self.model.get_input_embeddings().weight[keys].float().T, which)

    @torch.no_grad()
    def right(self, rows: list[TrainingRow], encoder: RowEncoder, device: str) -> list[bool]:
        """Whether the last reply of each row is the greedy one, given what precedes it."""
        b = {k: v.to(device) for k, v in collate(rows, encoder).items()}
        with autocast(device):
            hidden = self.hidden(b).last_hidden_state
            out = []
            for i, row in enumerate(rows):
                s, e = row.replies[-1]
                out.append(bool((self.model.lm_head(hidden[i, s - 1 : e - 1]).argmax(-1) == b["ids"][i, s:e]).all()))
        return out


def load(model, start) -> None:
    """The weights of a checkpoint, under a fresh bottom layer if it has one layer less; that layer passes on what it is given."""
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
    """Bring the tower's output to the scale of the token embeddings: zero mean, deviation 0.1, embeddings alike.

    Without it the first language gradients collapse the features to a constant (measured).
    """
    phase = PHASES["base"][-1]
    rows = [make_row(encoder, world.FAMILIES[i % 6], train_seed("base", 0, i), "full", phase) for i in range(48)]
    b = collate(rows, encoder)
    with torch.no_grad():
        features = model.model.visual(normalise(b["pixels"]).to(model.device), grid_thw=b["grids"].to(model.device)).pooler_output
        last = model.model.visual.merger.mlp[2]
        scale = 0.1 / features.std(0).mean()
        last.bias.sub_(features.mean(0))
        last.weight.mul_(scale)
        last.bias.mul_(scale)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    a = parser.parse_args(argv)
    torch.manual_seed(STAGES[a.stage])
    tok = nano.nano_tokenizer()
    encoder, model = RowEncoder(tok), nano.build(tok, nano.Geometry(layers=4 + (a.stage == "fetch"))).to(a.device)
    if a.start:
        load(model, type(model).from_pretrained(a.start, dtype=torch.float32))
    if a.tower:
        state = torch.load(a.tower / "checkpoint.pt", map_location=a.device, weights_only=True)
        model.model.visual.load_state_dict(state["tower"])
        if not a.start:
            calibrate(model, encoder)
    learner = Learner(model)
    tower = list(model.model.visual.parameters())
    fresh = [p for n, p in model.named_parameters() if a.fresh_lr and ".language_model.layers.0." in n]
    language = [p for n, p in model.named_parameters() if ".visual." not in n and not (a.fresh_lr and ".layers.0." in n)]
    frozen = int(a.steps * a.tower_frozen)

    def loss_of(b: dict) -> tuple[torch.Tensor, dict[str, float]]:
        learner.tower_learns = loss_of.step >= frozen
        loss_of.step += 1
        return learner.loss(b)

    checkpoint = a.out / "checkpoint.pt"
    loss_of.step = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0

    def evaluate(step: int) -> dict:
        w, found = world, {}
        first = w.SEEDS["validation"].start
        phase = PHASES[a.stage][-1]
        for mode in ("where", "ask where", "full", "low", "crop", "blind"):
            found[mode] = {}
            for family in w.FAMILIES:
                rows = [make_row(encoder, family, first + i, mode, phase, questions=1) for i in range(48)]
                right = learner.right([r for r in rows if r.replies], encoder, a.device)
                found[mode][family] = round(sum(right) / len(right), 3)
            found[mode]["mean"] = round(sum(found[mode].values()) / len(w.FAMILIES), 3)
        return found

    with windowed_attention(model):
        train(
            {"model": model},
            [
                ParameterGroup(language, a.lr),
                ParameterGroup(tower, a.tower_lr, frozen),
                *([ParameterGroup(fresh, a.fresh_lr)] if fresh else []),
            ],
            lambda step: make_batch(encoder, a.stage, step, a.steps, a.rows),
            loss_of,
            evaluate,
            a.out,
            a.steps,
            stop=a.stop,
            device=a.device,
            evaluate_every=200,
        )
    nano.save(model, nano.processor(tok), a.out / "checkpoint")


if __name__ == "__main__":
    main()
