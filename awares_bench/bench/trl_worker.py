"""GRPO steps by TRL's own GRPOTrainer, for ``awares-bench bench grpo``: a script for an environment with TRL and without us.

    python -I trl_worker.py JOB.json     then a line on stdin for each step; it answers with a line of JSON on stdout

TRL's transformers back end has one public way to take a second turn with new pictures: ``environment_factory``, whose tool
returns image parts (``tools=`` does not know its row, ``rollout_func`` cannot return pictures; TRL 1.16). That way needs a chat
template that renders tool calls and a response template that reads them; those below write AwaRes' own conversation, token for
token. A call that is no list of known regions counts as an answer here. ``max_completion_length`` covers both turns and the crops
between them, so it is set high enough to drop no crops, and ``generation_kwargs`` limits each reply.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

TEMPLATE = r"""{%- for message in messages %}{%- set role = 'user' if message['role'] == 'tool' else message['role'] %}
{{- '<|im_start|>' + role + '\n' }}
{%- if message['content'] is string %}{{- message['content'] }}
{%- elif message['content'] %}{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in part %}{{- part['text'] }}{%- endif %}{%- endfor %}{%- endif %}
{%- if message.get('tool_calls') %}{%- for call in message['tool_calls'] %}
{%- if call.function.name == 'get_crops' and call.function.arguments and 'ids' in call.function.arguments %}
{{- "GET_CROPS: ['" + (call.function.arguments['ids'] | join("', '")) + "']" }}
{%- else %}{{- call.function.name + (call.function.arguments | tojson) }}{%- endif %}{%- endfor %}{%- endif %}
{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
"""Renders a tool's pictures as a user message, as AwaRes sends them. The last ``else`` is for TRL's test of the template."""

RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"GET_CROPS\s*:\s*(?=\[)",
            "close_pattern": r"\s*(?=<\|im_end\|>)",
            "repeats": True,
            "content": "json",
            "content_args": {"string_delims": [["'", "'"]]},
            "transform": {"type": "function", "function": {"name": "get_crops", "arguments": {"ids": "{content}"}}},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


class Tokens:
    """Counts the tokens that go through a Qwen2.5-VL, padding included, by purpose.

    counts: tokens into the decoder (prefill, decode, reference, loss, backward) and visual tokens out of the tower (encoded).
    """

    def __init__(self, policy, reference=None):
        self.counts: Counter = Counter()
        for model in (policy, reference) if reference is not None else (policy,):
            decoder = "reference" if model is reference else ""
            core = model.model.language_model
            core.register_forward_pre_hook(self._decoder(decoder), with_kwargs=True)
            core.register_forward_hook(self._leave)
            core.layers[0].register_forward_pre_hook(self._layer, with_kwargs=True)
            model.model.visual.register_forward_pre_hook(self._tower(model), with_kwargs=True)
        self.inside = False  # a call of the whole decoder

    def _decoder(self, name: str):
        import torch

        def count(_, args, kwargs):
            self.inside = True
            embeds = kwargs["inputs_embeds"]  # (B, L, D)
            tokens = embeds.shape[0] * embeds.shape[1]
            if name or not torch.is_grad_enabled():
                self.counts[name or ("decode" if embeds.shape[1] == 1 else "prefill")] += tokens
            else:
                self.counts["loss"] += tokens
                self.counts["backward"] += tokens

        return count

    def _leave(self, *_) -> None:
        self.inside = False

    def _layer(self, _, args, kwargs) -> None:
        """A decoder that is run layer by layer, as our engine does: (B, L, D), or all rows in one line (1, T, D)."""
        if self.inside:
            return
        rows, length = kwargs.get("rows"), args[0].shape[1]
        one_each = all(n == 1 for n in rows.fed_now) if rows is not None else length == 1
        self.counts["decode" if one_each else "prefill"] += args[0].shape[0] * length

    def _tower(self, model):
        merge = model.config.vision_config.spatial_merge_size**2

        def count(_, args, kwargs):
            self.counts["encoded"] += len(args[0] if args else kwargs["hidden_states"]) // merge

        return count

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        counts, self.counts = dict(self.counts), Counter()
        return counts


class Crops:
    """The environment of one rollout: it holds the picture, and offers a tool that crops it."""

    def reset(self, full=None, boxes=None, **_):
        self.full, self.boxes = full, json.loads(boxes)

    def get_crops(self, ids: list[str]) -> list:
        """Show regions of the picture in high resolution.

        Args:
            ids: numbers of the regions
        """
        return [{"type": "image", "image": self.full.crop(self.boxes[i])} for i in dict.fromkeys(ids)]


def text_of(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(p.get("text", "") for p in content)


def main(job: dict) -> None:
    import os

    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    answers = os.fdopen(os.dup(1), "w")  # apart from stdout, which libraries print to
    os.dup2(2, 1)

    import torch
    import trl
    from datasets import Dataset, Image
    from transformers import AutoProcessor, TrainerCallback

    torch.set_num_threads(job["threads"])
    costs, group = job["costs"], job["group"]
    processor = AutoProcessor.from_pretrained(job["start"], padding_side="left")
    processor.image_processor.size = job["size"]
    processor.chat_template, processor.tokenizer.response_template = TEMPLATE, RESPONSE

    def reward(completions, answer, label, log_metric=None, **_):
        rewards, calls = [], 0
        for messages, accepted, row_label in zip(completions, answer, label, strict=True):
            called = any(m["role"] == "tool" for m in messages)
            calls += called
            score = float(text_of(messages[-1]).strip().lower() == accepted.strip().lower())
            rewards.append(score - costs["use"] * called - costs["miss"] * (row_label == "HR" and not called))
        report["call_rate"] = calls / len(rewards)
        return rewards

    rows = [
        {
            "prompt": [{"role": "system", "content": job["system"]}, {"role": "user", "content": r["question"]}],
            "images": [{"path": r["view"]}],
            "full": {"path": r["full"]},
            "boxes": json.dumps(r["boxes"]),
            "answer": r["answer"],
            "label": r["label"],
        }
        for r in job["rows"]
    ]
    table = Dataset.from_list(rows).cast_column("images", [Image()]).cast_column("full", Image())
    args = trl.GRPOConfig(
        output_dir=job["out"],
        per_device_train_batch_size=len(rows) * group,
        num_generations=group,
        max_steps=job["steps"],
        learning_rate=job["lr"],
        beta=job["beta"],
        epsilon=job["clip"],
        loss_type="grpo",
        temperature=1.0,
        max_completion_length=job["max_completion"],
        generation_kwargs={"max_new_tokens": job["max_new_tokens"]},
        max_tool_calling_iterations=1,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=job["device"] == "cpu",
        seed=job["seed"],
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=job["start"],
        reward_funcs=reward,
        args=args,
        train_dataset=table,
        processing_class=processor,
        environment_factory=Crops,
    )
    trainer.model.model.visual.requires_grad_(False)  # as ours
    tokens = Tokens(trainer.model, trainer.ref_model)
    report: dict = {}
    generate, padding = trainer.model.generate, processor.tokenizer.pad_token_id

    def generate_and_note(*args, **kwargs):
        prompts = [[t for t in row if t != padding] for row in kwargs["input_ids"].tolist()]
        report.setdefault("prompts", [list(x) for x in dict.fromkeys(map(tuple, prompts))])  # of the step's first turn
        return generate(*args, **kwargs)

    trainer.model.generate = generate_and_note

    def tell(**values) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    def wait() -> float:
        if not sys.stdin.readline():
            sys.exit(0)  # the other side has closed the pipe
        return time.perf_counter()

    class Steps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = wait()

        def on_step_end(self, args, state, *_, **__):
            if torch.cuda.is_available() and not args.use_cpu:
                torch.cuda.synchronize()
            tell(seconds=time.perf_counter() - self.start, tokens=tokens.take(), **report)
            report.clear()
            if state.global_step < args.max_steps:
                self.start = wait()

    trainer.add_callback(Steps())
    tell(trl=trl.__version__)
    trainer.train()


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))
