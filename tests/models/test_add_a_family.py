"""The worked example of docs/models.md, as it stands there: LLaVA-1.5 as a family, on a tiny random model of the real class."""

import re
from functools import cache
from pathlib import Path

import pytest
import transformers as hf

from awares_bench.baselines.divprune import DivPrune
from awares_bench.inference.generic_model import GenericModel
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.session import Session
from awares_bench.models.generic import GenericHost

from ..helpers.tiny_generic import LLAVA_TEMPLATE, TOWER, drawn, sized, tokenizer
from ..inference.test_generic_model import TURNS, same
from . import test_host_contract as contract

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@cache
def llava():
    """The example's host around a model of four patches a side."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    example: dict = {}
    exec(compile(code, str(PAGE), "exec"), example)
    made = tokenizer("<image>")
    config = hf.LlavaConfig(
        text_config=sized(made) | {"model_type": "llama"},
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14},
        image_token_id=made.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        architectures=["LlavaForConditionalGeneration"],
    )
    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(**sizes),
        tokenizer=made,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE.replace("<image>\\n", "<image>"),
        num_additional_image_tokens=1,
    )
    return example["Llava"](drawn(config, made), processor)


@pytest.fixture
def vlm():
    return LocalModel(llava(), constrained=False)


def test_it_keeps_the_contract_of_a_family(vlm):
    contract.test_scores_are_those_of_generate(vlm)
    contract.test_a_second_turn_is_a_fresh_prefill_of_everything(vlm)
    contract.test_a_mixed_batch_is_each_row_alone(vlm, None, DivPrune(0.5))
    contract.test_the_end_of_a_turn_is_found_by_rendering(vlm)
    for size in contract.SIZES:
        contract.test_tokens_are_counted_as_they_are_encoded(vlm, size)


def test_policies_pruners_scoring_and_rollouts_run_on_it(vlm):
    contract.test_policies_pruners_scoring_and_rollouts_run_on_it(vlm)


def test_the_generic_host_says_the_same(vlm):
    other = GenericModel(GenericHost(vlm.host.model, vlm.host.processor), constrained=False)
    for turn in TURNS:
        same(vlm, other, turn, (Session(), Session()))
