"""engine=generic: what a first-class host says, token by token, in both turns; every policy on families without a host; refusals."""

import copy
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import awares_bench
from awares_bench.awares import AwaRes
from awares_bench.baselines.full import Full
from awares_bench.baselines.visionzip import VisionZip
from awares_bench.errors import CheckpointError, RunError
from awares_bench.inference.call_grammar import CallGrammar
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.generic_model import GenericModel, _Choices, _Done
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.reply_decoder import ReplyDecoder
from awares_bench.inference.session import Request, Session
from awares_bench.inference.token_choice import Sampling
from awares_bench.methods import registry
from awares_bench.methods.conversation import Failure, Sample, Turn, chat_messages
from awares_bench.methods.crop_grid import PAPER_GRID
from awares_bench.methods.images import half
from awares_bench.methods.policy import Policy
from awares_bench.methods.resolution_gate import Gate
from awares_bench.models.families import families
from awares_bench.models.generic import GenericHost
from awares_bench.tasks import nano as nano_suite

from ..helpers.tiny import picture, tiny_vlm
from ..helpers.tiny_generic import TINY
from ..models import test_host_contract as contract

TOLERANCE = 1e-4
KNOWN = sorted(set(contract.TINY) & set(families()))
TURNS = [
    Turn((picture(112, 84),), "Which way?"),
    Turn((picture(140, 112), picture(56, 56)), "Same?", system="Be brief."),
    Turn((), "No picture?"),
]
ASKED = Turn((half(picture(224, 168)),), "Which is red?", system=PAPER_GRID.prompt, is_final=False)
CROPS = Turn(tuple(PAPER_GRID.cut(picture(224, 168), ("top-left", "right"))), crops=("top-left", "right"))
CALL = PAPER_GRID.format(("top-left", "right"))


def generic(host, **options) -> GenericModel:
    """The model of a first-class host, asked through ``generate``."""
    made = GenericHost(host.model, host.processor)
    if made.limits["longest_edge"] is not None:
        made = GenericHost(host.model, host.processor, *host.limits.values())
    return GenericModel(made, **options)


def scored(vlm: LocalModel, requests: list[Request]) -> tuple[torch.Tensor, list]:
    """Scores (steps, B, vocabulary) and replies."""
    vlm.trace = []
    try:
        replies = vlm.reply(requests)
        return torch.stack(vlm.trace), replies
    finally:
        vlm.trace = None


def same(one: LocalModel, other: LocalModel, turn: Turn, sessions: tuple[Session, Session], tokens: int = 5) -> None:
    (a, (x,)), (b, (y,)) = (scored(vlm, [Request(s, turn, tokens)]) for vlm, s in zip((one, other), sessions, strict=True))
    assert x.tokens == y.tokens and x.text == y.text and x.complete == y.complete
    assert (x.usage.encoded, x.usage.prefill, x.usage.text, x.usage.output) == (
        y.usage.encoded,
        y.usage.prefill,
        y.usage.text,
        y.usage.output,
    )
    assert a.shape == b.shape and (a - b).abs().nan_to_num().max() < TOLERANCE


# ------------------------------------------------------------------ beside a first-class host


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f in contract.LIKE_ANOTHER)) for f in KNOWN])
def test_both_turns_are_those_of_the_first_class_host(family):
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs it")
    host = contract.TINY[family]()
    one, other = LocalModel(host, constrained=False), generic(host, constrained=False)
    for turn in TURNS:
        same(one, other, turn, (Session(), Session()))
    sessions = Session(), Session()
    for vlm, session in zip((one, other), sessions, strict=True):
        vlm.reply([Request(session, replace(ASKED, forced_reply=CALL), 8)])
    same(one, other, CROPS, sessions)
    (event,) = sessions[1].events
    assert event.kind == "prefix_recomputed" and event.detail.startswith(f"{one.visual_tokens(ASKED.images[0])} visual and ")


