"""What is GLM's own: its limits, its tower's operations, and turns that end where the next begins. The contract's tests are slow for it."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Turn
from awares_bench.models.flops import vision_flops

from ..helpers.tiny import picture
from . import test_host_contract as contract
from .test_host_contract import TINY, TOLERANCE, TURN, scores


@pytest.fixture
def vlm() -> LocalModel:
    return LocalModel(TINY["glm4v"](), constrained=False)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # GLM's processor (transformers 5.24) and NumPy 2
def test_its_scores_are_those_of_generate(vlm):
    contract.test_scores_are_those_of_generate(vlm)


def test_a_second_turn_begins_with_the_end_of_the_reply_and_a_question_ends_at_the_mark_of_the_next(vlm):
    one, two = Turn((picture(84, 56),), "how many?", is_final=False), Turn((), "and now?")
    host = vlm.host
    first, second = (host.render([one], [], [host.image_input(one.images[0])]), host.render([one, two], ["3"], []))
    assert host.tokenizer.decode(second) == "<|user|>\nand now?<|assistant|>\n"
    assert host.end_of_turn in host.stop
    asked = first[len(first) - first[::-1].index(host.image_token) :]
    assert host.tokenizer.decode(asked[host.question_of(first)]) == "how many?"


def test_limits_are_of_two_frames_and_counted_as_the_processor_does(vlm):
    for size in ((1, 1), (20, 300), (101, 67), (900, 700), (4000, 30)):
        image = picture(*size)
        assert vlm.visual_tokens(image) == vlm.host.image_input(image).tokens
    processor = copy.deepcopy(vlm.host.processor)
    processor.image_processor.size = {"shortest_edge": 12544, "longest_edge": 9633792}
    assert type(vlm.host)(vlm.host.model, processor).limits == {"shortest_edge": 12544, "longest_edge": 9633792}
    host = type(vlm.host)(vlm.host.model, vlm.host.processor, 12544, 2 * 100 * 28 * 28)
    assert 80 < host.visual_tokens(picture(900, 700)) <= 100


def test_the_towers_operations_are_those_that_pytorch_counts(vlm):
    image = vlm.host.image_input(picture(280, 196))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the CPU's fused attention
        vlm.host.tower(image.inputs["pixel_values"], grid_thw=image.inputs["image_grid_thw"])
    config = vlm.host.model.config.vision_config.to_dict()
    assert vision_flops(image.tokens, config) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_batch_of_unlike_rows_is_each_row_alone(vlm, layout):
    turns = [TURN, Turn((picture(224, 168), picture(56, 56)), "Same?"), Turn((), "No picture?")]
    together = scores(vlm, [Request(Session(), t, 3) for t in turns])
    for b, turn in enumerate(turns):
        alone = scores(vlm, [Request(Session(), turn, 3)])[:, 0]
        assert torch.allclose(together[: len(alone), b], alone, atol=TOLERANCE)
