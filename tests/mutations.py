"""Mistakes that the tests must catch: breaks one line at a time, runs the tests that should notice, puts the line back.

python tests/mutations.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

MUTATIONS = [
    ("a box of the view doubled and not scaled", "baselines/adaptvision.py", 'limits = original if self.compat == "corrected" else', 'limits = original if self.compat == "nothing" else', "test_zoom_policies"),
    ("an unread region shown at any size", "baselines/ergo.py", 'crop = image if self.compat == "official" else', "crop = image if True else", "test_zoom_policies"),
    ("a crop of a crop placed as one of the view", "baselines/zoom_loop.py", "of.inside(region), self.crop_tokens", "region, self.crop_tokens", "test_zoom_policies"),
    ("infinite coordinates read", "awares_bench/methods/tool_calls.py", "-FARTHEST <= v <= FARTHEST", "v == v", "test_zoom_policies"),
    ("the crop's advantage in every turn", "training/rewards.py", "*[a] * (n - 1)) for a, b, n", "*[a + share * b] * (n - 1)) for a, b, n", "test_crop_rewards"),
    ("calls and answers counted together", "training/grpo.py", "tool_tokens / max(calls, 1.0)", "tool_tokens / max(answers, 1.0)", "test_crop_rewards"),
    ("flips counted one way", "reports/data/agreement.py", '"gained": float((~was & now).mean())', '"gained": float((was & ~now).mean())', "test_reports_measures"),
    ("positions one off after an image", "awares_bench/models/qwen2_5_vl.py", "at += max(rows, columns)", "at += max(rows, columns) + 1", "test_vlm"),
    ("rows and columns swapped in M-RoPE", "awares_bench/models/qwen2_5_vl.py", "out[1, i:end], out[2, i:end]", "out[2, i:end], out[1, i:end]", "test_vlm"),
    ("decode position one off", "awares_bench/inference/padded_batch.py", "(filled.cumsum(1) - 1)", "filled.cumsum(1)", "test_vlm"),
    ("padding not masked", "awares_bench/inference/padded_batch.py", "self.mask[b, past - session.length : past] = True", "self.mask[b, :past] = True", "test_vlm"),
    ("cut token forgotten between turns", "awares_bench/inference/batch.py", "session.unfed_tokens = tokens[self.fed[request] :]", "session.unfed_tokens = []", "test_vlm"),
    ("second turn starts one late", "awares_bench/inference/batch.py", "self.next_position[request] + self.fed[request]", "self.next_position[request] + self.fed[request] + 1", "test_vlm"),
    ("a draft that did not hold stays in the cache", "awares_bench/inference/padded_batch.py", "[1] * n + [0] * (len(f) - n)", "[1] * len(f)", "test_grammar"),
    ("windows in the wrong order", "awares_bench/models/qwen_vision.py", "index_copy(0, order,", "index_copy(0, order.flip(0),", "test_vlm"),
    ("attention by products without its scale", "awares_bench/models/qwen_vision.py", "q.float() * q.shape[1] ** -0.5", "q.float()", "test_vlm"),
    ("queries turned the wrong way", "awares_bench/models/qwen_vision.py", "torch.addcmul(a * cos, b, sin, value=-1)", "torch.addcmul(a * cos, b, sin)", "test_vlm"),
    ("features of another picture", "awares_bench/models/base.py", "hashlib.blake2b(image.tobytes(),", "hashlib.blake2b(b'',", "test_scoring"),
    ("tokens of a batch counted without padding", "awares_bench/inference/scheduler.py", "len(costs) * max(costs) <= self.tokens", "sum(costs) <= self.tokens", "test_engine"),
    ("a session half changed when memory runs out", "awares_bench/inference/local_model.py", "r.session.restore(snapshot)", "pass", "test_engine"),
    ("images of the first turn not counted again", "awares_bench/inference/external_model.py", "visual + before + self._text(", "visual + self._text(", "test_endpoint"),
    ("a reply that the context cut is scored", "awares_bench/inference/openai_server.py", "if count < budget:", "if False:", "test_endpoint"),
    ("the end token counted as output", "awares_bench/inference/openai_server.py", "max(0, count - ended)", "max(0, count)", "test_endpoint"),
    ("a second turn meets another replica", "awares_bench/inference/openai_server.py", "request.conversation % self.replicas", "len(session.turns) % self.replicas", "test_endpoint"),
    ("other pixel limits at the server go unseen", "awares_bench/inference/openai_server.py", "if seen == counted:", "if True:", "test_endpoint"),
    ("a repeated crop allowed", "awares_bench/inference/call_grammar.py", "if name is None or name in call.named:", "if name is None:", "test_grammar"),
    ("held to the grammar before it calls", "awares_bench/inference/call_grammar.py", "        if begun is None:\n            return None\n        call = Call()\n", "        if begun is None:\n            return Call()\n        call = Call()\n", "test_grammar"),
    ("a token that runs past the end of a call barred", "awares_bench/inference/call_grammar.py", "if not found:", "if not found or found['rest']:", "test_grammar"),
    ("overruled in silence", "awares_bench/inference/local_model.py", "[*prepared[b].events, *replies[b].events]", "prepared[b].events", "test_grammar"),
    ("batch order reversed", "awares_bench/inference/local_model.py", "enumerate(zip(requests, replies, strict=True))", "enumerate(zip(requests, replies[::-1], strict=True))", "test_vlm"),
    ("crop x and y swapped", "awares_bench/methods/crop_grid.py", "return left, top, max(right, left + 1), max(bottom, top + 1)", "return top, left, max(bottom, top + 1), max(right, left + 1)", "test_crops"),
    ("ratio inverted", "awares_bench/methods/usage.py", "self.prefill / full_tokens", "full_tokens / self.prefill", "test_awares"),
    ("second turn not counted", "awares_bench/methods/conversation.py", "(r.usage for r in self.replies)", "(r.usage for r in self.replies[:1])", "test_awares"),
    ("loss on the question", "training/nano/rows.py", "append(self.encode(f\"{text}<|im_end|>\\n<|im_start|>assistant\\n\"))", "append(self.encode(f\"{text}<|im_end|>\\n<|im_start|>assistant\\n\"), 1.0)", "test_training"),
    ("continuations of a group see each other", "training/packing.py", "for start, end in lines[path]:", "for start, end in columns.values():", "test_scoring"),
    ("first token predicted from another continuation", "training/packing.py", "(before if at == start else left + at - start - 1, ", "(left + at - start - 1, ", "test_scoring"),
    ("call weighted as the answer", "training/rendering.py", "1.0 if sent == len(replies) else call_weight", "1.0", "test_scoring"),
    ("direct answers charged whatever the label", "training/rewards.py", "if needs_crops and not called(r)", "if not called(r)", "test_grpo"),
    ("auxiliary model free of charge", "awares_bench/inference/engine.py", "reply.usage.as_auxiliary()", "Usage()", "test_policies"),
    ("random crop forgets the document", "baselines/random_crop.py", "rng, chosen = random.Random(f\"{self.draw}/{sample.key}\"), []", "rng, chosen = random.Random(f\"{self.draw}\"), []", "test_policies"),
    ("CARES rounds down", "baselines/cares.py", "math.ceil(expected / STEP - 1e-6)", "math.floor(expected / STEP)", "test_policies"),
    ("box x and y swapped", "baselines/cropvlm.py", "x1, y1, x2, y2 = map(float, match.groups())", "y1, x1, y2, x2 = map(float, match.groups())", "test_policies"),
    ("probe one layer late", "awares_bench/inference/hidden_state.py", "for layer in range(run):", "for layer in range(run + 1):", "test_policies"),
    ("a label ignores larger sizes", "training/auxiliary/cares_gate.py", "(utility >= tau) & (later - utility <= delta)", "(utility >= tau)", "test_policies"),
    ("a shared prefill given to the wrong row", "awares_bench/inference/local_model.py", "[places[history] for history in histories]", "[0 for history in histories]", "test_rollout"),
    ("a copied row cache shares its memory", "awares_bench/inference/ragged_batch.py", "self.caches[row].copy() if row in used else self.caches[row]", "self.caches[row]", "test_rollout"),
    ("rows of a line see each other's keys", "awares_bench/inference/ragged_batch.py", "mine = q[:, :, at : at + n]", "mine = q[:, :, :n]", "test_vlm"),
    ("a padded step writes into a row", "awares_bench/inference/varlen_batch.py", "torch.where(place < 0, batch * self.room,", "torch.where(place < 0, 0,", "inference/test_varlen"),
    ("a step sees one key too many", "awares_bench/inference/varlen_batch.py", "seen = (held[:, None] + place + 1)", "seen = (held[:, None] + place + 2)", "inference/test_varlen"),
    ("a recording outlives its block", "awares_bench/inference/varlen_batch.py", "[self.lengths[s] for s in slots], room\n        self.forget_graph()", "[self.lengths[s] for s in slots], room", "inference/test_varlen"),
    ("a kernel is believed unseen", "awares_bench/inference/varlen_attention.py", "if difference <= AGREES[dtype]:", "if True:", "inference/test_varlen"),
    ("cut tokens keep the wrong positions", "awares_bench/models/prompt_chunk.py", "self.positions[:, start:stop][:, chosen]", "self.positions[:, start:stop][:, : len(chosen)]", "test_pruners"),
    ("the layer that has run in place of the next", "awares_bench/inference/layerwise_batch.py", "rope = self.look_ahead(layer + 1, hidden, positions)", "rope = self.look_ahead(layer, hidden, positions)", "test_pruners"),
    ("keys of the earlier turn forgotten where a pruner looks ahead", "awares_bench/inference/layerwise_batch.py", "keys = torch.cat([cached[b][:, left - past : left], keys], 1)", "pass", "test_pruners"),
    ("shares of a second cut counted from the whole picture", "awares_bench/models/prompt_chunk.py", "span.full if attention else len(features)", "span.full", "test_composition"),
    ("gains not computed again", "baselines/_greedy.py", "if known == len(chosen):", "if True:", "test_pruners"),
    ("a chosen token's row not moved", "baselines/cdpruner.py", "kernel[at], place[at] = kernel[i].clone(), place[i].clone()", "place[at] = place[i].clone()", "test_pruners"),
    ("the template read as the question", "awares_bench/models/base.py", "stop = text.index(self.end_of_turn) if self.end_of_turn in text else len(text)", "stop = len(text)", "test_pruners"),
    ("both pruners keep the whole retention", "awares_bench/methods/composition.py", "(default if total is None else total) ** 0.5", "(default if total is None else total)", "test_composition"),
    ("missing score counted as wrong", "reports/data/load.py", "if not isinstance(value, (int, float)) or value != value:", "if False:", "test_reports"),
]  # fmt: skip


def main() -> int:
    survived = []
    for name, file, before, after, test in MUTATIONS:
        path = ROOT / file
        text = path.read_text()
        if text.count(before) != 1:
            raise SystemExit(f"{file}: {before!r} occurs {text.count(before)} times; update this list")
        path.write_text(text.replace(before, after))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-x", str(next((ROOT / "tests").glob(f"**/{test}.py")))],
                cwd=ROOT,
                capture_output=True,
            )
        finally:
            path.write_text(text)
        print(f"{'caught  ' if done.returncode else 'SURVIVED'}  {name}", flush=True)
        survived += [] if done.returncode else [name]
    return len(survived)


if __name__ == "__main__":
    sys.exit(main())
