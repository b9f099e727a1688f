"""Answers from an OpenAI-compatible server (vLLM, SGLang, ``transformers serve``), for policies that need nothing inside the model.

Pictures go as PNG, so the server sees the same pixels; the whole conversation is sent at every turn, so a server should keep
its prefix cache. Visual tokens are counted here, by the processor of ``pretrained``; text and output tokens are the server's
where it reports them. A server's phases cannot be told apart: its seconds, queueing included, all stand under decode.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import APIConnectionError, APIStatusError
from PIL import Image
from transformers import GenerationConfig

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Event, EventKind, Failure, Reply, Turn, chat_messages
from awares_bench.methods.usage import Usage
from awares_bench.models.base import HostModel, check_text, rendered
from awares_bench.models.checkpoint import family_of, open_processor
from awares_bench.models.limits import Limits
from awares_bench.models.packaged import resolve

from .decoding import own_penalty, penalty_of
from .openai_client import RETRIES, image_part, is_refusal, open_client, reason, refusal, refuses_all
from .session import Prepared, Request


class Endpoint:
    """A served model. It answers what a ``VLM`` answers, except for pruners and probes.

    base_url: such as http://localhost:8000/v1. model: its name there. pretrained: whose processor counts tokens.
    concurrency: requests in flight. retries, timeout: see ``openai_client``. The key is read from OPENAI_API_KEY.
    repetition_penalty: sent with every request unless it is 1; None: the one of ``pretrained``'s ``generation_config.json``. A server
    that refuses the field is trusted to apply the checkpoint's own, which is then an event.
    """

    engine = "openai"

    def __init__(
        self,
        base_url: str,
        model: str,
        pretrained: str,
        concurrency: int = 8,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        retries: int = RETRIES,
        timeout: float = 600.0,
        repetition_penalty: float | None = None,
        limits: str | None = None,
    ):
        self.client = open_client(base_url, retries, timeout)
        self.processor = open_processor(resolve(pretrained))
        self.family = family_of(resolve(pretrained))
        self.own_penalty = _own_penalty(resolve(pretrained))
        self.repetition_penalty = self.own_penalty if repetition_penalty is None else penalty_of(repetition_penalty)
        self._takes_penalty = True
        self.tokenizer = self.processor.tokenizer
        asked, family = Limits(limits, min_pixels, max_pixels), self.family
        (least, most), self.limits_name = asked.resolve(family.model_types[0], family.own_limits(self.processor))
        self.limits = {"shortest_edge": least, "longest_edge": most}
        self.base_url, self.model, self.concurrency, self.retries = base_url, model, concurrency, retries

    def visual_tokens(self, image, share: float = 1.0) -> int:
        """Merged visual tokens of ``image`` under this processor's limits; the server's limits should be the same.

        share: not read. A server cannot be told what a picture stands for: it shows every picture of a tiling family in all its tiles.
        """
        return self.family.count_tokens(self.processor, self.limits, image)

    def check(self, question: str) -> None:
        """Raise ValueError when a question holds the text of an image mark, or no text."""
        check_text(question, (self.processor.image_token, *self.family.image_marks))

    def text(self, tokens, until: tuple[str, ...] = ()) -> str:
        """Token ids -> text, cut before the first stop string."""
        return _cut(self.tokenizer.decode(list(tokens), skip_special_tokens=True), until)

    def prepare(self, request: Request) -> Prepared:
        """Nothing: requests are made in the threads that send them."""
        return Prepared([])

    def hidden_states(self, requests: list[Request]):
        raise RunError("this policy reads the inside of a model; give it one of its own, or leave engine=openai out")

    def reply(self, requests: list[Request], pruner=None) -> list[Reply | Failure]:
        """Answer one turn of each conversation. A request that the server refuses, or fails at while it answers others, is a
        failure of its document.

        Raises RunError when the server cannot be reached any more, or knows neither key nor model: what was answered is in the
        run folder.
        """
        if pruner is not None:
            raise RunError(f"{type(pruner).__name__} cuts tokens inside the model; leave engine=openai out, or the pruner")
        with ThreadPoolExecutor(self.concurrency, "request") as threads:
            return list(threads.map(self._one, requests))

    def _one(self, request: Request) -> Reply | Failure:
        try:
            return self._ask(request)
        except RunError:
            raise
        except Exception as error:  # a picture that cannot be packed, an answer that is none
            return Failure(f"{type(error).__name__}: {error}")

    def _ask(self, request: Request) -> Reply | Failure:
        start, session, turn = time.perf_counter(), request.session, request.turn
        shown = [self.family.accepted(image) for image in turn.images]
        events = [e for _, some in shown for e in some]
        history = [*session.turns, turn]
        visual, before = self._visual([turn]), self._visual(session.turns)
        text, earlier = self._text(history, session.replies), self._text(session.turns, session.replies)
        if self.family.tiles and any(share < 1 for _, share in turn.shown):
            told = (
                "a server cannot be told a picture's share of the original: views and crops take all the tiles of a whole picture"
            )
            events.append(Event(EventKind.SHARE_NOT_TOLD, told))
        if turn.omit_newline:
            events.append(
                Event(EventKind.TEMPLATE, "the line break before this message is the server's; the checkpoint had none")
            )
        if turn.forced_reply is not None:
            answer, output, complete, seconds = turn.forced_reply, 0, True, (0.0, 0.0)
        else:
            payload = _payload(chat_messages(history, session.replies), self.family)
            prepared = time.perf_counter()
            try:
                made = self._create(payload, request, events)
            except APIStatusError as error:
                if refuses_all(error):
                    raise RunError(f"{self.base_url}, model {self.model}: {refusal(error)}") from error
                if is_refusal(error):
                    return Failure(refusal(error))
                return self._failed(error, f"{error.status_code}: {reason(error)}")
            except APIConnectionError as error:
                return self._failed(error, str(error))
            if not made.choices:
                return Failure("the server's answer holds no choices")
            seconds = (prepared - start, time.perf_counter() - prepared)
            whole, complete = made.choices[0].message.content or "", made.choices[0].finish_reason == "stop"
            answer = _cut(whole, request.until)
            complete = complete or answer != whole
            spent = made.usage
            output = spent.completion_tokens if spent else len(self._ids(whole))
            if spent and spent.prompt_tokens:
                counted = text + visual + before
                if spent.prompt_tokens != counted:
                    said = f"the server counts {spent.prompt_tokens} prompt tokens, the processor here {counted}"
                    events.append(Event(EventKind.TOKEN_COUNT, f"{said}: limits or templates differ"))
                    text = spent.prompt_tokens - visual - before
            if session.turns:
                events += _cache_events(spent)
        session.turns.append(turn)
        session.replies.append(answer)
        session.events += events
        usage = Usage(visual, float(visual), max(0, text - earlier), output, seconds[0], 0.0, 0.0, seconds[1])
        tokens = () if turn.forced_reply is not None else tuple(self._ids(answer))
        return Reply(answer, tokens, usage, complete)

    def _create(self, payload: list[dict], request: Request, events: list[Event]):
        """The completion of a conversation. Raises what the client raises."""
        penalty = self.repetition_penalty if request.penalty is None else request.penalty
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": payload,
            "max_tokens": request.max_reply_tokens,
            "temperature": 0.0,
            "seed": 0,
        }
        create, own = self.client.chat.completions.create, penalty == self.own_penalty
        if penalty == self.own_penalty == 1:
            return create(**asked)
        if self._takes_penalty or not own:
            try:
                return create(**asked, extra_body={"repetition_penalty": penalty})
            except APIStatusError as error:
                if not own or error.status_code not in (400, 422) or "repetition_penalty" not in reason(error):
                    raise
                self._takes_penalty = False
        told = f"the server takes no repetition_penalty; it is trusted to apply the checkpoint's own, {penalty:g}"
        events.append(Event(EventKind.REPETITION_PENALTY, told))
        return create(**asked)

    def _failed(self, error: Exception, told: str) -> Failure:
        """What a request that failed at every retry means: its own failure where the server answers another, else the run's end."""
        if not self._alive():
            raise self._gone(error) from error
        return Failure(
            f"the server failed at this request {self.retries + 1} times ({told}) and answers others; exclude the document"
        )

    def _alive(self) -> bool:
        """Whether the server answers a small picture now."""
        try:
            talk: Any = _payload(chat_messages([Turn((Image.new("RGB", (56, 56)),), "?")], []), self.family)
            once = self.client.with_options(max_retries=0)
            once.chat.completions.create(model=self.model, messages=talk, max_tokens=1, temperature=0.0, seed=0)
        except (APIStatusError, APIConnectionError):
            return False
        return True

    def _gone(self, error: Exception) -> RunError:
        return RunError(
            f"the server at {self.base_url} did not answer after {self.retries} retries ({error}); "
            "start it again and run the same command with the same output_dir: it goes on where it stopped"
        )

    def _visual(self, turns: list[Turn]) -> int:
        return sum(self.visual_tokens(image) for turn in turns for image in turn.images)

    def _text(self, turns: list[Turn], replies: list[str]) -> int:
        """Tokens of the rendered conversation that are not visual."""
        if not turns:
            return 0
        asks = len(turns) > len(replies)
        text = rendered(self.processor, chat_messages(turns, replies), asks)
        return len(self._ids(text)) - sum(len(turn.images) for turn in turns)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _own_penalty(pretrained: str) -> float:
    """The repetition penalty of a checkpoint's ``generation_config.json``; 1 where it has no such file."""
    try:
        return own_penalty(GenerationConfig.from_pretrained(pretrained))
    except OSError:
        return 1.0


def _cache_events(spent) -> list[Event]:
    details = getattr(spent, "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None)
    if cached is None:
        return [
            Event(
                EventKind.PREFIX_CACHE, "the server does not say whether it kept the first turn; tokens are counted as if it had"
            )
        ]
    return (
        []
        if cached
        else [Event(EventKind.PREFIX_CACHE, "the server kept nothing of the first turn and prefilled it again, uncounted")]
    )


def _payload(talk: list[dict], family: type[HostModel]) -> list[dict]:
    """Chat messages with pictures -> the same with PNG data URLs of the pictures as the family accepts them."""
    out = []
    for message in talk:
        content = message["content"]
        if not isinstance(content, str):
            content = [image_part(family.accepted(part["image"])[0]) if part["type"] == "image" else part for part in content]
        out.append({"role": message["role"], "content": content})
    return out


def _cut(text: str, until: tuple[str, ...]) -> str:
    return text[: min((text.find(s) for s in until if s in text), default=len(text))]
