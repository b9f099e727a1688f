"""Judges of answers: rules, a sentence encoder, a language model in this process, or one at an OpenAI-compatible server."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from awares_bench.errors import AwaresError

Judge = Callable[[str, tuple[str, ...], str], float]
"""(question, accepted answers, prediction) -> how right, 0 to 1."""

RULES = ("exact", "relaxed", "anls")


class JudgeError(AwaresError, RuntimeError):
    """A judge that cannot be asked, or gives no verdict. Its text says what was tried and what to do."""


def plain(text: str) -> str:
    """Lower case, single spaces, no closing full stop."""
    return re.sub(r"\s+", " ", text.strip().lower()).removesuffix(".")


def exact(question: str, answers: tuple[str, ...], prediction: str) -> float:
    """1 when the prediction is one of the answers, apart from case, white space and a closing full stop."""
    return float(plain(prediction) in map(plain, answers))


def relaxed(question: str, answers: tuple[str, ...], prediction: str) -> float:
    """As ``exact``; numbers may be 5 % off (ChartQA's measure)."""
    if exact(question, answers, prediction):
        return 1.0
    number = _number(prediction)
    truths = [n for n in map(_number, answers) if n is not None]
    return float(number is not None and any(abs(number - t) <= 0.05 * abs(t) for t in truths))


def anls(question: str, answers: tuple[str, ...], prediction: str, threshold: float = 0.5) -> float:
    """1 - edit distance / length of the longer, of the nearest answer; 0 below ``threshold`` (DocVQA's measure)."""
    from rapidfuzz.distance import Levenshtein

    best = max(Levenshtein.normalized_similarity(plain(prediction), plain(a)) for a in answers)
    return best if best >= threshold else 0.0


def _number(text: str) -> float | None:
    text = plain(text).replace(",", "").strip("$ ")
    percent = text.endswith("%")
    try:
        return float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        return None


class Embedding:
    """Cosine of sentence embeddings, clipped to 0 to 1 (paper Sec. 3.4, which names no encoder)."""

    def __init__(self, model: str = "sentence-transformers/all-MiniLM-L6-v2"):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise JudgeError("the answer reward 'embedding' needs: pip install sentence-transformers") from error
        self.model = SentenceTransformer(model)

    def __call__(self, question: str, answers: tuple[str, ...], prediction: str) -> float:
        vectors = self.model.encode([plain(prediction), *map(plain, answers)], normalize_embeddings=True)
        return float(max(0.0, min(1.0, (vectors[1:] @ vectors[0]).max())))


class Endpoint:
    """Chat of an OpenAI-compatible server. retries (None: the client's own number), timeout: see ``openai_client``; the key is read from
    OPENAI_API_KEY."""

    def __init__(self, url: str, model: str, timeout: float = 60.0, retries: int | None = None):
        from awares_bench.inference.openai_client import RETRIES, open_client

        self.url, self.model, self.retries = url, model, RETRIES if retries is None else retries
        self.client = open_client(url, self.retries, timeout)

    def say(self, prompt: str | list[dict], max_tokens: int = 16) -> str:
        """The greedy reply to a prompt, or to the parts of one. Raises JudgeError when there is none."""
        from openai import APIConnectionError, APIError, APIStatusError

        from awares_bench.inference.openai_client import is_refusal, refusal

        messages: Any = [{"role": "user", "content": prompt}]
        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=max_tokens, temperature=0
            )
            return completion.choices[0].message.content or ""
        except (APIConnectionError, APIStatusError) as error:
            if isinstance(error, APIStatusError) and is_refusal(error):
                raise JudgeError(f"{self.url}, model {self.model}: {refusal(error)}") from error
            cause = f"gave no answer in {self.retries + 1} tries ({type(error).__name__}: {error})"
        except (APIError, AttributeError, IndexError, TypeError, ValueError) as error:
            cause = f"gave an answer that is no chat completion ({type(error).__name__}: {error})"
        raise JudgeError(f"{self.url} {cause}; what is already judged is kept, start the server and rerun")


class LocalModel:
    """Chat of a language model in this process, greedy."""

    def __init__(self, model: str, device: str = "cpu"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()

    def say(self, prompt: str, max_tokens: int = 16) -> str:
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        out = self.model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


THREE_WAY = """Two responses to a question about an image are compared with the ground truth.

Question: {question}
Ground truth: {truth}
Response 1: {first}
Response 2: {second}

Answer with one digit and nothing else:
0 - no real difference: both are equally good, or equally bad
1 - Response 1 is better
2 - Response 2 is better"""
"""The task of the paper's judge (supplement 7.1), in our words: low resolution is response 1, full resolution response 2."""

GRADE = """Is the response to this question correct? Wording and format do not matter, the content does.

Question: {question}
Ground truth: {truth}
Response: {response}

Answer with one digit and nothing else: 1 if it is correct, 0 if not."""


class Chat:
    """A language model as judge. ``say``: prompt -> text."""

    def __init__(self, model):
        self.say = model.say

    def __call__(self, question: str, answers: tuple[str, ...], prediction: str) -> float:
        """1 or 0. Raises JudgeError when the reply is no verdict."""
        reply = self.say(GRADE.format(question=question, truth=" or ".join(answers), response=prediction))
        digit = _digit(reply, "01")
        if digit is None:
            raise JudgeError(f"the judge was asked for 0 or 1 and said {reply!r}; use another judge model")
        return float(digit)

    def compare(self, question: str, answers: tuple[str, ...], low: str, full: str) -> int | None:
        """0 no difference, 1 low better, 2 full better; asked in both orders. None when they disagree or a reply is no digit."""
        truth = " or ".join(answers)
        first = _digit(self.say(THREE_WAY.format(question=question, truth=truth, first=low, second=full)), "012")
        second = _digit(self.say(THREE_WAY.format(question=question, truth=truth, first=full, second=low)), "012")
        swapped = {0: 0, 1: 2, 2: 1, None: None}[second]
        return first if first == swapped else None


def _digit(reply: str, allowed: str) -> int | None:
    numbers = re.findall(r"\d+", reply)
    return int(numbers[0]) if len(numbers) == 1 and numbers[0] in allowed else None


def judge(name: str, model: str = "", url: str = "", device: str = "cpu") -> Judge:
    """``exact``, ``relaxed``, ``anls``, ``embedding``, ``local`` (a language model here) or ``endpoint``. Raises ValueError."""
    rules = {"exact": exact, "relaxed": relaxed, "anls": anls}
    if name in rules:
        return rules[name]
    if name == "embedding":
        return Embedding(model) if model else Embedding()
    if name == "local" and model:
        return Chat(LocalModel(model, device))
    if name == "endpoint" and model and url:
        return Chat(Endpoint(url, model))
    raise ValueError(
        f"judge is {name!r}: exact, relaxed, anls and embedding stand alone; "
        "local needs judge_model; endpoint needs judge_model and judge_url"
    )
