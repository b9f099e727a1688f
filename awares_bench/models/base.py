"""What a host model must provide. A family of vision-language models is one file beside this one, found by ``config.model_type``.

Batching, caches, pruning, counting, sampling and scoring are shared between families and see only this class. The model itself stays
the stock one of transformers: whatever runs faster here is put in place for the length of one reply and taken away again, so that the
same weights can be asked through ``model.generate`` at any time.
"""

from __future__ import annotations

import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from inspect import signature
from itertools import chain
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from awares_bench.methods.conversation import Event, Turn, chat_messages
from awares_bench.methods.pruner import VisualTokens

from .limits import RELEASED, Limits
from .prompt_chunk import ImageSpan, PromptChunk

CACHE = "cache" if "cache" in signature(Qwen2Model.forward).parameters else "past_key_values"
"""What decoders and their layers call the argument for their cache: transformers renamed it, and 5.40 drops the old name."""

_HOLE = "\ufdd0reply\ufdd0"  # two noncharacters around a word, lengthened where a question does contain it


@dataclass(frozen=True, eq=False)
class ImageInput:
    """A picture as a family's vision encoder takes it, on the CPU."""

    inputs: dict[str, Tensor]
    """What the encoder is called with; names and shapes are the family's own."""

    runs: tuple[tuple[int, int], ...]
    """Rows and columns of each contiguous run of visual tokens: one for native resolution, one a tile for tiling families."""

    text: str
    """What stands for the picture in the rendered prompt: its visual tokens and the marks between them."""

    events: tuple[Event, ...] = ()

    key: str = ""
    """Names the content (``HostModel.image_key``), where features are to be kept or shared; else empty."""

    @property
    def tokens(self) -> int:
        """Visual tokens that the decoder is fed."""
        return sum(rows * columns for rows, columns in self.runs)

    @cached_property
    def seed(self) -> int:
        """A number that the pixels alone decide."""
        return zlib.crc32(next(iter(self.inputs.values())).contiguous().numpy().data)

    def pinned(self) -> ImageInput:
        """The same in page-locked memory, from which a GPU copies without waiting."""
        return ImageInput({k: v.pin_memory() for k, v in self.inputs.items()}, self.runs, self.text, self.events, self.key)


