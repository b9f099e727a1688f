"""Calls by grammar: every call that parses and nothing else, the model's own choices, fewer passes, the same scores."""

import random
import tracemalloc
from contextlib import contextmanager
from functools import cache, lru_cache
from io import BytesIO
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from awares_bench.awares import AwaRes
from awares_bench.inference.call_grammar import KEPT, LONGEST_SPACE, PARTS, CallGrammar
from awares_bench.inference.engine import Engine, Job
from awares_bench.inference.local_model import LocalModel
from awares_bench.inference.reply_decoder import ReplyDecoder
from awares_bench.inference.session import Request, Session
from awares_bench.methods.conversation import Sample, Turn
from awares_bench.methods.crop_grid import PAPER_GRID, CropGrid, CropRequestError
from awares_bench.models.families import host_of
from awares_bench.models.packaged import resolve
from awares_bench.training.nano import model as nano

from ..helpers.qwen_tokenizer import qwen_tokenizer
from ..helpers.tiny import GEOMETRY, chunk_ids, picture, tiny_tokenizer, tiny_vlm
from .test_vlm import TOLERANCE, TURNS, ours

TURN = Turn((picture(112, 112),), "Which way?", system=PAPER_GRID.prompt, is_final=False, crop_grammar=PAPER_GRID)


def byte_level(text: str, merges: int):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merges < 100)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text] * 40, trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


TOKENIZERS = {
    "nano": tiny_tokenizer,
    "qwen": qwen_tokenizer,
    "bytes": lambda: byte_level("", 0),
    "across-ids": lambda: byte_level("GET_CROPS: ['0', '1'] GET_CROPS: ['7', '8'] GET_CROPS: ['all'] ']\n", 130),
}
KINDS = ["nano", "qwen", "across-ids", pytest.param("bytes", marks=pytest.mark.slow)]  # bytes alone: every letter a token


@cache
def grammar_of(kind):
    return CallGrammar(PAPER_GRID, TOKENIZERS[kind]())


def spellings(names):
    ids = [i for n in names for i, known in PAPER_GRID.ids.items() if known == n]
    for colon, quote, comma in product((": ", ":", " "), "'\"-", (", ", ",")):
        yield f"GET_CROPS{colon}[{comma.join(f'{q}{i}{q}' for i in ids for q in [quote.strip('-')])}]"


