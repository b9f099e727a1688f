"""Qwen's own vocabulary as a ``tokenizer.json``, from the ranks that a development dependency (dashscope) carries."""

from __future__ import annotations

import base64
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2.5 divides text before it merges."""

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"),
    "<|file_sep|>",
)
"""Tokens added after the ranks, in Qwen2.5's order: ids 151643 to 151664."""


def qwen_tokenizer_json(folder: str | Path) -> Path:
    """Write Qwen2.5's tokenizer into ``folder`` -> path of its tokenizer.json. Raises ImportError without dashscope."""
    path = Path(folder) / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _made().save(str(path))
    return path


@lru_cache(maxsize=1)
def _made() -> Tokenizer:
    """From the ranks, which takes seconds: once a process."""
    package = find_spec("dashscope")
    if package is None:
        raise ImportError("Qwen's vocabulary comes with the package dashscope; install the development dependencies")
    ranks = {}
    for line in (Path(package.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = _letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) > 1:
            left, right = _halves(token, rank, ranks)
            merges.append((spelled[left], spelled[right]))
    tokenizer = Tokenizer(models.BPE(vocab={spelled[t]: r for t, r in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in PLAIN])
    return tokenizer


@lru_cache(maxsize=1)
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5's tokenizer, made once a session."""
    with tempfile.TemporaryDirectory() as folder:
        path = qwen_tokenizer_json(folder)
        return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merge into ``token``: what merging with the lower ranks alone leaves of it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[at] >= rank:
            raise ValueError(f"no two tokens of lower rank make {token!r}")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