class HostModel(ABC):
    """A vision-language model and its processor, as the engine and the trainer see them.

    A subclass says what is its family's own: pictures to encoder inputs, their token count, encoding, positions. Greedy decoding,
    batches, caches, pruning and scoring are built on ``embed``, ``rope``, ``layer`` and ``logits``.
    """

    model_types: ClassVar[tuple[str, ...]]
    """``config.model_type`` of the checkpoints that this family runs."""

    model_class: ClassVar[type[PreTrainedModel]]
    """The class of transformers that loads them."""

    provides: ClassVar[frozenset[str]]
    """What pruners may ask for: of ``methods.pruner.NEEDS``, and ``decoder_attention``. The question comes with every family."""

    default_limits: ClassVar[tuple[int, int]] = RELEASED
    """Fewest and most pixels of a picture in the family's released processors."""

    position_axes: ClassVar[int] = 1
    """Axes of a position: 3 for M-RoPE, 1 for RoPE."""

    image_marks: ClassVar[tuple[str, ...]] = ()
    """Texts that the tokenizer reads as the place of a picture or video, beside the placeholder."""

    lora_targets: ClassVar[str]
    """Regular expression of the decoder's linear layers, for adapters."""

    decoder_layer: ClassVar[str]
    """Class name of a decoder layer: what FSDP wraps."""

    tiles: ClassVar[bool] = False
    """A picture costs tiles of a fixed size, however many pixels it has; the share of the original that it stands for (``Turn.shares``)
    decides how many. At native resolution its pixels do, and the share is not read."""

    stock_packages: ClassVar[tuple[str, ...]] = ()
    """Modules that lmms-eval's own model of this family needs and does not install."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        limits: str | None = None,
    ) -> None:
        """limits: a set of limits by name (``limits.NAMED``), None for ``own_limits``; min_pixels, max_pixels: in its place."""
        asked = Limits(limits, min_pixels, max_pixels)
        (least, most), self.limits_name = asked.resolve(model.config.model_type, self.own_limits(processor))
        self.model, self.processor, self.tokenizer = model.eval(), processor, processor.tokenizer
        self.limits = {"shortest_edge": least, "longest_edge": most}
        self.image_token: int = model.config.image_token_id
        stop = model.generation_config.eos_token_id
        self.stop = set(stop if isinstance(stop, list) else [stop]) | {self.tokenizer.eos_token_id}

    def on(self, model: PreTrainedModel) -> HostModel:
        """The same family and processor around other weights."""
        return type(self)(model, self.processor, self.limits["shortest_edge"], self.limits["longest_edge"])

    # ------------------------------------------------------------------ what a family writes

    @classmethod
    def accepted(cls, image: Image.Image) -> tuple[Image.Image, list[Event]]:
        """A picture as the family's processor accepts it, and an event where that is not the picture itself."""
        return image, []

    @classmethod
    def own_limits(cls, processor: Any) -> tuple[int, int]:
        """Fewest and most pixels of a picture where nobody asks for others: ``default_limits``; of tiling families and GLM those of the checkpoint."""
        return cls.default_limits

    @classmethod
    @abstractmethod
    def count_tokens(cls, processor: Any, limits: dict[str, int], image: Image.Image, share: float = 1.0) -> int:
        """Visual tokens of a picture under a processor's limits, without encoding it: equal to ``image_input(image, share=share).tokens``."""

    @classmethod
    def processor_sizes(cls, config: Any, image_processor: Any) -> dict[str, tuple[int | None, int]]:
        """Sizes that a picture processor and the model's config must agree on: name -> (the processor's, the config's)."""
        return {}

    @abstractmethod
    def image_input(self, image: Image.Image, key: str = "", share: float = 1.0) -> ImageInput:
        """An RGB picture -> what the encoder takes. Runs in any thread, without the device.

        share: of the original that the picture stands for (``Turn.shares``), read by tiling families.
        """

    @abstractmethod
    def encode(self, images: list[ImageInput], needs: Iterable[str] = (), block: int = -1) -> list[VisualTokens]:
        """Pictures -> the visual tokens of each run, in order, in raster order within a run.

        needs: fields of ``VisualTokens`` to fill beside the features, from vision block ``block``. Raises RunError for a block
        that cannot give them.
        """

    def positions(self, ids: list[int], images: list[ImageInput], start: int = 0) -> tuple[Tensor, int]:
        """Positions (axes, L) of a chunk that begins at position ``start``, and the position after it."""
        return torch.arange(start, start + len(ids))[None], start + len(ids)

    @cached_property  # a module looks up its parts by name, and these are asked for at every layer
    def decoder(self) -> PreTrainedModel:
        """Embeddings, layers and final norm."""
        return self.model.model.language_model

    @cached_property
    def tower(self) -> PreTrainedModel:
        """The vision encoder, with its projector where that is a part of it."""
        return self.model.model.visual

    @property
    def vision_parts(self) -> tuple[nn.Module, ...]:
        """All that runs before the decoder: the vision encoder, and what stands between the two. Frozen in training."""
        return (self.tower,)

    def fast_tower(self) -> AbstractContextManager:
        """Within the block the vision encoder runs on this package's kernels, where there are any."""
        return nullcontext()

    # ------------------------------------------------------------------ shared: properties

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device  # model.device goes through every parameter, and this is asked often

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.decoder.layers)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads and the width of a head of the decoder."""
        config = self.decoder.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_attention_heads, config.num_key_value_heads, width

    @property
    def context(self) -> int:
        """Positions that the checkpoint was trained for."""
        return self.decoder.config.max_position_embeddings

    @property
    def attention(self) -> str:
        """The attention implementation of the decoder."""
        return self.decoder.config._attn_implementation

    @cached_property
    def placeholder(self) -> str:
        """The text of an image token."""
        return self.tokenizer.convert_ids_to_tokens(self.image_token)

    @cached_property
    def _end_text(self) -> str:
        """What the chat template writes after a reply."""
        turns = [Turn((), "a"), Turn((), "b")]
        return rendered(self.processor, chat_messages(turns, [_HOLE])).split(_HOLE)[-1]

    @cached_property
    def opening(self) -> str:
        """What the template writes between its prompt for a reply and the reply, such as a space; see ``opening_of``."""
        return opening_of(lambda turns, replies: rendered(self.processor, chat_messages(turns, replies)))

    def reply_tokens(self, reply: str) -> list[int]:
        """The ids of a reply that somebody wrote, as the template has it after its prompt; without the end of the turn."""
        return self.tokenizer(self.opening + reply, add_special_tokens=False)["input_ids"]

    @cached_property
    def end_of_turn(self) -> int:
        """The token with which the template ends a reply, found by rendering one."""
        return self.tokenizer(self._end_text, add_special_tokens=False)["input_ids"][0]

    # ------------------------------------------------------------------ shared: pictures and text to tokens

    def visual_tokens(self, image: Image.Image, share: float = 1.0) -> int:
        """Visual tokens that ``image`` costs under this processor's limits, without encoding it. share: see ``Turn.shares``."""
        return self.count_tokens(self.processor, self.limits, image, share)

    def image_key(self, image: Image.Image, share: float = 1.0) -> str:
        """Names what the encoder would be given for a picture: equal for equal pixels, size and limits, and share where that is read."""
        settings = repr((*((share,) if self.tiles else ()), image.size, image.mode, self.limits)).encode()[:64]
        return hashlib.blake2b(image.tobytes(), digest_size=16, key=settings).hexdigest()

    def check_text(self, text: str, what: str = "the question") -> None:
        """Raise ValueError when a text holds an image mark, which the tokenizer would take for an image, or cannot be tokenized."""
        check_text(text, (self.placeholder, *self.image_marks), what)

    def render(self, turns: list[Turn], replies: list[str], images: list[ImageInput]) -> list[int]:
        """Token ids that the last turn adds to a conversation: everything up to where the model writes.

        The chat template renders the whole conversation with holes for the replies; what follows the last hole is new.
        """
        hole = _HOLE
        while any(hole in text for t in turns for text in (t.text, t.system or "", *t.image_prefixes)):
            hole += "\ufdd0"
        history = chat_messages(turns, [hole] * len(replies))
        text = rendered(self.processor, history).split(hole)[-1]
        if turns[-1].omit_newline:  # the end of the model's reply, the line break to leave out, the new message
            end = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            text = text.replace(f"{end}\n", end, 1)
        # every placeholder becomes what its picture takes in the prompt
        first, *others = text.split(self.placeholder)
        text = first + "".join(image.text + rest for image, rest in zip(images, others, strict=True))
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # ------------------------------------------------------------------ shared: the decoder, a layer at a time

    def embed(self, ids: Tensor, features: Tensor | None = None) -> Tensor:
        """Token ids (..., L) -> embeddings (..., L, D), those of image tokens replaced by ``features`` (V, D), in order."""
        embeds = self.model.get_input_embeddings()(ids)
        if features is None:
            return embeds
        places = (ids == self.image_token)[..., None].expand_as(embeds)
        return embeds.masked_scatter(places, features.to(embeds.dtype))

    def chunk(self, ids: list[int], images: list[ImageInput], visual: list[VisualTokens], start: int) -> PromptChunk:
        """What a turn adds, ready for the decoder. visual: of every run of the images, in order; start: the first position."""
        tokens = torch.tensor(ids)
        places = (tokens == self.image_token).nonzero().squeeze(1).tolist()  # here: a GPU would have to be waited for
        embeds = self.embed(moved(tokens, self.device), torch.cat([v.features for v in visual]) if visual else None)
        positions, after = self.positions(ids, images, start)
        spans, at = [], 0
        for run in visual:
            spans.append(ImageSpan(places[at], replace(run, deepstack=None), len(run.features)))
            at += len(run.features)
        deepstack = None
        if visual and visual[0].deepstack is not None:
            added = torch.cat([run.deepstack for run in visual if run.deepstack is not None], 1)  # (N, V, D)
            deepstack = embeds.new_zeros((len(added), *embeds.shape))
            deepstack[:, places] = added.to(embeds.dtype)
        return PromptChunk(embeds, moved(positions, self.device), after, tuple(spans), deepstack)

    def question_of(self, ids: list[int]) -> slice:
        """Of the tokens of a turn after its last image, those that the user wrote: up to the end of the message, without marks."""
        text = ids[len(ids) - ids[::-1].index(self.image_token) :] if self.image_token in ids else ids
        stop = text.index(self.end_of_turn) if self.end_of_turn in text else len(text)
        marks = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        start = next((i for i in range(stop) if text[i] not in marks), stop)
        # a message without an end of its own ends at the mark of the next
        stop = next((i for i in range(start, stop) if text[i] in marks and text[i] != self.image_token), stop)
        return slice(start, stop)

    def rope(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, L, d) at positions (axes, B, L), in the precision of ``hidden``."""
        return self.decoder.rotary_emb(hidden, positions if self.position_axes > 1 else positions[0])

    def layer(
        self, index: int, hidden: Tensor, rope: tuple[Tensor, Tensor], deepstack: Tensor | None = None, **attention: Any
    ) -> Tensor:
        """One decoder layer: (B, L, D) -> (B, L, D). attention: mask, cache, and what registered attention functions take.

        deepstack: (N, B, L, D), what is added after the first N layers.
        """
        hidden = self.decoder.layers[index](hidden, position_embeddings=rope, **attention)
        return hidden if deepstack is None or index >= len(deepstack) else hidden + deepstack[index]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last layer (..., D) -> scores (..., vocabulary), in float32."""
        return self.model.get_output_embeddings()(self.decoder.norm(hidden)).float()

    def hidden_states(self, ids: Tensor, features: Tensor | None, positions: Tensor, mask: Tensor) -> Tensor:
        """All layers and the final norm, without a cache, for training: token ids (B, L) -> (B, L, D).

        features: of the image tokens, ``joined`` (V, D or more). positions: (axes, B, L). mask: (B, L) of tokens, or (B, 1, L, L) of who
        sees whom.
        """
        width = self.decoder.config.hidden_size
        first, *added = features.split(width, 1) if features is not None else (None,)
        positions = positions if self.position_axes > 1 else positions[0]
        extra: dict[str, Any] = {"visual_pos_masks": ids == self.image_token, "deepstack_visual_embeds": added} if added else {}
        embeds = self.embed(ids, first)
        out = self.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **extra)
        return out.last_hidden_state


