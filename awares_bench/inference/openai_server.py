"""Answers from an OpenAI-compatible server (vLLM, SGLang, ``transformers serve``), for policies that need nothing inside the model.

Pictures go as PNG, so the server sees the same pixels; the whole conversation is sent at every turn, so a server should keep
its prefix cache. Visual tokens are counted here, by the processor of ``pretrained``; text and output tokens are the server's
where it reports them. A server's phases cannot be told apart: its seconds, queueing included, all stand under decode.

Nothing is scored that the server did not finish: a reply that it cut before its budget, filtered, or turned into a tool call is a
failure of its document.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Any

from openai import APIConnectionError, APIStatusError
from PIL import Image
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from awares_bench.errors import RunError
from awares_bench.methods.conversation import Event, EventKind, Failure, Reply, Turn, chat_messages

from .external_model import ExternalModel, Written, context_ended, cut
from .openai_client import (
    RETRIES,
    TIMEOUT,
    BadBody,
    Completion,
    complete,
    image_part,
    is_refusal,
    listed_models,
    open_client,
    reason,
    refusal,
    refuses_all,
)
from .session import Request

WAIT_FOR_SERVER = 10.0
"""Minutes that a server which cannot be reached has to start: a 7B takes several to load."""

POLL_SECONDS = 2.0
"""Between looks whether a server is there."""

OUTAGES = 3
"""Times that a server may go away at one request before that is taken for the request's fault."""

PROBE = (448, 448)
"""Size of the picture that a server is asked about first: 256 visual tokens of 28 x 28 pixels."""

_Unreachable = (APIConnectionError, APIStatusError, BadBody)


