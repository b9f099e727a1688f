"""Any image-text-to-text model of transformers with a chat template and image tokens, run as it is: what a family without a host of its own gets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from awares_bench.errors import CheckpointError, RunError
from awares_bench.methods.conversation import Event, Turn, chat_messages

from .base import check_text, opening_of, rendered
from .checkpoint import saying
from .families import families
from .limits import Limits
from .qwen2_5_vl import within_aspect

_HOLE = "\ufdd0reply{}\ufdd0"  # a word between noncharacters, numbered, in the place of each reply

PROBE = 448
"""Side of the picture that a checkpoint's image tokens are looked for in."""


class GenericHost:
    """A model and its processor. Pictures, counts and prompts are the processor's own; nothing inside the model is known.

    min_pixels, max_pixels, limits: of a picture, as for ``HostModel``, where the processor has limits in pixels.
    Raises CheckpointError for a model whose conversations or whose visual tokens cannot be told.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        limits: str | None = None,
    ) -> None:
        self.model, self.processor, self.tokenizer = model.eval(), processor, processor.tokenizer
        self.model_type: str = model.config.model_type
        self.name = model.name_or_path or self.model_type
        # 1) limits
        known, edges = families().get(self.model_type), _pixel_edges(processor.image_processor)
        self.tiles = (
            known.tiles if known else edges is None
        )  # the processor decides what a picture costs, however many pixels it has
        if known and not self.tiles:
            own: tuple[int, int] | None = known.own_limits(processor)
        else:
            least, most = (getattr(processor.image_processor.size, e) for e in edges) if edges else (0, 0)
            own = (least, most) if edges else None
        pixels, self.limits_name = Limits(limits, min_pixels, max_pixels).resolve(self.model_type, own)
        self.limits: dict[str, int | None] = dict(zip(("shortest_edge", "longest_edge"), pixels or (None, None), strict=True))
        self._images_kwargs = {"size": dict(zip(edges, pixels, strict=True))} if edges and pixels else {}
        # 2) tokens
        if model.config.is_encoder_decoder:
            raise CheckpointError(self._refused("is an encoder-decoder, which has no conversation to continue"))
        stop = model.generation_config.eos_token_id
        stop = stop if isinstance(stop, list) else [stop]
        self.stop = {token for token in (*stop, self.tokenizer.eos_token_id) if token is not None}
        named = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
        token = next((n for n in named if n is not None), getattr(processor, "image_token_id", None))
        if token is None:
            raise CheckpointError(
                self._refused("has no image_token_id in its config.json, so that its visual tokens cannot be counted")
            )
        self.image_token: int = token
        self._counts: dict[tuple[int, int], int] = {}
        # 3) the chat template
        self._shows_system = self._check_template()
        with saying(self._refused("has a processor that cannot take a conversation with a picture")):
            made = self.inputs([Turn((Image.new("RGB", (PROBE, PROBE)),), "?")], [])["input_ids"][0]
        if (found := int((made == self.image_token).sum())) < 2:
            raise CheckpointError(
                self._refused(
                    f"takes {found} image tokens for a picture of {PROBE} x {PROBE}, so that its visual tokens cannot be counted"
                )
            )

    def _refused(self, why: str) -> str:
        known = ", ".join(sorted(families()))
        return f"{self.name!r} ({self.model_type}) {why}; known families: {known}; a family is one file, see docs/models.md"

    # ------------------------------------------------------------------ properties

    @cached_property
    def opening(self) -> str:
        """What the template writes between its prompt for a reply and the reply; see ``opening_of``."""
        return opening_of(self.render)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def context(self) -> int | None:
        """Positions that the checkpoint was trained for; None where a token's place is not its position, or nothing is said."""
        config = self.model.config.get_text_config()
        if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
            return None
        return getattr(config, "max_position_embeddings", None)

    @property
    def image_marks(self) -> tuple[str, ...]:
        """Texts that the processor or the tokenizer would take for the place of a picture or video."""
        found = {self.tokenizer.convert_ids_to_tokens(self.image_token)}
        for holder in (self.processor, self.tokenizer):
            names = [n for n in vars(holder) if n.endswith("_token") and any(w in n for w in ("image", "video", "boi", "vision"))]
            found |= {getattr(holder, name) for name in (*names, "image_token") if isinstance(getattr(holder, name, None), str)}
        return tuple(sorted(filter(None, found)))

    @property
    def states(self) -> list[nn.Module]:
        """The decoder's layers and its final norm: before each of them stands the hidden state after so many layers.

        Raises RunError for a decoder that is built otherwise.
        """
        decoder = self.model.get_decoder()
        layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
        if not isinstance(layers, nn.ModuleList) or norm is None:
            raise RunError(
                f"this method reads a hidden state of the decoder, and that of {self.name!r} ({self.model_type}) has no layers and norm "
                f"by these names; give the method a model of another family: {', '.join(sorted(families()))}"
            )
        return [*layers, norm]

    @property
    def encoder(self) -> nn.Module | None:
        """The vision encoder, where transformers knows which module it is."""
        found = self.model.get_encoder(modality="image")
        return None if found in (self.model, self.model.base_model) else found

    # ------------------------------------------------------------------ pictures and text to tokens

    @staticmethod
    def accepted(image: Image.Image) -> tuple[Image.Image, list[Event]]:
        """A picture as processors accept it, and an event where that is not the picture itself."""
        return within_aspect(image)

    def visual_tokens(self, image: Image.Image) -> int:
        """Image tokens that a picture of this size takes in a prompt, found by processing one that is black."""
        if image.size not in self._counts:
            ids = self.inputs([Turn((Image.new("RGB", image.size),), "?")], [])["input_ids"]
            self._counts[image.size] = int((ids == self.image_token).sum())
        return self._counts[image.size]

    def check_text(self, text: str, what: str = "the question") -> None:
        """Raise ValueError when a text holds an image mark, or cannot be tokenized."""
        check_text(text, self.image_marks, what)

    def inputs(self, turns: Sequence[Turn], replies: Sequence[str]) -> dict[str, Any]:
        """What ``model.generate`` takes for the whole conversation, on the CPU; tensors have one row.

        Pictures go as a flat list: some processors treat several of one message otherwise, and a picture must be the same in every turn.
        """
        text = self.render(turns, replies)
        images = [self.accepted(image)[0] for turn in turns for image in turn.images]
        bos = self.tokenizer.bos_token
        plain = not (bos and text.startswith(bos))  # a template that begins with it has written it
        more: dict[str, Any] = {"images": images} if images else {}
        if images and self._images_kwargs:
            more["images_kwargs"] = self._images_kwargs
        return dict(self.processor(text=[text], return_tensors="pt", text_kwargs={"add_special_tokens": plain}, **more))

    def render(self, turns: Sequence[Turn], replies: Sequence[str]) -> str:
        """The conversation as the checkpoint's chat template writes it, replies verbatim, up to where the model writes.

        Raises RunError for a system message that the template cannot show.
        """
        if turns[0].system is not None and not self._shows_system:
            raise RunError(
                f"this method begins with a system message, which the chat template of {self.name!r} ({self.model_type}) does not show; "
                "use a method without one, such as full, low or cropvlm"
            )
        parts = self._parts(turns, len(replies))
        for i, turn in enumerate(turns):
            if turn.omit_newline and i:  # the end of the model's reply, the line break to leave out, the new message
                end = self.tokenizer.convert_ids_to_tokens(self.tokenizer(parts[i], add_special_tokens=False)["input_ids"][0])
                parts[i] = parts[i].replace(f"{end}\n", end, 1)
        return parts[0] + "".join(reply + part for reply, part in zip(replies, parts[1:], strict=True))

    def _parts(self, turns: Sequence[Turn], replies: int) -> list[str]:
        """The rendered texts before the first reply, between replies, and after the last."""
        holes = [_HOLE.format(i) for i in range(replies)]
        text = rendered(self.processor, chat_messages(list(turns), holes))
        out = []
        for hole in holes:
            before, _, text = text.partition(hole)
            out.append(before)
        return [*out, text]

    def _check_template(self) -> bool:
        """Whether the chat template shows a system message. Raises CheckpointError for one that loses a question or a reply.

        Templates differ, and what one does not read it leaves out in silence: so a conversation is rendered, and all of it looked for.
        """
        first = Turn((Image.new("RGB", (PROBE, PROBE)),), "first-question")
        second = Turn((), "second-question")
        failed = "shows no question, or no reply of an earlier turn"
        for system in ("system-message", None):
            try:
                parts = self._parts([Turn(first.images, first.text, system=system), second], 1)
            except Exception as error:  # a template is anyone's code
                failed = f"cannot render a conversation ({error})"
                continue
            whole = "".join(parts)
            wanted = [*([system] if system else []), first.text, second.text]
            if all(parts) and [whole.count(text) for text in wanted] == [1] * len(wanted) and second.text in parts[1]:
                self._check_thinking(parts[-1])
                return system is not None
        raise CheckpointError(self._refused(f"has a chat template that {failed}"))

    def _check_thinking(self, text: str) -> None:
        """Refuse a template that lets the model think at once whatever it is told."""
        if text.rstrip().endswith("<think>"):
            raise CheckpointError(
                f"{self.name!r} ({self.model_type}) always thinks: its chat template opens <think> even with enable_thinking=False, and thoughts "
                "would count as the answer; pass the Instruct checkpoint of the family"
            )