@pytest.mark.parametrize("kind", ["nano", "across-ids", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen", "bytes"))])
def test_every_canonical_call_is_allowed_to_its_end_and_no_further(kind):
    grammar, rng = grammar_of(kind), random.Random(0)
    tokenizer = grammar.tokenizer
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


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_chosen_among_the_allowed_tokens_is_a_call_that_parses(kind):
    grammar, rng, seen = grammar_of(kind), random.Random(1), set()
    tokenizer = grammar.tokenizer
    for _ in range(40):
        ids = tokenizer("GET_CROPS: [", add_special_tokens=False)["input_ids"]
        ids = ids[: next(n for n in range(len(ids) + 1) if tokenizer.decode(ids[:n]).startswith("GET_CROPS"))]
        while allowed := grammar.allowed(ids):
            commas = [token for token in sorted(allowed) if "," in tokenizer.decode([token])]
            ids.append(rng.choice((rng.random() < 0.5 and commas) or sorted(allowed)))
        request = PAPER_GRID.parse(tokenizer.decode(ids))
        assert request and len(set(request.names)) == len(request.names)
        seen.add(len(request.names))
    assert len(seen) > 2


def test_a_draft_stops_before_the_choice_of_a_crop():
    tokenizer = tiny_tokenizer()
    grammar, ids = CallGrammar(PAPER_GRID, tokenizer), tokenizer("GET_CROPS: ['3', '5']")["input_ids"]
    said = [tokenizer.decode(grammar.draft(ids[:n])) for n in range(1, len(ids))]
    assert said == ["_CROPS: ['", ": ['", " ['", "", "', '", " '", "", "', '"]
    assert grammar.draft(tokenizer("Seven")["input_ids"]) == []


def writer(grammar, budget=32, **more):
    tokenizer = grammar.tokenizer
    return ReplyDecoder(Request(Session(), TURN, budget, **more), tokenizer, {tokenizer.eos_token_id}, grammar)


def replied(kind, text, budget=400):
    """The writer that is offered ``text``, one token after another, until it ends; then the end of the turn."""
    grammar = grammar_of(kind)
    one, scores = writer(grammar, budget), torch.zeros(1, len(grammar.tokenizer))
    for token in [*grammar.tokenizer(text, add_special_tokens=False)["input_ids"], grammar.tokenizer.eos_token_id]:
        if one.active:
            scores.zero_()[0, token] = 1.0
            one.accept([0], [token], [0.0], scores)
    return one, grammar.tokenizer.decode(one.tokens)


SPELLED = {
    "GET_CROPS: ['3']": ("bottom-right",),
    "GET_CROPS:['3']": ("bottom-right",),
    "GET_CROPS ['3']": ("bottom-right",),
    "GET_CROPS['3']": ("bottom-right",),
    "GET_CROPS[3]": ("bottom-right",),
    "GET_CROPS :[3]": ("bottom-right",),
    'GET_CROPS: ["3"]': ("bottom-right",),
    "GET_CROPS: ['3']\n": ("bottom-right",),
    "GET_CROPS: ['3'],": ("bottom-right",),
    "GET_CROPS: ['3'].": ("bottom-right",),
    "GET_CROPS: ['3']\n\n": ("bottom-right",),
    'GET_CROPS: ["3"]\n': ("bottom-right",),
    'GET_CROPS: ["3"].': ("bottom-right",),
    "GET_CROPS: [3].": ("bottom-right",),
    "GET_CROPS: [ 3 ]": ("bottom-right",),
    "GET_CROPS:\n['3']": ("bottom-right",),
    "GET_CROPS: [\n  '3',\n  '5'\n]": ("bottom-right", "top"),
    "GET_CROPS: ['0', '5']": ("top-left", "top"),
    "GET_CROPS: ['0' , '5' ]": ("top-left", "top"),
    "GET_CROPS: [0,5]": ("top-left", "top"),
    "GET_CROPS: ['0', \"5\", 7]": ("top-left", "top", "left"),
    "GET_CROPS: ['top-left']": ("top-left",),
    "GET_CROPS: ['top', 'top-left']": ("top", "top-left"),
    "GET_CROPS: ['Top Left', 'BOTTOM']": ("top-left", "bottom"),
    'GET_CROPS: ["bottom_right"]': ("bottom-right",),
    "GET_CROPS[center]": ("center",),
    "GET_CROPS: ['Centre', 3]\n": ("center", "bottom-right"),
    "GET_CROPS: ['all']": ("all",),
    "GET_CROPS: [ALL].": ("all",),
    "GET_CROPS: ['3', 'all']": ("all",),
    "get_crops: ['3']": ("bottom-right",),
    "Get_Crops [left]": ("left",),
    "  GET_CROPS: ['3']": ("bottom-right",),
    "\nGET_CROPS: ['right']": ("right",),
}
"""What a model may write and the parser reads -> the crops that it asks for."""


@lru_cache(maxsize=2)
def random_vlm(kind):
    if kind == "nano":
        return tiny_vlm()
    tokenizer = qwen_tokenizer()
    return LocalModel(host_of(nano.build(tokenizer, GEOMETRY).float().eval(), nano.processor(tokenizer)))


@contextmanager
def saying(vlm, ids):
    """The model, its scores such that greedy decoding of one conversation writes ``ids``, drafts or none."""
    at, fed = [-1], []  # the last token of ``ids`` that stands; what went in since the last scores

    def scripted(module, args, out):
        tokens = fed.pop() if at[0] >= 0 else [0]  # a prompt counts as one
        out = torch.zeros_like(out)
        for j in range(len(tokens)):
            if at[0] + j + 1 < len(ids):
                out[..., j - len(tokens), ids[at[0] + j + 1]] = 1.0
        at[0] += next((j for j in range(1, len(tokens)) if tokens[j] != ids[at[0] + j]), len(tokens))
        fed.clear()
        return out

    hooks = [
        vlm.host.decoder.get_input_embeddings().register_forward_hook(
            lambda module, args, out: fed.append(args[0].flatten().tolist())
        ),
        vlm.host.model.lm_head.register_forward_hook(scripted),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", ["nano", "qwen"])
def test_every_spelling_that_parses_comes_out_of_the_model_as_it_is_and_asks_for_the_same_crops(kind):
    vlm = random_vlm(kind)
    for text, names in SPELLED.items():
        assert PAPER_GRID.parse(text).names == names
        ids, session = vlm.tokenizer(text, add_special_tokens=False)["input_ids"], Session()
        with saying(vlm, ids):
            (reply,) = vlm.reply([Request(session, TURN, 64)])
        assert reply.complete and list(reply.tokens) == ids[: len(reply.tokens)], (text, reply.text)
        assert "]" in reply.text and PAPER_GRID.parse(reply.text).names == names
        assert not session.events, (text, session.events)


@pytest.mark.parametrize("kind", ["nano", "qwen"])
def test_a_call_as_the_prompt_shows_it_takes_two_passes_and_others_no_more_than_their_tokens(kind):
    vlm = random_vlm(kind)
    for text in SPELLED:
        ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
        with saying(vlm, ids):
            (reply,) = vlm.reply([Request(Session(), TURN, 64)])
        assert reply.usage.passes < len(ids)
        if text in ("GET_CROPS: ['3']", "GET_CROPS: ['all']", "GET_CROPS: ['3'].", "GET_CROPS: ['3']\n"):
            assert reply.usage.passes == 2, (text, reply.usage.passes)
        if text == "GET_CROPS: ['0', '5']":
            assert reply.usage.passes == 3


def test_white_space_beyond_ascii_is_written_where_it_is_a_token_and_overruled_where_it_is_bytes():
    text = "GET_CROPS:\t[\u00a0'3'\u3000]"
    one, said = replied("qwen", text)
    assert said == text and not one.events
    one, said = replied("nano", text)
    assert said != text and one.events


def one_of_the_language(rng):
    """A random call that parses and names no crop twice, and what may follow it."""
    space = lambda: rng.choice(["", "", "", " ", "  ", "\n", "\t ", "\n    "])  # noqa: E731
    entries = []
    for name in rng.sample([*PAPER_GRID.names, "all"], rng.randint(1, 10)):
        word = rng.choice([*(i for i, n in PAPER_GRID.ids.items() if n == name), name, name.replace("center", "centre")])
        word = rng.choice([word, word.upper(), word.title()]).replace("-", rng.choice(["-", "_", " ", "_ "]))
        quote = rng.choice(["'", '"', ""])
        entries.append(f"{space()}{quote}{rng.choice(['', '', ' '])}{word}{space()}{quote}{space()}")
    word, end = (
        rng.choice(["GET_CROPS", "GET_CROPS", "get_crops"]),
        rng.choice(["", "\n", ".", ",", "\n\n", " because", "]", "!"]),
    )
    return f"{space()}{word}{space()}{rng.choice(['', ':'])}{space()}[{','.join(entries)}]", end


@pytest.mark.parametrize("kind", KINDS)
def test_no_call_of_the_language_is_changed(kind):
    rng = random.Random(3)
    for _ in range(25):
        text, end = one_of_the_language(rng)
        one, said = replied(kind, text + end)
        assert said.startswith(text) and (text + end).startswith(said) and not one.overruled, (text, said, one.overruled)
        assert PAPER_GRID.parse(said) == PAPER_GRID.parse(text) and one.ended


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "GET_CROPS: ['9']",
        "GET_CROPS: ['3', '3']",
        "GET_CROPS: ['3', 'bottom-right']",
        "GET_CROPS: ['top', 'top']",
        "GET_CROPS: [top, top]",
        "GET_CROPS: [top,top,left]",
        "GET_CROPS: ['middle']",
        "GET_CROPS: ['top--left']",
        "GET_CROPS: ['3\"]",
        "GET_CROPS: []",
        "GET_CROPS: ['3',]",
        "GET_CROPS: [['3']]",
        "GET_CROPS: 3",
        "GET_CROPS:: ['3']",
        "GET_CROPS is the name of a function",
        "GET_CROPS: ['3'",
        "GET_CROPS",
        "get_crops: ['9']",
        "GET_CROPS: [" + " \t" * LONGEST_SPACE + "3]",
        "GET_CROPS: ['top" + "_ " * LONGEST_SPACE + "left']",
        "GET_CROPS: [0, 1, 2, 3, 4, 5, 6, 7, 8, all, all]",
    ],
)
def test_what_is_no_call_is_held_to_one_and_said_to_be(kind, text):
    one, _ = replied(kind, text)
    for _ in range(400):
        if one.active:  # as the end of the turn is asked for again and again
            one.accept([0], [one.tokenizer.eos_token_id], [0.0], torch.zeros(1, len(one.tokenizer)))
    assert PAPER_GRID.parse(one.tokenizer.decode(one.tokens)) and one.ended
    (event,) = one.events
    assert event.kind == "call_overruled" and len(one.overruled) == event.detail.count(" became ")


def test_the_event_says_what_the_model_would_have_written_and_stands_in_the_session():
    vlm = tiny_vlm()
    wanted, held = vlm.tokenizer("GET_CROPS: ['3', '3']")["input_ids"], []
    for vlm.constrained in (False, True):
        session = Session()
        with saying(vlm, wanted):
            vlm.reply([Request(session, TURN, 32)])
        held.append(session.events)
    free, (event,) = held
    assert not free and event.kind == "call_overruled"
    assert "'3' after \"GET_CROPS: ['3', '\" became '" in event.detail


@pytest.mark.usefixtures("layout")
def test_a_draft_that_did_not_hold_leaves_nothing_in_the_cache():
    vlm, scores = tiny_vlm(), []
    for text in ("GET_CROPS: ['3']", "GET_CROPS[3 , 5]", 'GET_CROPS: ["top"]'):
        ids = vlm.tokenizer(text)["input_ids"]
        for vlm.constrained in (False, True):
            session = Session()
            with saying(vlm, [*ids, vlm.tokenizer.eos_token_id]):
                (reply,) = vlm.reply([Request(session, TURN, 32)])
            assert list(reply.tokens) == ids
            scores.append(ours(vlm, [Request(session, Turn((picture(112, 56),)), 4)])[1])
        free, held = scores[-2:]
        assert (held - free).abs().max() < TOLERANCE, text


def test_answers_are_free_and_never_overruled():
    for text in ("Seven", "GET", "The text is small. GET_CROPS: ['9']", "G E T", "\n42", "get out"):
        one, said = replied("nano", text)
        assert said == text and one.ended and not one.events


def test_a_grid_of_other_names_has_calls_of_its_own():
    box = (0, 0, 4, 4)
    names = ("a", "b", "c", "d", "e", "f", "g", "h", "not!writable", "Upper", "ten", "ten-and-one", "centre-left")
    grid, rng = CropGrid(tuple((name, box) for name in names)), random.Random(5)
    tokenizer = qwen_tokenizer()
    grammar = CallGrammar(grid, tokenizer)
    for text in ("GET_CROPS: ['1', '10', '11']", "GET_CROPS: [ten, ten and one]", "GET_CROPS: [8, 9]"):
        ids = tokenizer(text)["input_ids"]
        assert all(grammar.allowed(ids[:n]) is None or ids[n] in grammar.allowed(ids[:n]) for n in range(len(ids)))
        assert grammar.allowed(ids) == set()
    for _ in range(20):
        ids = tokenizer("GET_CROPS: [")["input_ids"]
        while allowed := grammar.allowed(ids):
            ids.append(rng.choice(sorted(allowed)))
        assert grid.parse(tokenizer.decode(ids)), tokenizer.decode(ids)


def test_calls_that_were_never_seen_before_take_no_more_memory():
    grammar, rng, kept = CallGrammar(PAPER_GRID, tiny_tokenizer()), random.Random(2), []
    tracemalloc.start()
    for _ in range(2):
        for _ in range(30):
            text = PAPER_GRID.format(rng.sample(PAPER_GRID.names, rng.randint(2, 5)))
            ids = grammar.tokenizer(text)["input_ids"]
            for n in range(1, len(ids)):
                grammar.draft(ids[:n]), grammar.allowed(ids[:n])
        kept.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert kept[0] < 10e6 and kept[1] - kept[0] < 1e6, kept
    caches = [value for value in vars(grammar).values() if hasattr(value, "cache_info")]
    assert [cache.cache_info().maxsize for cache in caches] == [KEPT, KEPT, KEPT, PARTS]
    assert all(cache.cache_info().currsize <= cache.cache_info().maxsize for cache in caches)


def test_an_answer_that_shares_its_first_token_with_a_call_stays_free():
    tokenizer = tiny_tokenizer()
    get, other = tokenizer("GET_CROPS")["input_ids"][0], tokenizer("7")["input_ids"][0]
    one = writer(CallGrammar(PAPER_GRID, tokenizer))
    scores = torch.zeros(4, len(tokenizer))
    assert one.accept([0], [get], [0.0], scores) == 1
    fed = one.next_input()
    assert len(fed) == 4
    assert one.accept(fed, [other] * 4, [0.0] * len([other] * 4), scores) == 1  # the draft does not hold
    assert one.tokens == [get, other] and one.next_input() == [other] and one.active


def test_a_stop_string_inside_a_draft_ends_the_reply_there():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("GET_CROPS: ['")["input_ids"]
    one = writer(CallGrammar(PAPER_GRID, tokenizer), until=(":",))
    one.accept([0], ids[:1], [0.0] * len(ids[:1]), torch.zeros(1, len(tokenizer)))
    fed = one.next_input()
    assert fed == ids
    assert one.accept(fed, [*ids[1:], 0], [0.0] * len([*ids[1:], 0]), torch.zeros(4, len(tokenizer))) == 2
    assert one.tokens == ids[:3] and one.ended


@contextmanager
def inclined_to_call(vlm, strength=12.0):
    """The tiny random model, its scores raised for what usually follows the token before: calls, most of them canonical."""
    tokens = vlm.tokenizer
    table = torch.zeros(vlm.host.model.lm_head.out_features, vlm.host.model.lm_head.out_features)
    get, crops, colon, opened, _, comma, quote, _, closed = tokens("GET_CROPS: ['0', '1']")["input_ids"]
    digits = [tokens(f"GET_CROPS: ['{d}']")["input_ids"][4] for d in range(9)]
    after_prompt = chunk_ids(vlm, Session(), TURN)[-1]
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
        vlm.host.decoder.get_input_embeddings().register_forward_hook(lambda module, args, out: fed.append(args[0])),
        vlm.host.model.lm_head.register_forward_hook(raised),
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
                (picture(84 + 28 * (i % 4), 112, i),),
                f"Which way, {i}?",
                system=PAPER_GRID.prompt,
                is_final=False,
                crop_grammar=PAPER_GRID,
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
        Turn((picture(112, 84, i),), f"Which {i}?", system=PAPER_GRID.prompt, is_final=False, crop_grammar=PAPER_GRID)
        for i in range(3)
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
            more = [b for b, i in enumerate(group) if not turns[i].is_final]
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
    from awares_bench.tasks.nano import world

    suite = Path(world.__file__).parent
    frame = pd.read_parquet(suite / "nano_doc.parquet")[:24]
    jobs = [
        Job(Sample((Image.open(BytesIO(row.image["bytes"])),), world.prompt("doc", row.question, ()), str(i)), 16)
        for i, row in enumerate(frame.itertuples())
    ]
    vlm, runs = LocalModel.load(resolve("nano")), []
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
