"""Answers from vLLM in this process: what ``engine=openai`` does without a server. Nothing is encoded, sent or read back.

The tokens of a conversation are made here and go on exactly as they were written, so a second turn meets vLLM's prefix cache; visual
tokens are counted by the checkpoint's processor and compared with vLLM's prompt. Seconds of a batch are shared equally and stand under decode.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Failure, Reply
from awares_bench.models.checkpoint import find, load_config, quantisation
from awares_bench.models.loading import dtype_on

from .external_model import Counted, ExternalModel, Written, context_ended
from .session import Request

MOST_IMAGES = 8
"""Pictures that a conversation may hold."""


class VllmModel(ExternalModel):
    """A checkpoint in vLLM's ``LLM``. It answers what a ``LocalModel`` answers, except for pruners and probes.

    rows: conversations answered together. dtype: ``auto`` is that of the local engine; of a quantised checkpoint it is vLLM's choice.
    options: further arguments of ``LLM`` by name, which win over those that are set here. repetition_penalty: of every reply; None: the one of the checkpoint's ``generation_config.json``.

    Raises RunError where vLLM is missing, cannot load the checkpoint, or does not know an option.
    """

    engine = "vllm"
    who = "vLLM"
    how_to_keep = (
        "take a vLLM that reports num_cached_tokens",
        "leave enable_prefix_caching on, and take a block_size shorter than a first turn",
    )

    def __init__(
        self,
        pretrained: str,
        rows: int = 64,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        dtype: str = "auto",
        repetition_penalty: float | None = None,
        limits: str | None = None,
        options: dict[str, Any] | None = None,
    ):
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise RunError(f"engine=vllm needs vLLM ({error}): pip install 'awares-bench[vllm]'") from error
        super().__init__(pretrained, min_pixels, max_pixels, repetition_penalty, limits)
        folder = find(self.folder)
        if (folder / "adapter_config.json").exists():
            raise RunError(
                f"{pretrained!r} holds LoRA adapters, which engine=vllm does not merge; pass a merged checkpoint, or leave engine=vllm out"
            )
        self._sampling = SamplingParams
        if not quantisation(load_config(folder, pretrained)):  # vLLM's auto would be bfloat16 on a CPU too
            dtype = dtype_on("cuda" if torch.cuda.is_available() else "cpu", dtype)
        arguments = {
            "dtype": dtype,
            "max_num_seqs": rows,
            "mm_processor_kwargs": {"size": self.limits},
            "limit_mm_per_prompt": {"image": MOST_IMAGES, "video": 0},  # vLLM would make room for a whole video
            "enable_prefix_caching": True,
            "seed": 0,
        } | (options or {})
        try:
            self.llm = LLM(str(folder), **arguments)
        except Exception as error:  # of many kinds; what went wrong in its own processes stands on the screen
            raise RunError(
                f"vLLM could not load {pretrained!r} ({type(error).__name__}: {str(error)[:500]}); more stands above"
            ) from error
        self.dtype = str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def _answer(self, requests: list[Request]) -> list[Reply | Failure]:
        """Answer one turn of each conversation, together. A prompt that vLLM refuses is a failure of its document."""
        counted = [self._count(r) for r in requests]
        asked = [i for i, r in enumerate(requests) if r.turn.forced_reply is None]
        ids = [[*r.session.history, *self._new(r)] for r in requests]
        prompts = [self._prompt(requests[i], ids[i]) for i in asked]
        start = time.perf_counter()
        try:
            made = self.llm.generate(prompts, [self._parameters(requests[i]) for i in asked], use_tqdm=False) if asked else []
        except ValueError as error:  # one that is too long, or holds too many pictures
            if len(requests) == 1:
                return [Failure(f"vLLM refused the request: {error}")]
            return [reply for r in requests for reply in self._answer([r])]
        except Exception as error:
            if "EngineDead" not in type(error).__name__:
                raise
            raise RunError(
                f"vLLM's engine died ({error}); run the same command with the same output_dir: it goes on where it stopped"
            ) from error
        seconds = (time.perf_counter() - start) / max(1, len(asked))
        outputs: dict[int, Any] = dict(zip(asked, made, strict=True))
        return [self._finish(r, counted[i], ids[i], outputs.get(i), seconds) for i, r in enumerate(requests)]

    def _new(self, request: Request) -> list[int]:
        """Ids that a request's turn adds, each picture as one placeholder."""
        session = request.session
        return self._ids(self._new_text([*session.turns, request.turn], len(session.replies)))

    def _prompt(self, request: Request, ids: list[int]) -> dict[str, Any]:
        turns = [*request.session.turns, request.turn]
        images = [self.family.accepted(image)[0] for turn in turns for image in turn.images]
        return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})}

    def _parameters(self, request: Request):
        penalty = self.repetition_penalty if request.penalty is None else request.penalty
        return self._sampling(
            temperature=0.0,
            max_tokens=request.max_reply_tokens,
            stop=list(request.until) or None,
            repetition_penalty=penalty,
        )

    def _finish(self, request: Request, counted: Counted, ids: list[int], made: Any, seconds: float) -> Reply | Failure:
        written = None
        if made is not None:
            out, told = made.outputs[0], len(made.prompt_token_ids)
            tokens = tuple(out.token_ids)
            if out.finish_reason not in ("stop", "length"):
                return Failure(f"vLLM ended the reply for a reason that is not known here (finish_reason {out.finish_reason!r})")
            if out.finish_reason == "length" and len(tokens) < request.max_reply_tokens:
                return context_ended(len(tokens), request.max_reply_tokens, "max_model_len in vllm_options")
            # the tokens that were fed stand for those of the rendered text, which may read otherwise
            counted.prompt = len(ids) + counted.visual + counted.before - self._pictures(request)
            if told != counted.prompt:
                raise RunError(
                    f"vLLM sees {told} tokens in a prompt where {counted.prompt} are counted here, so no ratio would be right: its limits of "
                    "pictures are others; leave mm_processor_kwargs out of vllm_options"
                )
            ended = out.finish_reason == "stop" and not isinstance(out.stop_reason, str)
            tokens = tokens[:-1] if ended else tokens
            stopped = out.finish_reason == "stop" and not ended
            text = self.text(tokens, request.until)  # vLLM's own leaves out bytes at the end that are no whole character yet
            cached = made.num_cached_tokens
            written = Written(text, len(tokens), ended, stopped, tokens, told, cached, 0.0, seconds)
        reply = self._conclude(request, counted, written)
        own = self._ids(reply.text) if written is None else written.tokens
        request.session.history = (*ids, *own)
        return reply

    def _pictures(self, request: Request) -> int:
        return sum(len(turn.images) for turn in (*request.session.turns, request.turn))
