"""A fake OpenAI-compatible server for tests: it counts prompts with the processor itself, says what it is told to, and has every kind of trouble."""

from __future__ import annotations

import base64
import copy
import io
import json
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image
from transformers import AutoProcessor

from awares_bench.inference.openai_server import Endpoint
from awares_bench.models.packaged import resolve

LIMITS = {"shortest_edge": 3136, "longest_edge": 12845056}


@cache
def processor():
    return AutoProcessor.from_pretrained(resolve("nano"))


def pictures(body: dict) -> list[Image.Image]:
    """Those of a request, in order."""
    parts = [part for m in body["messages"] if not isinstance(m["content"], str) for part in m["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB") for url in urls]


def prompt_tokens(body: dict, limits: dict = LIMITS) -> int:
    """As transformers' processor makes them of the request."""
    talk = [m if isinstance(m["content"], str) else {**m, "content": [_part(p) for p in m["content"]]} for m in body["messages"]]
    text = processor().apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ready = copy.copy(processor().image_processor)
    grids = [ready(images=[image], size=limits)["image_grid_thw"][0].tolist() for image in pictures(body)]
    ids = processor().tokenizer(text, add_special_tokens=False)["input_ids"]
    return len(ids) + sum(rows * columns // 4 - 1 for _, rows, columns in grids)


def _part(part: dict) -> dict:
    return {"type": "image"} if part["type"] == "image_url" else part


class Server(BaseHTTPRequestHandler):
    """Calls for a quadrant, then answers. What it is to do otherwise is in ``self.server.state``:

    trouble: status codes and bodies (bytes) of the next requests, or a function of the request; refuses: fields that it does not take; limits, more: of its count of
    prompt tokens (None: it reports no usage); choice: fields of every choice, or a function of the request that gives them; cached: a
    function of the request; key: the one that it asks for; models: those that it lists (None: 404); seconds: how long a reply takes.
    """

    def do_GET(self):
        state = self.server.state
        if state["key"] and self.headers["Authorization"] != f"Bearer {state['key']}":
            self._send(401, {"error": {"message": "Unauthorized"}})
        elif state["models"] is None:
            self._send(404, {"error": {"message": "Not Found"}})
        else:
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in state["models"]]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server.state
        with state["lock"]:
            state["flying"] += 1
            state["most"] = max(state["most"], state["flying"])
            state["bodies"].append(body)
            state["ranks"].append(self.headers["X-data-parallel-rank"])
            if callable(state["trouble"]):
                trouble = state["trouble"](body)
            else:
                trouble = state["trouble"].pop(0) if state["trouble"] else 200
        time.sleep(state["seconds"](body) if callable(state["seconds"]) else state["seconds"])
        refused = sorted(state["refuses"] & set(body))
        try:
            if isinstance(trouble, bytes):
                self._send(200, trouble)
            elif trouble != 200:
                self._send(trouble, {"error": {"message": "no"}})
            elif state["key"] and self.headers["Authorization"] != f"Bearer {state['key']}":
                self._send(401, {"error": {"message": "Unauthorized"}})
            elif state["models"] is not None and body["model"] not in state["models"]:
                self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            elif refused:
                self._send(422, {"error": {"message": f"unexpected fields: {refused}"}})
            else:
                self._send(200, self._completion(body))
        finally:
            with state["lock"]:
                state["flying"] -= 1

    def _completion(self, body: dict) -> dict:
        state = self.server.state
        said = "7\n\nrest" if len(body["messages"]) > 2 else "GET_CROPS: ['3']"
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        more = state["choice"](body) if callable(state["choice"]) else state["choice"]
        usage = more.pop("usage", {}) if (more := dict(more)) else {}
        choice |= more
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        if state["more"] is not None:
            written = str(choice["message"].get("content") or "")
            ids = processor().tokenizer(written, add_special_tokens=False)["input_ids"]
            counts = {"prompt_tokens": prompt_tokens(body, state["limits"]) + state["more"]}
            counts |= {"completion_tokens": len(ids) + (choice["finish_reason"] == "stop")}
            if state["cached"]:
                counts["prompt_tokens_details"] = {"cached_tokens": state["cached"](body)}
            reply["usage"] = counts | usage
        return reply

    def _send(self, status: int, body: dict | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "application/json")
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Quiet(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_):
        """Clients that go away are part of the tests."""


def start(port: int = 0) -> Quiet:
    server = Quiet(("127.0.0.1", port), Server)
    server.state = {
        "lock": threading.Lock(), "flying": 0, "most": 0, "bodies": [], "ranks": [], "trouble": [], "refuses": set(), "limits": LIMITS,
        "more": 0, "choice": {}, "cached": lambda body: prompt_tokens(body), "key": None, "models": ["m"], "seconds": 0.05,
    }  # fmt: skip
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


def endpoint(server, **more):
    return Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", "nano", **{"wait_for_server": 0, **more})