def test_penalty_stop_strings_and_limits_are_the_engines():
    host = tiny_vlm().host
    one, other = (make(host, constrained=False, repetition_penalty=1.3) for make in (LocalModel, generic))
    for turn in TURNS:
        same(one, other, turn, (Session(), Session()), 8)
    (reply,) = one.reply([Request(Session(), TURNS[0], 8)])
    until = (one.text(reply.tokens[2:3]),)
    (a,), (b,) = (vlm.reply([Request(Session(), TURNS[0], 8, until)]) for vlm in (one, other))
    assert (a.text, a.tokens, a.complete) == (b.text, b.tokens, True) and len(b.tokens) < 8


def test_rows_of_a_batch_have_limits_and_penalties_of_their_own():
    vlm = generic(tiny_vlm().host, constrained=False)
    requests = [(TURNS[0], 2, 1.0), (TURNS[1], 5, 1.5), (TURNS[2], 3, None)]

    def asked(which):
        return [Request(Session(), turn, tokens, penalty=penalty) for turn, tokens, penalty in which]

    together = vlm.reply(asked(requests))
    alone = [vlm.reply(asked([r]))[0] for r in requests]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.usage.passes for r in together] == [1, 4, 2] and all(r.usage.prefill_seconds > 0 for r in together)


def hooks(model):
    """Those that ``model`` holds; transformers leaves some of its own once it was asked for attentions."""
    return [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


@pytest.mark.parametrize("depth", [0.4, 1.0])
def test_a_hidden_state_is_the_engines_and_no_layer_after_it_is_run(depth):
    host, turn = tiny_vlm().host, replace(TURNS[1], hidden_state_depth=depth)
    before = hooks(host.model)
    (a,), (b,) = (vlm.hidden_states([Request(Session(), turn, 1)]) for vlm in (LocalModel(host), generic(host)))
    assert np.allclose(a.hidden, b.hidden, atol=TOLERANCE)
    assert (a.usage.prefill, a.usage.text, a.usage.encoded) == (b.usage.prefill, b.usage.text, b.usage.encoded)
    assert hooks(host.model) == before


def documents(count: int) -> list[Sample]:
    """Of the nano suite, two of each family and so on."""
    out = []
    for path in sorted(Path(nano_suite.__file__).parent.glob("nano_*.parquet")):
        for row in pd.read_parquet(path).head(-(-count // 6)).to_dict("records"):
            image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            question = row.get("question") or row["text"]
            out.append(Sample((image,), question, f"{path.stem}/{len(out)}"))
    return out[:count]


def on_nano(count: int) -> int:
    """AwaRes by both engines on documents of the suite -> how many of them call for crops."""
    one, other = (awares_bench.load("nano", engine=engine).vlm for engine in ("transformers", "generic"))
    jobs = [Job(sample, 16) for sample in documents(count)]
    a, b = (dict(Engine(vlm, AwaRes(), batch).run(jobs)) for vlm, batch in ((one, 8), (other, 4)))
    for i in range(count):
        assert [r.text for r in a[i].replies] == [r.text for r in b[i].replies]
        assert (a[i].crops, a[i].rtr, a[i].full_tokens) == (b[i].crops, b[i].rtr, b[i].full_tokens)
        x, y = a[i].usage, b[i].usage
        assert (x.encoded, x.text, x.output) == (y.encoded, y.text, y.output)
    return sum(bool(outcome.crops) for outcome in a.values())


def test_awares_on_nano_is_the_engines():
    assert on_nano(4) >= 1


@pytest.mark.slow
def test_awares_on_twelve_documents_of_nano_is_the_engines():
    assert on_nano(12) >= 3


def test_a_call_is_held_to_the_grammar_and_that_is_said():
    """Scores that want the word of a call, and then its first token for ever."""
    tokenizer, turn = tiny_vlm().tokenizer, replace(TURNS[0], crop_grammar=PAPER_GRID)
    word = tokenizer("GET_CROPS", add_special_tokens=False)["input_ids"]
    reply = ReplyDecoder(Request(Session(), turn, 64), tokenizer, {0}, CallGrammar(PAPER_GRID, tokenizer))
    ids = torch.ones((1, 4), dtype=torch.long)
    chooser = _Choices([reply], ids.bool(), torch.ones(1), 1, torch.float32, lambda: 0.0)
    while not _Done([reply])(ids, None).all():
        scores = torch.zeros((1, len(tokenizer)))
        scores[0, (word + word[:1] * 64)[ids.shape[1] - 4]] = 1.0
        ids = torch.cat([ids, chooser(ids, scores).argmax(-1)[:, None]], 1)
    assert PAPER_GRID.parse(tokenizer.decode(reply.tokens)).names and reply.ended
    assert ids[0, 4:].tolist() == reply.tokens and [e.kind for e in reply.events] == ["call_overruled"]


# ------------------------------------------------------------------ families without a host


@pytest.fixture(params=TINY)
def other(request) -> GenericModel:
    return GenericModel(TINY[request.param](), constrained=False)


def test_a_first_turn_is_what_transformers_makes_of_the_messages(other):
    """The documented way: ``apply_chat_template`` makes the inputs, ``generate`` the reply."""
    host, turn = other.host, replace(TURNS[0], system="Be brief.")
    messages = chat_messages([turn], [])
    messages[0]["content"] = [{"type": "text", "text": messages[0]["content"]}]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = host.processor.apply_chat_template(messages, **how)
    out = host.model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, use_cache=True
    )
    scores, (reply,) = scored(other, [Request(Session(), turn, 4)])
    theirs = torch.stack(out.logits)
    assert len(theirs) == len(scores) and (theirs - scores).abs().max() < TOLERANCE
    ids = inputs["input_ids"][0].tolist()
    assert reply.usage.encoded == ids.count(host.image_token) == other.visual_tokens(turn.images[0])
    assert reply.usage.text == len(ids) - reply.usage.encoded


def test_a_mixed_batch_is_each_row_alone(other):
    together, _ = scored(other, [Request(Session(), turn, 3) for turn in TURNS])
    for b, turn in enumerate(TURNS):
        alone, _ = scored(other, [Request(Session(), turn, 3)])
        assert (together[: len(alone), b] - alone[:, 0]).abs().max() < TOLERANCE


@dataclass(frozen=True)
class Said(Policy):
    """A policy whose turns leave no more to a reply than the task does, and whose model says a text to its first: random weights never call."""

    policy: Policy
    text: str | None = None

    def turns(self, sample):
        turns = self.policy.turns(sample)
        reply, first = None, True
        while True:
            try:
                step = turns.send(reply)
            except StopIteration as stop:
                return stop.value
            if isinstance(step, Turn):
                step = replace(step, min_reply_tokens=None, forced_reply=self.text if first else step.forced_reply)
                first = False
            reply = yield step


SAID = {"awares": CALL, "random_crop": CALL, "blank_crop": CALL, "swapped_crop": CALL}


def policies(gate: str) -> dict[str, Policy]:
    """Every policy of the package that needs no other model."""
    out = {}
    for name in registry.own_names():
        method = registry.build(name, {"gate": gate} if name == "cares" else {}, ())
        if method.pruner is None:
            out[name] = method.policy
    return out


def test_every_policy_and_control_runs(other, tmp_path):
    width = other.host.model.config.get_text_config().hidden_size
    rng = np.random.default_rng(0)
    gate = Gate(rng.normal(size=(3, width)).astype(np.float32), np.zeros(3, np.float32), (56, 112, 224), 112, 0.5)
    gate.save(tmp_path / "gate.safetensors")
    marks = {"evidence": ((0, 0, 60, 60),), "low_is_enough": False, "other_pictures": lambda: [(picture(140, 168, 1),)]}
    sample = Sample((picture(168, 140),), "Which?", "k", **marks)
    for name, policy in policies(str(tmp_path / "gate.safetensors")).items():
        ((_, outcome),) = Engine(other, Said(policy, SAID.get(name)), 1).run([Job(sample, 2)])
        assert not isinstance(outcome, Failure), (name, outcome)
        assert (outcome.rtr > 0) == (name != "no_picture") and outcome.usage.output > 0, name
        if name in SAID:
            assert len(outcome.turns) == 2 and [e.kind for e in outcome.events].count("prefix_recomputed") == 1, name


# ------------------------------------------------------------------ what is refused, what fails


def test_pruners_and_rollouts_are_refused_in_a_sentence():
    vlm = GenericModel(TINY["gemma3"]())
    with pytest.raises(ValueError, match=r"VisionZip cuts tokens inside the model, and .*gemma3.* is answered by engine=generic"):
        Engine(vlm, Full(), pruner=VisionZip(0.5))
    with pytest.raises(RunError, match="rollouts share prefixes on kept caches"):
        vlm.reply([Request(Session(), TURNS[0], 1)], None, Sampling(), ["a"])


def altered(template: str | None = None, **config) -> GenericHost:
    """LLaVA-OneVision with another template, or with a config that lacks something."""
    host = TINY["llava_onevision"]()
    processor, model = copy.copy(host.processor), copy.copy(host.model)
    model.config = copy.deepcopy(host.model.config)
    for name, value in config.items():
        setattr(model.config, name, value)
    processor.chat_template = processor.chat_template if template is None else template
    return GenericHost(model, processor)


BARE = "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}\n{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: altered("{{ messages[0]['content'][0]['type'] }}"), "has a chat template that shows no question, or no reply"),
        (lambda: altered("{{ raise_exception('no') }}"), r"has a chat template that cannot render a conversation \(no\)"),
        (lambda: altered(BARE.replace("<image>", "")), "has a processor that cannot take a conversation with a picture"),
        (lambda: altered(BARE + "<think>\n"), "always thinks: its chat template opens <think>"),
        (lambda: altered(is_encoder_decoder=True), "is an encoder-decoder"),
    ],
)
def test_a_checkpoint_that_cannot_be_asked_is_refused_in_a_sentence(made, said):
    with pytest.raises(CheckpointError, match=said):
        made()


