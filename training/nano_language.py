"""The language stages of nano: the whole model learns to answer, then where things are, then to ask for crops.

``base``   lists and questions on growing canvases at full size, at half size, and at half size with a crop already fetched.
           A list names keys in random order and is scored on the contents only: a look-up in one attention hop, the key being
           the token just read. Questions alone do not form the look-up in 1,000 steps (measured); lists first, they do.
``light``  the base gets used to a tower that went on learning (``tower --start``: the slanted light, places and regions).
``where``  lists of regions in place of contents, from pictures of one panel to whole ones, then calls for the cheapest crops.
           Growing is what makes it learn: with one panel a region is read off within 50 steps and carries over to five panels
           at once; on whole pictures from the start it stayed at chance for 600 (both measured).
``joint``  the tower learns too; two-turn rows go on asking about what else lies in the fetched crops (more reading per picture),
           and some fetch more than they need, so that no crop is strange to the model.
``read``   mostly two-turn rows about small writing. After ``joint`` the second turn gave the half-size guess again on a fifth of
           the questions that half size had wrong (the whole picture reads them all).
``fetch``  a fresh layer below the others, taught to know the question's key where the answer is written. A question that follows its
           picture is looked up by the key's own token, in the bottom layer; after a crop no such token comes, and the answer's
           place had to fetch the key first and look up with what layers were left. It took the wrong field of the crop in one
           form of twelve, in none when the question was repeated after the crop (both measured). Half-size views of other
           pictures (rows ``blind``) make it read the crop. Its result is the base model, nano-base.

SFT and GRPO start from there, by the recipes ``nano_sft`` and ``nano_grpo``.

    python -m awares_bench.training.nano_language --stage base --tower runs/tower --out runs/base --steps 3000 --stop 2000
    python -m awares_bench.training.tower --start runs/base/checkpoint --walls 0 --steps 800 --lr 1e-3 --out runs/place
    python -m awares_bench.training.nano_language --stage light --start runs/base/checkpoint --tower runs/place \
        --steps 600 --lr 1e-3 --out runs/light
    python -m awares_bench.training.nano_language --stage where --start runs/light/checkpoint --steps 500 --out runs/where
    python -m awares_bench.training.nano_language --stage joint --start runs/where/checkpoint --steps 3600 --lr 1.5e-3 \
        --tower-lr 3e-4 --tower-frozen 0 --out runs/joint
    python -m awares_bench.training.nano_language --stage read --start runs/joint/checkpoint --steps 2400 --lr 4e-4 \
        --tower-lr 1e-4 --tower-frozen 0 --out runs/read
    python -m awares_bench.training.nano_language --stage fetch --start runs/read/checkpoint --steps 1400 --lr 2e-4 \
        --fresh-lr 1.5e-3 --out runs/fetch
"""

from __future__ import annotations

import argparse
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from awares_bench.training import nano
from awares_bench.training.conversation import Row, Writer, collate
from awares_bench.training.loop import Group, autocast, train
from awares_bench.training.pixels import half, normalise
from awares_bench.training.world import world
from torch.nn.functional import cross_entropy

from awares_bench.crops import PAPER_GRID
from awares_bench.vision_attention import windowed_attention

STAGES = {"base": 0, "light": 2, "where": 3, "joint": 4, "read": 5, "fetch": 6}
KINDS = ("list", "where", "ask where", "full", "low", "crop", "blind")


@dataclass(frozen=True)
class Phase:
    """A stretch of training: until (share of the steps), picture size, panels per picture, share of each kind of row.

    families: how often each comes up. varied: see ``ask`` of the world.
    call: loss weight of the call in ``crop`` rows, which always call.
    more: further questions of a ``crop`` row, about panels that lie in its crops. wide: share of such rows that fetch other
        regions than the cheapest: ones that hold the evidence too. small: share of such rows that ask about small writing first.
    hint: loss weight, in two-turn rows, of knowing the question's key after the bottom layer wherever the answer is written.
    """

    until: float
    size: tuple[int, int]
    count: tuple[int, int]
    mix: dict[str, float]
    families: tuple[float, ...] = (1, 1, 1, 1, 1, 1)
    varied: bool = True
    call: float = 0.0
    more: int = 0
    wide: float = 0.0
    small: float = 0.0
    hint: float = 0.0


