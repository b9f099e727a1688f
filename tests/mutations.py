"""Mistakes that the tests must catch: breaks one line at a time, runs the tests that should notice, puts the line back.

python tests/mutations.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

MUTATIONS = [
    ("positions one off after an image", "awares_bench/vlm.py", "at + max(rows, columns)", "at + max(rows, columns) + 1", "test_vlm"),
    ("rows and columns swapped in M-RoPE", "awares_bench/vlm.py", "torch.zeros_like(r), r, c", "torch.zeros_like(r), c, r", "test_vlm"),
    ("decode position one off", "awares_bench/vlm.py", "(self.next + step)", "(self.next + step + 1)", "test_vlm"),
    ("padding not masked", "awares_bench/vlm.py", "self.mask[b, past - session.length : past] = 1", "self.mask[b, :past] = 1", "test_vlm"),
    ("cut token forgotten between turns", "awares_bench/vlm.py", "session.pending = tokens[fed:]", "session.pending = []", "test_vlm"),
    ("second turn starts one late", "awares_bench/vlm.py", "int(self.next[b]) + fed", "int(self.next[b]) + fed + 1", "test_vlm"),
    ("batch order reversed", "awares_bench/vlm.py", "enumerate(zip(requests, written, strict=True))", "enumerate(zip(requests, written[::-1], strict=True))", "test_vlm"),
    ("crop x and y swapped", "awares_bench/crops.py", "return left, top, max(right, left + 1), max(bottom, top + 1)", "return top, left, max(bottom, top + 1), max(right, left + 1)", "test_crops"),
    ("ratio inverted", "awares_bench/usage.py", "self.prefill / full_tokens", "full_tokens / self.prefill", "test_awares"),
    ("second turn not counted", "awares_bench/trajectory.py", "(r.usage for r in self.replies)", "(r.usage for r in self.replies[:1])", "test_awares"),
    ("loss on the question", "training/conversation.py", "say(self.encode(f\"{text}<|im_end|>\\n<|im_start|>assistant\\n\"))", "say(self.encode(f\"{text}<|im_end|>\\n<|im_start|>assistant\\n\"), 1.0)", "test_training"),
    ("continuations of a group see each other", "training/scoring.py", "(segment[:, None] == segment[..., None])", "(segment[:, None] > 0)", "test_scoring"),
    ("first token predicted from another continuation", "training/scoring.py", "before = shared - 1 if at == shared else start + at - shared - 1", "before = start + at - shared - 1", "test_scoring"),
    ("call weighted as the answer", "training/scoring.py", "1.0 if sent == len(replies) else call_weight", "1.0", "test_scoring"),
    ("direct answers charged whatever the label", "training/rewards.py", 'if truth.label == "HR" and not called(r)', "if not called(r)", "test_grpo"),
    ("missing score counted as wrong", "reports/load.py", "if value is None or value != value:", "if False:", "test_reports"),
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
            done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", f"tests/{test}.py"], cwd=ROOT, capture_output=True)
        finally:
            path.write_text(text)
        print(f"{'caught  ' if done.returncode else 'SURVIVED'}  {name}", flush=True)
        survived += [] if done.returncode else [name]
    return len(survived)


if __name__ == "__main__":
    sys.exit(main())
