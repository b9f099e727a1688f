"""Calls by grammar: every canonical call and nothing else, the model's own choices, fewer passes, the same scores."""

import random
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from awares_bench.training import nano
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from awares_bench.awares import AwaRes
from awares_bench.crops import PAPER_GRID, CropRequestError
from awares_bench.engine import Engine, Job
from awares_bench.grammar import CallGrammar
from awares_bench.session import Request, Session
from awares_bench.trajectory import Sample, Turn
from awares_bench.vlm import VLM
from awares_bench.weights import resolve
from awares_bench.writer import Writer

from .test_vlm import TOLERANCE, TURNS, ours
from .tiny import picture, tiny_vlm

TURN = Turn((picture(112, 112),), "Which way?", system=PAPER_GRID.prompt, last=False, calls=PAPER_GRID)


def byte_level(text: str, merges: int):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merges < 100)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text] * 40, trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


TOKENIZERS = {
    "nano": nano.nano_tokenizer,
    "bytes": lambda: byte_level("", 0),
    "across-ids": lambda: byte_level("GET_CROPS: ['0', '1'] GET_CROPS: ['7', '8'] GET_CROPS: ['all'] ']\n", 130),
}


def spellings(names):
    ids = [i for n in names for i, known in PAPER_GRID.ids.items() if known == n]
    for colon, quote, comma in product((": ", ":", " "), "'\"-", (", ", ",")):
        yield f"GET_CROPS{colon}[{comma.join(f'{q}{i}{q}' for i in ids for q in [quote.strip('-')])}]"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_canonical_call_is_allowed_to_its_end_and_no_further(kind):
    tokenizer = TOKENIZERS[kind]()
    grammar, rng = CallGrammar(PAPER_GRID, tokenizer), random.Random(0)
    chosen = [("all",), PAPER_GRID.names] + [tuple(rng.sample(PAPER_GRID.names, n)) for n in (1, 1, 2, 2, 3, 5)]
    for names in chosen:
        assert next(spellings(names)) == PAPER_GRID.format(names)
        for text in spellings(names):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for n in range(len(ids)):
                allowed = grammar.allowed(ids[:n])
                assert (allowed is None) is not tokenizer.decode(ids[:n]).startswith("GET_CROPS")
                assert allowed is None or ids[n] in allowed, (text, tokenizer.convert_ids_to_tokens(ids[: n + 1]))
            assert grammar.allowed(ids) == set()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whatever_is_chosen_among_the_allowed_tokens_is_a_call_that_parses(kind):
    tokenizer = TOKENIZERS[kind]()
    grammar, rng, seen = CallGrammar(PAPER_GRID, tokenizer), random.Random(1), set()
    for _ in range(40):
        ids = tokenizer("GET_CROPS: [", add_special_tokens=False)["input_ids"]
        ids = ids[: next(n for n in range(len(ids) + 1) if tokenizer.decode(ids[:n]).startswith("GET_CROPS"))]
        while allowed := grammar.allowed(ids):
            ids.append(rng.choice(sorted(allowed)))
        request = PAPER_GRID.parse(tokenizer.decode(ids))
        assert request and len(set(request.names)) == len(request.names)
        seen.add(len(request.names))
    assert len(seen) > 2


def test_a_draft_stops_before_the_choice_of_a_crop():
    tokenizer = nano.nano_tokenizer()
    grammar, ids = CallGrammar(PAPER_GRID, tokenizer), tokenizer("GET_CROPS: ['3', '5']")["input_ids"]
    said = [tokenizer.decode(grammar.draft(ids[:n])) for n in range(1, len(ids))]
    assert said == ["_CROPS: ['", ": ['", " ['", "", "', '", " '", "", "', '"]
    assert grammar.draft(tokenizer("Seven")["input_ids"]) == []


def writer(grammar, **more):
    tokenizer = grammar.tokenizer
    return Writer(Request(Session(), TURN, 32, **more), tokenizer, {tokenizer.eos_token_id}, grammar)