PHASES = {
    "base": (
        Phase(0.10, (112, 112), (1, 2), {"list": 0.7, "full": 0.3}),
        Phase(0.25, (224, 224), (2, 4), {"list": 0.6, "full": 0.3, "crop": 0.1}),
        Phase(0.50, (224, 224), (3, 5), {"list": 0.15, "full": 0.35, "low": 0.2, "crop": 0.3}),
        Phase(
            1.00, (224, 224), (3, 5), {"list": 0.1, "full": 0.4, "low": 0.15, "crop": 0.35}, (1, 2, 0.7, 2, 0.5, 2), varied=False
        ),
    ),
    "light": (
        Phase(
            1.00,
            (224, 224),
            (3, 5),
            {"list": 0.05, "where": 0.17, "ask where": 0.18, "full": 0.2, "low": 0.1, "crop": 0.3},
            (1, 2, 0.7, 2, 0.5, 2),
            varied=False,
            call=1.0,
        ),
    ),
    "where": (
        Phase(0.12, (224, 224), (1, 1), {"where": 1.0}),
        Phase(0.24, (224, 224), (1, 3), {"where": 0.7, "ask where": 0.3}),
        Phase(
            1.00,
            (224, 224),
            (3, 5),
            {"list": 0.05, "where": 0.1, "ask where": 0.1, "full": 0.25, "low": 0.1, "crop": 0.4},
            (1, 3, 0.8, 1.2, 0.5, 1.2),
            varied=False,
            call=1.0,
        ),
    ),
    "joint": tuple(
        Phase(until, (224, 224), (3, 5), mix, families, varied=False, call=1.0, more=3, wide=0.25)
        for until, families, mix in (
            (
                0.27,
                (1, 2.5, 0.8, 1.5, 0.5, 1.2),
                {"list": 0.04, "where": 0.1, "ask where": 0.12, "full": 0.18, "low": 0.08, "crop": 0.48},
            ),
            (
                0.67,
                (1, 2.5, 0.8, 1.5, 0.5, 1.2),
                {"list": 0.03, "where": 0.1, "ask where": 0.12, "full": 0.15, "low": 0.18, "crop": 0.42},
            ),
            (
                1.00,
                (1.8, 3, 0.7, 1.5, 0.5, 0.9),
                {"list": 0.02, "where": 0.08, "ask where": 0.14, "full": 0.08, "low": 0.16, "crop": 0.52},
            ),
        )
    ),
    "read": (
        Phase(
            1.00,
            (224, 224),
            (3, 5),
            {"list": 0.01, "where": 0.04, "ask where": 0.1, "full": 0.05, "low": 0.1, "crop": 0.7},
            (2.4, 3, 1.2, 1.2, 0.5, 0.9),
            varied=False,
            call=1.0,
            more=3,
            wide=0.25,
            small=0.8,
        ),
    ),
    "fetch": (
        Phase(
            1.00,
            (224, 224),
            (3, 5),
            {"where": 0.02, "ask where": 0.08, "full": 0.04, "low": 0.1, "crop": 0.64, "blind": 0.12},
            (2, 2.4, 1.4, 1.2, 0.7, 1.2),
            varied=False,
            call=1.0,
            more=1,
            wide=0.25,
            small=0.3,
            hint=0.3,
        ),
    ),
}


def train_seed(stage: str, step: int, i: int) -> int:
    """A document seed that no validation or suite document has."""
    seed = (STAGES[stage] << 36) + step * 256 + i
    assert seed in world().SEEDS["train"], f"seed {seed} is outside the training range"
    return seed


def list_row(writer: Writer, view, panels: list, regions: list[str] | None = None) -> Row:
    """ "List everything." and the panels as ``key content,`` with loss on the contents; panels that share a key are left out.

    regions: crop ids of the panels, to be listed in place of their contents.
    """
    keys = [p.key for p in panels]
    row = writer.row([([view], "Where is everything?" if regions else "List everything.", "", 0.0)])
    del row.ids[-1], row.weights[-1], row.replies[-1]
    for i, panel in enumerate(panels):
        if keys.count(panel.key) > 1:
            continue
        if regions:
            said = ((f" {panel.key}", 0.0), (regions[i], 1.0), (",", 0.0))
        else:
            content = panel.content if panel.family in ("chart", "doc", "ocr") else f" {panel.content}"
            said = ((f" {panel.key}", 0.0), (content, 1.0), (",", 0.0))
        for text, weight in said:
            if weight:
                row.replies.append((len(row.ids), len(row.ids) + len(writer.encode(text))))
            row.ids += writer.encode(text)
            row.weights += [weight] * len(writer.encode(text))
    return row


def region_id(panel, size: tuple[int, int]) -> str:
    """The id, as a call writes it, of the cheapest region that holds a panel."""
    return _id(*PAPER_GRID.cheapest_cover([panel.box], *size))


def _id(name: str) -> str:
    return next((i for i, known in PAPER_GRID.ids.items() if known == name), name)