def test_a_system_message_that_a_template_cannot_show_ends_the_run():
    alone = BARE.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    )
    vlm = GenericModel(altered(alone))
    assert vlm.reply([Request(Session(), TURNS[0], 1)])[0].usage.encoded
    with pytest.raises(RunError, match=r"begins with a system message, which the chat template .* does not show"):
        list(Engine(vlm, AwaRes()).run([Job(Sample((picture(56, 56),), "?", "k"), 2)]))


def test_a_decoder_without_layers_is_refused_to_gates(monkeypatch):
    vlm = GenericModel(TINY["llava_onevision"]())
    monkeypatch.setattr(vlm.host.model, "get_decoder", lambda: torch.nn.Linear(1, 1))
    with pytest.raises(RunError, match=r"reads a hidden state of the decoder, and that of .* has no layers and norm"):
        vlm.hidden_states([Request(Session(), replace(TURNS[0], hidden_state_depth=0.5), 1)])


def test_image_marks_and_conversations_that_are_too_long_fail_their_document(monkeypatch):
    vlm = GenericModel(TINY["gemma3"]())
    for mark in ("<start_of_image>", "<image_soft_token>"):
        with pytest.raises(ValueError, match=f"holds the text '{mark}', which stands for an image"):
            vlm.check(f"what is {mark}?")
    monkeypatch.setattr(GenericHost, "context", 20)
    ((_, outcome),) = Engine(vlm, Full()).run([Job(Sample((picture(56, 56),), "?", "k"), 2)])
    assert outcome.error.startswith("the conversation takes ")