def rendered(processor: Any, messages: list[dict], asks: bool = True) -> str:
    """Messages through a checkpoint's chat template, thinking off where the template asks (``enable_thinking``). asks: up to the reply.

    Texts go as they are, or as parts of a message where the template shows nothing else, as those of SmolVLM and Idefics3.
    """
    thinking = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    if not _shows_text(processor, str(processor.chat_template)):
        messages = [
            m if not isinstance(m["content"], str) else {**m, "content": [{"type": "text", "text": m["content"]}]}
            for m in messages
        ]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **thinking)


@lru_cache(maxsize=16)
def _shows_text(processor: Any, template: str) -> bool:
    """Whether the template shows a message whose content is a text; those that want parts leave it out in silence, or fail."""
    talk = chat_messages([Turn((), "a"), Turn((), "b")], [_HOLE])
    try:
        return _HOLE in processor.apply_chat_template(talk, tokenize=False)
    except Exception:  # a template is anyone's code
        return False


def opening_of(render: Callable[[list[Turn], list[str]], str]) -> str:
    """What a template writes between its prompt for a reply and the reply. render: turns and the replies between them -> text.

    SmolVLM's prompt ends with ``Assistant:`` and its replies begin with a space, which the model writes itself.
    """
    asked = render([Turn((), "a")], [])
    answered = render([Turn((), "a"), Turn((), "b")], [_HOLE]).split(_HOLE)[0]
    return answered[len(asked) :] if answered.startswith(asked) else ""


def joined(visual: list[VisualTokens]) -> Tensor:
    """Features of several runs as one tensor: (V, D), or (V, (1 + N) D) with what DeepStack adds after N layers beside them."""
    rows = [run.features if run.deepstack is None else torch.cat([run.features, *run.deepstack], 1) for run in visual]
    return torch.cat(rows)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """From the CPU to a device, which a GPU does not wait for: its copy comes from page-locked memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def check_text(text: str, marks: tuple[str, ...], what: str = "the question") -> None:
    """Raise ValueError when a text cannot be given to a tokenizer, or would be read as the place of a picture."""
    mark = next((m for m in marks if m in text), None)
    if mark:
        raise ValueError(f"{what} holds the text {mark!r}, which stands for an image; remove it from {what}")
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if half:
        raise ValueError(
            f"{what} holds half a character, the lone surrogate U+{ord(half):04X}, which no tokenizer reads; repair or remove it"
        )


def every_run(images: Iterable[ImageInput]) -> list[tuple[int, int]]:
    """Rows and columns of the runs of several pictures, in order."""
    return list(chain.from_iterable(image.runs for image in images))
