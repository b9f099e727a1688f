"""One picture, one question: ask with AwaRes, see what it looked at and what it cost, and set other methods beside it.

python examples/one_image.py chart.png "What is the value of the red bar?"
"""

import sys
from pathlib import Path

import awares_bench
from awares_bench.card import page

image, question = sys.argv[1:]
model = awares_bench.load("nano")  # or a folder, LoRA adapters, a hub name

answer = model.ask(image, question)
print(f"{answer.text}  (crops: {', '.join(answer.crops) or 'none'}; {answer.tokens:g} of {answer.full_tokens} visual tokens)")
for turn, reply in zip(answer.turns, answer.replies, strict=True):
    print(f"  shown {[image.size for image in turn.images]}, said {reply.text!r}")

print(awares_bench.compare(model, image, question, ["full", "low", "awares", "visionzip retention=0.25"]))

Path("answer.html").write_text(page(answer._repr_html_(), question), encoding="utf-8")  # a notebook shows this card by itself
