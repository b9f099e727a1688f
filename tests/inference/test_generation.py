"""Generation arguments are acted on, refused in a sentence, or said: what lmms-eval's tasks really ask for, and what users pass."""

import pytest

from awares_bench.inference.generation import settings

GREEDY = [  # as lmms-eval's tasks write it
    {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
    {"max_new_tokens": 16, "temperature": 0.0, "do_sample": False, "until": ["\n\n"]},
    {"max_new_tokens": 16, "do_sample": True, "temperature": 0},
    {"max_new_tokens": 16, "temperature": None, "top_p": None, "num_beams": None, "repetition_penalty": None},
    {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.001, "top_k": 1},
    {"max_new_tokens": 16, "do_sample": True, "temperature": 0.2, "top_p": 0},
    {"max_new_tokens": 16, "temperature": 0, "seed": 0, "top_k": 50, "length_penalty": 2.0},
    {"max_new_tokens": "16", "num_beams": "1", "do_sample": "none", "temperature": "None", "until": "none"},
    {"max_new_tokens": 16.0, "bad_words_ids": [], "no_repeat_ngram_size": 0, "max_gen_toks": "none"},
]


@pytest.mark.parametrize("asked", GREEDY, ids=range(len(GREEDY)))
def test_what_means_greedy_passes_in_silence_and_is_one_setting(asked):
    found = settings(asked)
    assert (found.max_new_tokens, found.said) == (16, ())
    assert found.decisive | {"until": []} == {"max_new_tokens": 16, "until": []}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"temperature": 0.7}, r"sampling is asked for \(temperature=0.7\).*--gen_kwargs do_sample=false"),
        ({"temperature": 0.7, "do_sample": None}, "sampling is asked for"),
        ({"do_sample": True}, r"sampling is asked for \(do_sample=true\)"),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.95}, "sampling is asked for"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; allowed: false"),
        ({"temperature": "hot"}, "temperature is 'hot'; allowed: 0"),
        ({"num_beams": 4}, r"num_beams=4 would change the answers.*allowed: 1\. Pass --gen_kwargs num_beams=1"),
        ({"num_beams": "4"}, "num_beams='4' would change"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6 would change"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 would change"),
        ({"min_new_tokens": 5}, "min_new_tokens=5 would change"),
        ({"bad_words_ids": [[5]]}, r"bad_words_ids=\[\[5\]\] would change.*allowed: none"),
        ({"visual_cot": True}, "visual_cot=True would change.*allowed: false"),
        ({"skip_special_tokens": False}, "skip_special_tokens=False would change.*allowed: true"),
        (
            {"max_gen_toks": 64},
            "max_gen_toks=64 is not read; write it as max_new_tokens, and pass --gen_kwargs max_gen_toks=none",
        ),
        ({"stop_sequences": ["\n"]}, "is not read; write it as until"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number, at least 1"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens is inf"),
    ],
)
def test_what_would_change_a_greedy_answer_is_refused_with_what_to_pass(asked, said):
    with pytest.raises(ValueError, match=said):
        settings(asked)


def test_what_is_not_acted_on_and_harmless_is_said():
    assert settings({"image_aspect_ratio": "original"}).said == ("image_aspect_ratio='original' is not acted on",)
    said = settings({"do_sample": False, "temperature": 0.7}).said
    assert said == ("temperature=0.7 is not acted on: do_sample=false means greedy decoding",)


def test_what_decides_an_answer_is_kept_and_nothing_else():
    assert settings({}).decisive == {"max_new_tokens": 128, "until": []}
    assert settings({"until": "Q:", "max_new_tokens": 1, "seed": 3}).decisive == {"max_new_tokens": 1, "until": ["Q:"]}
    assert settings({"repetition_penalty": 1.2}).decisive["repetition_penalty"] == 1.2
    assert settings({"repetition_penalty": 1.0}).decisive["repetition_penalty"] == 1.0  # the checkpoint may ask for another
