"""One client of OpenAI-compatible servers, with one policy: what is tried again, what ends the run, and the sentences for both.

Tried again, by the openai client itself: refused connections, time-outs, rate limits (waiting as long as the server asks) and server
errors. Tried again by ``complete``: bodies that are no chat completion. Not tried again: an address that cannot be one, a key or a
model that the server does not know, and any other refusal.
"""

from __future__ import annotations

import base64
import io
import json
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from openai import APIStatusError, OpenAI
from PIL import Image
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from awares_bench.errors import RunError

RETRIES = 12
"""The client waits 0.5 s after the first failure and up to 8 s after later ones: a server has about a minute to come back."""

FIRST_WAIT = 0.5
"""Seconds before a body that is no completion is asked for again; twice as long each time, as the client waits after other failures."""

TIMEOUT = 600.0
"""Seconds of one try."""

_REMEDY = {
    401: "set the environment variable OPENAI_API_KEY to the server's key",
    403: "set the environment variable OPENAI_API_KEY to a key that may use this model",
    404: "the address usually ends in /v1, and the model must be a name that the server lists under /v1/models",
}


class BadBody(Exception):
    """A server answered with 200 and something that is no chat completion. Its text says what."""


@dataclass(frozen=True)
class Completion:
    """A chat completion, as the server sent it."""

    choice: dict
    """The first of its choices."""

    usage: dict
    """Token counts; empty where the server gives none."""

    seconds: float
    """From request to reply, of the try that succeeded."""

    @property
    def prompt_tokens(self) -> int | None:
        return self.usage.get("prompt_tokens") or None

    @property
    def completion_tokens(self) -> int | None:
        return self.usage.get("completion_tokens")

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that the server had in its prefix cache; None where it does not say."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def open_client(base_url: str, retries: int = RETRIES, timeout: float = TIMEOUT) -> OpenAI:
    """A client of the server at ``base_url``; its key is read from OPENAI_API_KEY. timeout: seconds of one try.

    Raises RunError for an address that no server can have.
    """
    try:
        parts = urlsplit(base_url)
        possible = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0  # .port raises for what is no number
    except ValueError:
        possible = False
    if not possible:
        raise RunError(f"the server's address is {base_url!r}; it must be such as http://localhost:8000/v1")
    return OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=retries, timeout=timeout)


def complete(client: OpenAI, retries: int, **asked: Any) -> Completion:
    """One chat completion. asked: arguments of ``client.chat.completions.create``.

    Raises BadBody when the last of ``retries`` + 1 bodies is no chat completion, and what the client raises.
    """
    again = Retrying(
        retry=retry_if_exception_type(BadBody),
        stop=stop_after_attempt(retries + 1),
        wait=wait_exponential(FIRST_WAIT, max=8),
        reraise=True,
    )
    return again(_complete, client, asked)


def _complete(client: OpenAI, asked: dict[str, Any]) -> Completion:
    response = client.chat.completions.with_raw_response.create(**asked).http_response
    try:
        body = json.loads(response.content)
    except ValueError:
        raise BadBody(f"a body that is not JSON: {response.text.strip()[:200]!r}") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not (
        isinstance(choices, list) and choices and isinstance(choices[0], dict) and isinstance(choices[0].get("message"), dict)
    ):
        raise BadBody(f"a body without choices: {response.text.strip()[:200]!r}")
    usage = body.get("usage")
    return Completion(choices[0], usage if isinstance(usage, dict) else {}, response.elapsed.total_seconds())


def listed_models(client: OpenAI) -> list[str] | None:
    """Names of the models that a server lists; None where it has no list. Raises what the client raises."""
    response = client.models.with_raw_response.list().http_response
    try:
        return [str(model["id"]) for model in json.loads(response.content)["data"]]
    except (ValueError, KeyError, TypeError):
        return None


def image_part(image: Image.Image) -> dict:
    """The part of a message that shows ``image``, as PNG: the server sees the same pixels."""
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"}}


def is_refusal(error: APIStatusError) -> bool:
    """Whether the server refused this request, so that another try would be refused too."""
    return error.status_code < 500 and error.status_code not in (408, 409, 429)


def refusal(error: APIStatusError) -> str:
    """What was refused and why, in the server's words; for a wrong key, address or model name also what to do."""
    remedy = _REMEDY.get(error.status_code)
    return f"the server refused the request ({error.status_code}): {reason(error)}" + (f"; {remedy}" if remedy else "")


def refuses_all(error: APIStatusError) -> bool:
    """Whether the server would refuse every request: it does not take the key, the address or the model's name."""
    return error.status_code in _REMEDY


def reason(error: APIStatusError) -> str:
    """What the server gave as its reason; the client's own sentence leaves out what it does not know the form of."""
    return error.response.text.strip()[:500] or error.message