def test_an_odd_picture_is_padded_and_that_is_said():
    vlm = generic(tiny_vlm().host)
    session = Session()
    (reply,) = vlm.reply([Request(session, Turn((picture(5, 2000),), "?"), 1)])
    assert [e.kind for e in session.events] == ["image_padded"] and reply.usage.encoded == tiny_vlm().visual_tokens(
        picture(5, 2000)
    )


def test_without_memory_the_batch_goes_on_in_halves_and_sessions_are_as_they_were(monkeypatch):
    vlm = generic(tiny_vlm().host, constrained=False)
    generate = vlm.host.model.generate

    def short(**inputs):
        if len(inputs["input_ids"]) > 1:
            raise torch.cuda.OutOfMemoryError("no room")
        return generate(**inputs)

    monkeypatch.setattr(vlm.host.model, "generate", short)
    outcomes = dict(Engine(vlm, Full(), 2).run([Job(Sample((picture(56, 56, i),), "?", str(i)), 2) for i in range(2)]))
    assert [e.kind for e in outcomes[0].events] == ["out_of_memory"] and len(outcomes[1].replies) == 1


def test_scores_that_are_not_finite_fail_their_document(monkeypatch):
    vlm = generic(tiny_vlm().host, constrained=False)
    hook = vlm.host.model.get_output_embeddings().register_forward_hook(lambda m, x, out: out * float("nan"))
    try:
        (reply,) = vlm.reply([Request(Session(), TURNS[0], 3)])
    finally:
        hook.remove()
    assert reply == Failure("the model's scores are nan in float32 after 0 tokens of its reply: the weights may be broken")