class Endpoint(ExternalModel):
    """A served model. It answers what a ``LocalModel`` answers, except for pruners and probes.

    base_url: such as http://localhost:8000/v1. model: its name there. pretrained: whose processor counts tokens.
    concurrency: requests in flight. retries: of one request; timeout: seconds of one try. wait_for_server: minutes that a server which
    cannot be reached has, at the start and after it went away. replicas: engines behind the address
    (vLLM's ``--data-parallel-size``); all turns of a conversation are sent to one of them. The key is read from OPENAI_API_KEY.
    repetition_penalty: sent with every request unless it is 1; None: the one of ``pretrained``'s ``generation_config.json``. A server
    that refuses the field is trusted to apply the checkpoint's own, which is then an event.
    """

    engine = "openai"
    who = "the server"
    how_to_keep = (
        "start vLLM with --enable-prompt-tokens-details, which makes it say so",
        "start vLLM with --enable-prefix-caching and a --block-size shorter than a first turn, and pass replicas=N where it has "
        "--data-parallel-size N",
    )

    def __init__(
        self,
        base_url: str,
        model: str,
        pretrained: str,
        concurrency: int = 8,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        retries: int = RETRIES,
        timeout: float = TIMEOUT,
        repetition_penalty: float | None = None,
        limits: str | None = None,
        wait_for_server: float = WAIT_FOR_SERVER,
        replicas: int = 1,
    ):
        self.client = open_client(base_url, retries, timeout)
        super().__init__(pretrained, min_pixels, max_pixels, repetition_penalty, limits)
        self.base_url, self.model, self.concurrency, self.retries = base_url, model, concurrency, retries
        self.wait_for_server, self.replicas = wait_for_server, replicas
        self._refused: set[str] = set()
        """Fields that the server does not take."""
        self._same_size: set[tuple] = set()
        """Sizes of pictures in which the server sees as many visual tokens as are counted here."""
        self._waiting = Lock()
        self._ended: RunError | None = None

    # ------------------------------------------------------------------ before the first document

    def warm_up(self) -> None:
        """Ask the server for its models and about one picture, before any document is sent.

        Waits for a server that cannot be reached. Raises RunError when it never comes, does not take the key or the model's name,
        cannot be shown a picture, or sees another number of tokens in it.
        """
        super().warm_up()
        self._ended = None
        names = self._models()
        picture = Image.new("RGB", PROBE)
        try:
            made = self._probe(Turn((picture,), "?"))
        except APIStatusError as error:
            if error.status_code == 404:
                has = f"it serves {', '.join(names)}" if names else "it lists no models; does the address end in /v1?"
                said = f"{self.base_url} does not serve the model {self.model!r} (404: {reason(error)}); {has}"
                raise RunError(said) from error
            raise RunError(
                f"{self.base_url}, model {self.model}: a question about a picture was not answered: {refusal(error)}"
            ) from error
        except BadBody as error:
            raise RunError(f"what answers at {self.base_url} is no OpenAI-compatible server: it sent {error}") from error
        except APIConnectionError as error:
            raise self._gone(error, f"after {self.retries} retries") from error
        self._check_limits([picture], made)

    def _models(self) -> list[str] | None:
        """Names of the models that the server lists, as soon as it answers; None where it has no list."""
        try:
            return listed_models(self.client.with_options(max_retries=0))
        except APIStatusError as error:
            if is_refusal(error):
                if error.status_code in (401, 403):
                    raise RunError(f"{self.base_url}: {refusal(error)}") from error
                return None
            self._wait(error, self._listed)
        except APIConnectionError as error:
            self._wait(error, self._listed)
        return self._models()

    def _listed(self) -> None:
        """Raises one of ``_Unreachable`` as long as the server is not there."""
        try:
            listed_models(self.client.with_options(max_retries=0))
        except APIStatusError as error:
            if not is_refusal(error):
                raise

    def _probe(self, turn: Turn) -> Completion:
        """One token after one turn, from the last replica, which is there only where all are. Raises what ``complete`` raises."""
        messages = [self._message(m) for m in chat_messages([turn], [])]
        return self._create(messages, 1, (), self.own_penalty, self.replicas - 1)

    def _check_limits(self, images: list[Image.Image], made: Completion | None = None) -> None:
        """Raise RunError when the server sees another number of visual tokens in pictures than are counted here.

        made: what it said to the pictures with the text "?".
        """
        sizes = tuple(image.size for image in images)
        if sizes in self._same_size or self.family.tiles:  # marks between tiles are text here and pictures there
            return
        shown, bare = Turn(tuple(images), "?"), Turn((), "?")
        told = (made or self._probe(shown)).prompt_tokens
        if told is None or told == self._text([shown], []) + self._visual([shown]):
            self._same_size.add(sizes)
            return
        without = self._probe(bare).prompt_tokens or 0
        own = self._text([shown], []) - self._text([bare], [])  # of the marks around pictures
        seen, counted = told - without - own, self._visual([shown])
        if seen == counted:  # its template differs, which every document will say
            self._same_size.add(sizes)
            return
        shape = ", ".join(f"{image.width}x{image.height}" for image in images)
        limits = json.dumps({"size": self.limits})
        raise RunError(
            f"the server at {self.base_url} sees {seen} visual tokens in a picture of {shape} where {counted} are counted here, so no ratio "
            f"would be right: its pixel limits are others. Start vLLM with --mm-processor-kwargs '{limits}', or pass "
            "the server's own limits as min_pixels and max_pixels"
        )

    # ------------------------------------------------------------------ answering

    def _answer(self, requests: list[Request]) -> list[Reply | Failure]:
        """Answer one turn of each conversation. A request that the server refuses, or fails at while it answers others, is a
        failure of its document.

        Raises RunError when the server cannot be reached any more, or knows neither key nor model: what was answered is in the
        run folder.
        """
        if len(requests) == 1:
            return [self._one(requests[0])]
        with ThreadPoolExecutor(self.concurrency, "request") as threads:
            return list(threads.map(self._one, requests))

    def _one(self, request: Request) -> Reply | Failure:
        try:
            return self._ask(request)
        except RunError:
            raise
        except Exception as error:  # a picture that cannot be packed
            return Failure(f"{type(error).__name__}: {error}")

    def _ask(self, request: Request) -> Reply | Failure:
        start, session, turn = time.perf_counter(), request.session, request.turn
        counted = self._count(request)
        history = chat_messages([*session.turns, turn], session.replies)
        new = [self._message(message) for message in history[len(session.sent) :]]
        messages = [*session.sent, *new]
        written = None
        if turn.forced_reply is None:
            penalty = self.repetition_penalty if request.penalty is None else request.penalty
            rank = request.conversation % self.replicas
            asked = messages, request.max_reply_tokens, request.until, penalty, rank
            preprocess = time.perf_counter() - start
            made = self._until_answered(*asked)
            if isinstance(made, Failure):
                return made
            if "repetition_penalty" in self._refused and penalty == self.own_penalty != 1:
                told = f"the server takes no repetition_penalty; it is trusted to apply the checkpoint's own, {penalty:g}"
                counted.events.append(Event(EventKind.REPETITION_PENALTY, told))
            outcome = self._read(made, request, preprocess, counted.events)
            if isinstance(outcome, Failure):
                return outcome
            written = outcome
            beyond = (written.prompt_tokens or counted.prompt) - counted.prompt
            if turn.images and beyond != session.uncounted:
                self._check_limits(list(turn.images))
        session.sent = messages
        return self._conclude(request, counted, written)

    def _read(self, made: Completion, request: Request, preprocess: float, events: list[Event]) -> Written | Failure:
        """A completion -> what the model wrote, or why that is no reply."""
        message, ending = made.choice["message"], made.choice.get("finish_reason")
        content, count, budget = message.get("content"), made.completion_tokens, request.max_reply_tokens
        # 1. what the server kept back
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if message.get("tool_calls") or message.get("function_call") or ending in ("tool_calls", "function_call"):
            return Failure(
                "the server took the reply for a call of a tool, so the reply is not known; start vLLM without --enable-auto-tool-choice"
            )
        if ending == "content_filter":
            return Failure("the server's content filter withheld the reply (finish_reason content_filter)")
        if content is None and reasoning:
            return Failure(
                "the server took the whole reply for reasoning, so there is no answer; start vLLM without --reasoning-parser"
            )
        if content is None and (count is None or count > 1):
            return Failure(f"the server's reply has no content (finish_reason {ending}, {count} tokens)")
        if not isinstance(content or "", str):
            return Failure(f"the server's reply is no text but {content!r:.100}")
        if reasoning:
            said = f"the server put {len(reasoning)} characters of the reply apart as reasoning; the answer is the rest"
            events.append(Event(EventKind.REASONING_APART, said))
        # 2. what it did not finish
        ids, stop = made.choice.get("token_ids"), made.choice.get("stop_reason")
        whole = content or ""
        if ids and not reasoning:  # vLLM's own text leaves out bytes at the end that are no whole character yet
            whole = self.text(ids[:-1] if ending == "stop" and not isinstance(stop, str) else ids)
        text = cut(whole, request.until)
        if ending not in ("stop", "length"):
            return Failure(f"the server ended the reply for a reason that is not known here (finish_reason {ending!r})")
        if ending == "length" and text == whole:
            if count is None:
                return Failure(
                    "the reply was cut and the server does not count its tokens, so it cannot be told whether the task's limit or its context "
                    "cut it; use a server that reports usage"
                )
            if count < budget:
                return context_ended(count, budget, "the server's --max-model-len")
        # 3. its tokens
        stopped = text != whole or isinstance(stop, str)
        ended = ending == "stop" and not stopped
        if ids:
            tokens = tuple(ids[:-1] if ended else ids)
            output = len(tokens)
        else:
            tokens = tuple(self._ids(whole))  # the text may read as other tokens than those that were written
            output = len(tokens) if count is None else max(0, count - ended)  # servers count the token that ends a reply
        return Written(text, output, ended, stopped, tokens, made.prompt_tokens, made.cached_tokens, preprocess, made.seconds)

    def _until_answered(self, *asked) -> Completion | Failure:
        """The completion of a conversation. A request that fails at every retry is its own failure where the server answers another;
        else the server is waited for."""
        told = ""
        failed: Exception
        for _ in range(OUTAGES):
            try:
                return self._create(*asked)
            except APIStatusError as error:
                if refuses_all(error):
                    raise RunError(f"{self.base_url}, model {self.model}: {refusal(error)}") from error
                if is_refusal(error):
                    return Failure(refusal(error))
                failed, told = error, f"{error.status_code}: {reason(error)}"
            except (APIConnectionError, BadBody) as error:
                failed, told = error, str(error)
            try:
                self._alive()
            except _Unreachable:
                self._wait(failed, self._alive, f"after {self.retries} retries")
            else:
                return Failure(
                    f"the server failed at this request {self.retries + 1} times ({told}) and answers others; exclude the document"
                )
        return Failure(f"the server went away {OUTAGES} times at this request (the last time: {told}); exclude the document")

    def _create(self, messages: list[dict], budget: int, until: tuple[str, ...], penalty: float, rank: int) -> Completion:
        """The completion of a conversation. Raises what ``complete`` raises.

        A field that the server does not know is left out from then on, if the answer is the same without: a penalty that is the
        checkpoint's own, stop strings, which are cut here too, and the ids of the reply's tokens.
        """
        asked: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": budget, "temperature": 0.0, "seed": 0}
        if self.replicas > 1:
            asked["extra_headers"] = {"X-data-parallel-rank": str(rank)}
        more: dict[str, Any] = {"return_token_ids": True}
        if until:
            more["stop"] = list(until)
        if not penalty == self.own_penalty == 1:
            more["repetition_penalty"] = penalty
        if "enable_thinking" in str(self.processor.chat_template):  # as prompts are rendered and counted here
            more["chat_template_kwargs"] = {"enable_thinking": False}
        needed = {"chat_template_kwargs", *([] if penalty == self.own_penalty else ["repetition_penalty"])}
        spare = set(more) - needed
        while True:
            sent = {name: value for name, value in more.items() if name not in self._refused & spare}
            try:
                return complete(self.client, self.retries, **asked, extra_body=sent)
            except APIStatusError as error:
                refused = {name for name in spare & set(sent) if re.search(rf"\b{name}\b", reason(error))}
                if error.status_code not in (400, 422) or not refused:
                    raise
                self._refused |= refused

    def _message(self, message: dict) -> dict:
        """A chat message with pictures -> the same with PNG data URLs of the pictures as the family accepts them."""
        content = message["content"]
        if not isinstance(content, str):
            parts = [p if p["type"] != "image" else image_part(self.family.accepted(p["image"])[0]) for p in content]
            content = parts
        return {"role": message["role"], "content": content}

    # ------------------------------------------------------------------ a server that is not there

    def _alive(self) -> None:
        """Ask a small picture, once. Raises one of ``_Unreachable`` when there is no answer."""
        messages: Any = [self._message(m) for m in chat_messages([Turn((Image.new("RGB", (56, 56)),), "?")], [])]
        once = self.client.with_options(max_retries=0)
        complete(once, 0, model=self.model, messages=messages, max_tokens=1, temperature=0.0, seed=0)

    def _wait(self, error: Exception, look: Callable[[], None], tried: str = "") -> None:
        """Wait for the server, as long as ``wait_for_server`` says; of several threads one looks. Raises RunError when it does not come.

        look: raises one of ``_Unreachable`` as long as it is not there. tried: what was tried before.
        """
        with self._waiting:
            if self._ended:  # another thread has waited
                raise self._ended
            waited = ""
            again = Retrying(
                retry=retry_if_exception_type(_Unreachable),
                stop=stop_after_delay(60 * self.wait_for_server),
                wait=wait_fixed(POLL_SECONDS),
                reraise=True,
            )
            try:
                with suppress(*_Unreachable):
                    return look()  # it was away, and another thread has waited
                if self.wait_for_server:
                    waited = f"within {self.wait_for_server:g} minutes"
                    said = f"the server at {self.base_url} does not answer ({_short(error)}); waiting up to"
                    print(f"{said} {self.wait_for_server:g} minutes for it (wait_for_server)", file=sys.stderr, flush=True)
                again(look)
            except _Unreachable as last:
                self._ended = self._gone(last, " and ".join(filter(None, [tried, waited])))
                raise self._ended from last

    def _gone(self, error: Exception, tried: str) -> RunError:
        return RunError(
            f"the server at {self.base_url} did not answer {tried} ({_short(error)}); "
            "start it again and run the same command with the same output_dir: it goes on where it stopped"
        )


def _short(error: Exception) -> str:
    """An error in at most 200 characters."""
    return str(error)[:200]