def _pixel_edges(image_processor: Any) -> tuple[str, str] | None:
    """Names of the limits in pixels among a picture processor's sizes; None where it has none.

    Processors of native resolution (with a ``merge_size``) say areas by the names of edges.
    """
    size = getattr(image_processor, "size", None)
    for edges, fits in (
        (("min_pixels", "max_pixels"), True),
        (("shortest_edge", "longest_edge"), hasattr(image_processor, "merge_size")),
    ):
        if fits and all(isinstance(getattr(size, edge, None), int) for edge in edges):
            return edges
    return None


def rows_alike(inputs: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Which conversations can be in one batch: those whose inputs have the same names and, but for the length, the same shapes."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(inputs):
        length = row["input_ids"].shape
        shapes = []
        for name, value in sorted(row.items()):
            alone = not isinstance(value, Tensor) or "attention_mask" not in row  # nobody says how to put it beside another
            shapes.append((name, i if alone else "row" if value.shape == length else tuple(value.shape[1:])))
        groups.setdefault(tuple(shapes), []).append(i)
    return list(groups.values())


def side_by_side(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Inputs of conversations that are alike -> of a batch: ids and masks (1, L) padded on the left, pictures one after another."""
    if len(rows) == 1:
        return dict(rows[0])
    lengths = [row["input_ids"].shape for row in rows]
    longest = max(length[1] for length in lengths)
    out = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if all(value.shape == length for value, length in zip(values, lengths, strict=True)):
            fill = pad if name == "input_ids" else 0
            values = [nn.functional.pad(value, (longest - value.shape[1], 0), value=fill) for value in values]
        out[name] = torch.cat(values)
    return out