# ------------------------------------------------------------------ checkpoints, options, runs


@pytest.fixture(scope="module")
def unknown(tmp_path_factory) -> Path:
    """A checkpoint folder of a family that has no host here."""
    folder, host = tmp_path_factory.mktemp("weights") / "onevision", TINY["llava_onevision"]()
    host.model.save_pretrained(folder)
    host.processor.save_pretrained(folder)
    return folder


def test_an_unknown_family_is_answered_and_that_is_printed(unknown, capsys):
    model = awares_bench.load(str(unknown))
    printed = capsys.readouterr().err
    assert printed.count("llava_onevision, a family without a host of its own here: engine=generic answers") == 1
    assert model.ask(picture(112, 84), "which?", "full", max_new_tokens=2).rtr == 1
    with pytest.raises(ValueError, match="cuts tokens inside the model"):
        model.ask(picture(112, 84), "which?", "visionzip", retention=0.5)
    asked = awares_bench.load(str(unknown), engine="generic")
    assert "a family without" not in capsys.readouterr().err and isinstance(asked.vlm, GenericModel)


def test_a_run_says_which_engine_answered(unknown, tmp_path):
    from awares_bench.evaluation import lmms_model

    made = lmms_model.full(pretrained=str(unknown), output_dir=str(tmp_path / "a"))
    told = json.loads((tmp_path / "a" / "run.json").read_text())
    assert told["label"] == "full engine=generic" and made.label == told["label"]
    identity = told["identity"]
    assert (identity["engine"], identity["limits"], identity["min_pixels"], identity["dtype"]) == (
        "generic",
        "hf",
        None,
        "float32",
    )
    made.run.close()
    named = lmms_model.full(pretrained=str(unknown), output_dir=str(tmp_path / "b"), label="mine")
    assert named.label == "mine engine=generic"  # nobody asked for it
    named.run.close()
    with pytest.raises(ValueError, match="reuse_features keeps features outside of the model"):
        lmms_model.full(pretrained=str(unknown), output_dir=str(tmp_path / "c"), reuse_features=1)
    with pytest.raises(
        ValueError, match="min_pixels is given, and the picture processor of this llava_onevision checkpoint has no limits"
    ):
        lmms_model.full(pretrained=str(unknown), output_dir=str(tmp_path / "d"), min_pixels=3136)


def test_what_transformers_does_not_load_and_what_lacks_a_template_are_refused(unknown, tmp_path):
    for kind, said in [("llama", "does not do with it"), ("newest_vl", "does not do with it")]:
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(CheckpointError, match=rf"is a {kind} checkpoint; known families: .*{said}"):
            awares_bench.load(str(folder), engine="generic")
    with pytest.raises(CheckpointError, match="engine=generic answers with it, without training it"):
        LocalModel.load(str(unknown))
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in unknown.iterdir():
        if path.name != "chat_template.jinja":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="has a tokenizer and no chat template"):
        awares_bench.load(str(bare))


def test_engines_that_python_does_not_have_are_refused():
    with pytest.raises(ValueError, match="engine is 'openai'; allowed here: transformers, generic"):
        awares_bench.load(engine="openai")