def make_row(writer: Writer, family: str, seed: int, mode: str, phase: Phase, questions: int = 3) -> Row:
    """One training conversation; ``full`` and ``low`` ask several questions about their picture, one after another.

    ``blind`` is ``crop`` after the half-size view of another picture, with no loss on its call.
    """
    w = world()
    rng = w.stream(family, seed)
    image, panels = w.family_scene(rng, family, phase.count, phase.size)
    if mode in ("list", "where"):
        panels = rng.sample(panels, len(panels))
        regions = [region_id(p, image.size) for p in panels] if mode == "where" else None
        return list_row(writer, half(image) if rng.random() < (0.8 if regions else 0.3) else image, panels, regions)
    order = rng.sample(panels, len(panels)) if questions > 1 else [rng.choice(panels)]
    if mode in ("crop", "blind") and questions > 1 and phase.small and rng.random() < phase.small:
        order.sort(key=lambda p: p.large)
    asked = []
    for panel in order[: questions if mode in ("full", "low", "ask where") else 1]:
        question, answer, options, evidence = w.ask(rng, panels, panel, phase.varied)
        if mode == "ask where":
            names = PAPER_GRID.cheapest_cover([p.box for p in evidence], *image.size)
            asked.append((f"{question} Where?", ", ".join(map(_id, names)), evidence))
            continue
        asked.append((w.prompt(family, question, options), answer, evidence))
    if mode in ("full", "low", "ask where"):
        view = image if mode == "full" else half(image)
        return writer.row([([view] if i == 0 else [], text, answer, 1.0) for i, (text, answer, _) in enumerate(asked)])
    text, answer, evidence = asked[0]
    names = PAPER_GRID.cheapest_cover([p.box for p in evidence], *image.size)
    call_weight, later = phase.call, []
    if questions > 1:
        if rng.random() < phase.wide:
            names, call_weight = rng.choice(_holding(evidence, image.size)), 0.0
        for panel in order[1:]:
            question, reply, options, needs = w.ask(rng, panels, panel, phase.varied)
            if len(later) < phase.more and PAPER_GRID.holds(names, [p.box for p in needs], *image.size):
                later.append(([], w.prompt(family, question, options), reply, 1.0))
    first = image
    if mode == "blind":
        first, call_weight = w.family_scene(rng, family, phase.count, phase.size)[0], 0.0
    turns = [([half(first)], text, PAPER_GRID.format(names), call_weight), (PAPER_GRID.cut(image, names), "", answer, 1.0)]
    row = writer.row(turns + later, PAPER_GRID.prompt)
    if phase.hint:
        start, end = row.replies[1]
        (key,) = writer.encode(f" {evidence[0].key}")
        row.hints = [(at, key) for at in range(start - 1, end - 2)]
    return row


def _holding(panels: list, size: tuple[int, int]) -> list[tuple[str, ...]]:
    """Every single region, ``all`` among them, that holds the panels."""
    return [(name,) for name in (*PAPER_GRID.names, "all") if PAPER_GRID.holds((name,), [p.box for p in panels], *size)]


def make_batch(writer: Writer, stage: str, step: int, steps: int, rows: int) -> dict:
    w, rng = world(), random.Random(f"{stage}/{step}")
    phases = [p for p in PHASES[stage] if step / steps < p.until]
    out, kinds = [], []
    for i in range(rows):
        earlier = PHASES[stage][: len(PHASES[stage]) - len(phases)]
        phase = rng.choice(earlier) if earlier and rng.random() < 0.1 else phases[0]
        mode = rng.choices(list(phase.mix), list(phase.mix.values()))[0]
        family = w.FAMILIES[i % len(w.FAMILIES)] if len(set(phase.families)) == 1 else rng.choices(w.FAMILIES, phase.families)[0]
        out.append(make_row(writer, family, train_seed(stage, step, i), mode, phase))
        kinds.append(KINDS.index(mode))
    return collate(out, writer) | {"kinds": torch.tensor(kinds), "hint": phases[0].hint}


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
    def right(self, rows: list[Row], writer: Writer, device: str) -> list[bool]:
        """Whether the last reply of each row is the greedy one, given what precedes it."""
        b = {k: v.to(device) for k, v in collate(rows, writer).items()}
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


def calibrate(model, writer: Writer) -> None:
    """Bring the tower's output to the scale of the token embeddings: zero mean, deviation 0.1, embeddings alike.

    Without it the first language gradients collapse the features to a constant (measured).
    """
    phase = PHASES["base"][-1]
    rows = [make_row(writer, world().FAMILIES[i % 6], train_seed("base", 0, i), "full", phase) for i in range(48)]
    b = collate(rows, writer)
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
    writer, model = Writer(tok), nano.build(tok, nano.Geometry(layers=4 + (a.stage == "fetch"))).to(a.device)
    if a.start:
        load(model, type(model).from_pretrained(a.start, dtype=torch.float32))
    if a.tower:
        state = torch.load(a.tower / "checkpoint.pt", map_location=a.device, weights_only=True)
        model.model.visual.load_state_dict(state["tower"])
        if not a.start:
            calibrate(model, writer)
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
        w, found = world(), {}
        first = w.SEEDS["validation"].start
        phase = PHASES[a.stage][-1]
        for mode in ("where", "ask where", "full", "low", "crop", "blind"):
            found[mode] = {}
            for family in w.FAMILIES:
                rows = [make_row(writer, family, first + i, mode, phase, questions=1) for i in range(48)]
                right = learner.right([r for r in rows if r.replies], writer, a.device)
                found[mode][family] = round(sum(right) / len(right), 3)
            found[mode]["mean"] = round(sum(found[mode].values()) / len(w.FAMILIES), 3)
        return found

    with windowed_attention(model):
        train(
            {"model": model},
            [Group(language, a.lr), Group(tower, a.tower_lr, frozen), *([Group(fresh, a.fresh_lr)] if fresh else [])],
            lambda step: make_batch(writer, a.stage, step, a.steps, a.rows),
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
