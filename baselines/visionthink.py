"""VisionThink: reason over a half-size view, and call for the original image when that is not enough.

Paper    Yang et al., NeurIPS 2025, https://arxiv.org/abs/2507.13348
Code     https://github.com/dvlab-research/VisionThink at 42afd8c, ``scripts/vllm_tool.py``
Needs    a checkpoint trained for it (the authors release Qwen2.5-VL-7B weights)
Cost     the half-size view, plus every visual token after a call; hundreds of output tokens
Differs  a call is read as JSON (the released pattern wants ``}}`` adjacent and may feed Python's own messages back); documents of several images may call; the task's stop strings and token limit do not cut the reasoning
"""

from __future__ import annotations

from dataclasses import dataclass

from awares_bench import Event, EventKind, Policy, Sample, Turn, TurnGenerator
from awares_bench.methods.crop_turns import note_half_view
from awares_bench.methods.images import HALF_SHARE, enlarged, half
from awares_bench.methods.tool_calls import CallError, answered, json_values, tagged

# Quoted from the authors' code (Apache-2.0): the released checkpoint expects these strings exactly.
SYSTEM = """You are a helpful assistant.

# Tools

You may call the function tool shown below to assist with the user query.

You are provided with the function signature within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name_for_human": "resize_image", "name": "resize_image", "description": "Resize the image resolution.", "parameters": {"properties": {"action": {"description": "The action to perform. The available actions are:
* `resize`: Double the resolution of the current image. You should only use this tool if you are unable to obtain the critical information needed to answer the question from the current resolution.", "enum": ["resize"], "type": "string"}}, "required": ["action"], "type": "object"}, "args_format": "Format the arguments as a JSON object."}}
</tools>
For each function call, return a json object with the function name and the corresponding argument within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

BEFORE = (
    "Answer the question based on the image provided. You must conduct reasoning within <think> and </think> first in each of "
    "your reasoning steps. You may call ONE function tool per step to help you better solve the problem. Place the function tool "
    "within <tool_call> and </tool_call> at the end of each step to perform a function call. You should continue your reasoning "
    "process based on the content returned by the function tool. Once you confirm your final answer, place the final answer inside "
    "<answer> and </answer>. For mathematical or multiple-choice problem, wrap the answer value or choice with \\boxed{}. "
    "Here is the image and question:\n"
)
RESIZED = "<tool_response>\nThe resized image is shown below:\n"
CONTINUE = (
    "\n</tool_response>\nPlease carefully analyze the content returned from the image resize tool in combination with the original "
    "question and image from the user, continue your reasoning process inside <think> and </think> and then write your final answer "
    "inside <answer> and </answer>."
)
AFTER_ERROR = (
    "Please analyze the error information obtained from the function tool and adjust your response. Countinue your reasoning "
    "process inside <think> and </think>."
)


@dataclass(frozen=True)
class VisionThink(Policy):
    """Think at half size; at most one call for the original.

    budget: tokens of each turn, whatever the task allows (the authors' 8,192)
    """

    budget: int = 8192

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.budget, int) or self.budget < 1:
            raise ValueError(f"budget is {self.budget!r}; it is a number of tokens, at least 1")

    def turns(self, sample: Sample) -> TurnGenerator:
        how = {"min_reply_tokens": self.budget, "until": ()}
        views = tuple(enlarged(half(image)) for image in sample.images)
        question = f"\n{sample.question}" if views else BEFORE + sample.question
        first = yield Turn(
            views,
            question,
            shares=(HALF_SHARE,) * len(views),
            system=SYSTEM,
            image_prefixes=(BEFORE,),
            is_final=False,
            **how,
        )
        yield from note_half_view(sample, first)
        try:
            called = tool_call(first.text)
        except CallError as error:
            yield Event(EventKind.MALFORMED_CALL, str(error))
            second = yield Turn((), f"{error}{AFTER_ERROR}", omit_newline=True, **how)
        else:
            if not called:
                return answered(first, final_answer(first.text))
            if not sample.images:
                yield Event(EventKind.NO_IMAGE, "a call for an image that the document does not have counts as the answer")
                return answered(first, final_answer(first.text))
            originals = tuple(enlarged(image) for image in sample.images)
            before = (RESIZED, *["\n"] * (len(originals) - 1))
            second = yield Turn(originals, CONTINUE, image_prefixes=before, omit_newline=True, crops=("all",), **how)
        if "<tool_call>" in second.text:
            yield Event(EventKind.CALL_IN_ANSWER, "a second call is not answered")
        return answered(second, final_answer(first.text + second.text))


def tool_call(text: str) -> bool:
    """Whether a reply calls ``resize_image``. Raises CallError when it makes another call, or one that cannot be read."""
    calls = tagged(text, "tool_call")
    if not calls:
        return False
    try:
        found = [json_values(call) for call in calls]
        actions = [call["arguments"]["action"] for some in found for call in some]
    except (ValueError, KeyError, TypeError) as error:
        raise CallError("The function call is not a JSON object with a name and arguments.") from error
    if not actions:
        raise CallError("The function call is not a JSON object with a name and arguments.")
    if actions[0] != "resize":
        raise CallError(f"Unknown Tool Type: {actions[0]}. Available function tools are: `resize`")
    if len(actions) > 1:
        raise CallError("You should only call function `resize` once per function call.")
    return True


def final_answer(text: str) -> str:
    """All the model wrote -> what it put between the answer tags: before the first that closes, after the last that opens."""
    return text.split("</answer>")[0].split("<answer>")[-1].strip()
