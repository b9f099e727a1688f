"""One client of OpenAI-compatible servers, with one policy: what is tried again, what ends the run, and the sentences for both.

Tried again, by the openai client itself: refused connections, time-outs, rate limits (waiting as long as the server asks) and server
errors. Not tried again: an address that cannot be one, a key or a model that the server does not know, and any other refusal.
"""

from __future__ import annotations

import base64
import io
import os
from urllib.parse import urlsplit

from openai import APIStatusError, OpenAI
from PIL import Image

from awares_bench.errors import RunError

RETRIES = 12
"""The client waits 0.5 s after the first failure and up to 8 s after later ones: a server has about a minute to come back."""

_REMEDY = {
    401: "set the environment variable OPENAI_API_KEY to the server's key",
    403: "set the environment variable OPENAI_API_KEY to a key that may use this model",
    404: "the address usually ends in /v1, and the model must be a name that the server lists under /v1/models",
}


def open_client(base_url: str, retries: int = RETRIES, timeout: float = 600.0) -> OpenAI:
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