def test_an_answer_that_shares_its_first_token_with_a_call_stays_free():
    tokenizer = nano.nano_tokenizer()
    get, other = tokenizer("GET_CROPS")["input_ids"][0], tokenizer("7")["input_ids"][0]
    one = writer(CallGrammar(PAPER_GRID, tokenizer))
    scores = torch.zeros(4, len(tokenizer))
    assert one.take([0], [get], scores) == 1
    fed = one.feed()
    assert len(fed) == 4
    assert one.take(fed, [other] * 4, scores) == 1  # the draft does not hold
    assert one.written == [get, other] and one.feed() == [other] and one.live


def test_a_stop_string_inside_a_draft_ends_the_reply_there():
    tokenizer = nano.nano_tokenizer()
    ids = tokenizer("GET_CROPS: ['")["input_ids"]
    one = writer(CallGrammar(PAPER_GRID, tokenizer), until=(":",))
    one.take([0], ids[:1], torch.zeros(1, len(tokenizer)))
    fed = one.feed()
    assert fed == ids
    assert one.take(fed, [*ids[1:], 0], torch.zeros(4, len(tokenizer))) == 2
    assert one.written == ids[:3] and one.ended


@contextmanager
def inclined_to_call(vlm, strength=12.0):
    """The tiny random model, its scores raised for what usually follows the token before: calls, most of them canonical."""
    tokens = vlm.tokenizer
    table = torch.zeros(vlm.model.lm_head.out_features, vlm.model.lm_head.out_features)
    get, crops, colon, opened, _, comma, quote, _, closed = tokens("GET_CROPS: ['0', '1']")["input_ids"]
    digits = [tokens(f"GET_CROPS: ['{d}']")["input_ids"][4] for d in range(9)]
    after_prompt = vlm.chunk(Session(), TURN, [(1, 8, 8)])[-1]
    for before, after in ((after_prompt, [get]), (get, [crops]), (crops, [colon]), (colon, [opened]), (quote, digits)):
        table[before, after] = strength
    table[comma, quote] = table[opened, digits] = table[closed, tokens.eos_token_id] = strength
    for digit in digits:
        table[digit, [comma, closed]] = strength
    fed = []  # since the last scores: every row's prompt, or at once the tokens that all rows wrote last

    def raised(module, args, out):
        written = len(fed) == 1 and fed[0].numel() == out[..., 0].numel()
        before = fed[0] if written else torch.stack([prompt[-1] for prompt in fed])
        fed.clear()
        return out + table[before].view(out.shape)

    hooks = [
        vlm.decoder.get_input_embeddings().register_forward_hook(lambda module, args, out: fed.append(args[0])),
        vlm.model.lm_head.register_forward_hook(raised),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@lru_cache(maxsize=1)
def pairs():
    """(plain, constrained) replies of 24 conversations, one by one, each with its scores and its session."""
    vlm, out = tiny_vlm(), []
    with inclined_to_call(vlm):
        for i in range(24):
            turn = Turn(
                (picture(84 + 28 * (i % 4), 112, i),), f"Which way, {i}?", system=PAPER_GRID.prompt, last=False, calls=PAPER_GRID
            )
            both = []
            for constrained in (False, True):
                vlm.constrained, session = constrained, Session()
                (reply,), scores = ours(vlm, [Request(session, turn, 32)])
                both.append((reply, scores[:, 0], session))
            out.append(both)
    return out


def canonical(reply):
    try:
        request = PAPER_GRID.parse(reply.text)
    except CropRequestError:
        return False
    return bool(request) and reply.complete and PAPER_GRID.format(request.names) == reply.text


def test_constrained_is_plain_greedy_wherever_that_is_canonical_and_a_call_otherwise():
    same = [canonical(plain[0]) for plain, _ in pairs()]
    assert 6 <= sum(same) < 24, sum(same)  # both kinds are in the sample
    for (plain, scores, _), (held, held_scores, _) in pairs():
        assert canonical(held)
        if canonical(plain):
            assert held.tokens == plain.tokens and held.complete
            n = len(held.tokens)
            assert (held_scores[:n] - scores[:n]).abs().max() < TOLERANCE


def test_a_call_takes_at_most_half_the_passes():
    passes = [(held.usage.passes, plain.usage.passes) for (plain, *_), (held, *_) in pairs() if canonical(plain)]
    assert all(2 * held <= plain for held, plain in passes), passes
    assert min(passes) == (2, 6)  # GET_CROPS: ['3'] is six tokens: up to the id, then the id
    assert all(plain.usage.passes == len(plain.tokens) for (plain, *_), _ in pairs() if plain.complete)


def test_the_second_turn_continues_a_constrained_call_as_it_does_a_plain_one():
    vlm = tiny_vlm()
    for (plain, _, before), (_, _, session) in [p for p in pairs() if canonical(p[0][0])][:4]:
        turn = Turn((picture(112, 56),))
        (_, kept), (_, wanted) = ours(vlm, [Request(session, turn, 4)]), ours(vlm, [Request(before, turn, 4)])
        assert (kept - wanted).abs().max() < TOLERANCE, plain.text


@pytest.mark.usefixtures("layout")
def test_in_a_batch_calls_and_answers_have_the_scores_of_each_alone():
    vlm = tiny_vlm()
    turns = [
        Turn((picture(112, 84, i),), f"Which {i}?", system=PAPER_GRID.prompt, last=False, calls=PAPER_GRID) for i in range(3)
    ]
    turns = [turns[0], TURNS[1], turns[1], TURNS[3], turns[2]]
    budgets, second = [32, 3, 32, 9, 4], Turn((picture(84, 84),))

    def run(groups):
        out = {}
        for group in groups:
            sessions = [Session() for _ in group]
            requests = [Request(s, turns[i], budgets[i]) for s, i in zip(sessions, group, strict=True)]
            replies, scores = ours(vlm, requests)
            for b, i in enumerate(group):
                out[i] = [(replies[b], scores[: len(replies[b].tokens), b])]
            more = [b for b, i in enumerate(group) if not turns[i].last]
            if more:
                replies, scores = ours(vlm, [Request(sessions[b], second, 4) for b in more])
                for row, b in enumerate(more):
                    out[group[b]].append((replies[row], scores[: len(replies[row].tokens), row]))
        return out

    with inclined_to_call(vlm, 30.0):
        together, alone = run([range(5)]), run([[i] for i in range(5)])
    assert sum("GET_CROPS" in together[i][0][0].text for i in together) >= 2
    for i in range(5):
        for (a, x), (b, y) in zip(together[i], alone[i], strict=True):
            assert a.tokens == b.tokens and (x.numel() == 0 or (x - y).abs().max() < TOLERANCE)


def test_nano_weights_call_the_same_crops_in_at_most_half_the_passes():
    world = import_module("awares_bench.tasks.nano_world")
    suite = Path(world.__file__).parent
    frame = pd.read_parquet(suite / "nano_doc.parquet")[:24]
    jobs = [
        Job(Sample((Image.open(BytesIO(row.image["bytes"])),), world.prompt("doc", row.question, ()), str(i)), 16)
        for i, row in enumerate(frame.itertuples())
    ]
    vlm, runs = VLM.load(resolve("nano")), []
    for constrained in (False, True):
        vlm.constrained = constrained
        runs.append(dict(Engine(vlm, AwaRes(), 8).run(jobs)))
    plain, held = runs
    calls = 0
    for i in plain:
        assert [e.kind for e in held[i].events] == [e.kind for e in plain[i].events]
        assert held[i].answer == plain[i].answer and held[i].crops == plain[i].crops
        if plain[i].crops:
            calls += 1
            assert 2 * held[i].replies[0].usage.passes <= plain[i].replies[0].usage.passes
    assert calls > 3
