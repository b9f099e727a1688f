"""The crop grammar both ways, against every spelling that was seen in papers, READMEs and released parsers."""

from itertools import combinations

import pytest

from awares_bench.methods.crop_grid import PAPER_GRID, CropRequestError

SPELLINGS = [
    ("GET_CROPS:['3']", ("bottom-right",)),
    ("GET_CROPS: ['3']", ("bottom-right",)),
    ("GET_CROPS ['3']", ("bottom-right",)),
    ("GET_CROPS['3']", ("bottom-right",)),
    ("GET_CROPS:[3]", ("bottom-right",)),
    ("GET_CROPS:['0', '5']", ("top-left", "top")),
    ("GET_CROPS:[0,5]", ("top-left", "top")),
    ("GET_CROPS: ['all']", ("all",)),
    ("GET_CROPS:[all]", ("all",)),
    ('GET_CROPS:["3"]', ("bottom-right",)),
    ("  GET_CROPS: ['3']", ("bottom-right",)),
    ("The text is too small. GET_CROPS: ['3']", ("bottom-right",)),
    ("GET_CROPS:['center']", ("center",)),
    ("get_crops: ['Top-Left', 'BOTTOM']", ("top-left", "bottom")),
    ("GET_CROPS :\n[ 'top left' ,\t7 ]", ("top-left", "left")),
    ("GET_CROPS: ['3', '3', 'bottom-right']", ("bottom-right",)),
    ("GET_CROPS: ['3', 'all', '0']", ("all",)),
]


@pytest.mark.parametrize(("reply", "names"), SPELLINGS)
def test_every_spelling_that_means_something_is_read(reply, names):
    assert PAPER_GRID.parse(reply).names == names


@pytest.mark.parametrize("reply", ["", "42", "yes", "[3]", "I will not use GET_CROPS here.", "top-left"])
def test_an_answer_is_no_request(reply):
    assert PAPER_GRID.parse(reply) is None


MALFORMED = [
    ("GET_CROPS: ['9']", "0-8"),
    ("GET_CROPS: ['-1']", "unknown crop"),
    ("GET_CROPS: ['01']", "unknown crop"),
    ("GET_CROPS: ['middle']", "unknown crop"),
    ("GET_CROPS: []", "empty"),
    ("GET_CROPS: ['3'", "not closed"),
    ("GET_CROPS: ['3', ['4']]", "not closed"),
    ("GET_CROPS: ['3'] GET_CROPS: ['4']", "one GET_CROPS call"),
    ("GET_CROPS", "expected GET_CROPS"),
    ("GET_CROPS: 3", "expected GET_CROPS"),
    ("GET_CROPS: ['3\"]", "unknown crop"),
]


@pytest.mark.parametrize(("reply", "why"), MALFORMED)
def test_a_malformed_call_says_what_is_wrong_and_what_is_allowed(reply, why):
    with pytest.raises(CropRequestError, match=why) as error:
        PAPER_GRID.parse(reply)
    assert isinstance(error.value, ValueError)


def test_parse_undoes_format_for_every_set_of_crops():
    for n in range(1, 10):
        for names in combinations(PAPER_GRID.names, n):
            assert PAPER_GRID.parse(PAPER_GRID.format(names)).names == names
    assert PAPER_GRID.format(("bottom-right",)) == "GET_CROPS: ['3']"
    assert PAPER_GRID.parse(PAPER_GRID.format("all")).names == ("all",)
    with pytest.raises(CropRequestError):
        PAPER_GRID.format(())


def test_the_examples_in_the_prompt_are_in_the_grammar():
    assert PAPER_GRID.parse("GET_CROPS: ['0', '5']").names == ("top-left", "top")
    for name in (*PAPER_GRID.names, "all"):
        assert f"'{name}'" in PAPER_GRID.prompt
    assert "GET_CROPS [<crop_number>]" in PAPER_GRID.prompt_as("adapter")
    with pytest.raises(ValueError, match="known profiles"):
        PAPER_GRID.prompt_as("mine")


@pytest.mark.parametrize("size", [(224, 224), (101, 57), (2, 3), (1, 1), (1, 900)])
def test_quadrants_and_halves_tile_the_image_and_no_box_is_empty(size):
    w, h = size
    boxes = dict(zip(PAPER_GRID.names, PAPER_GRID.boxes(w, h, PAPER_GRID.names), strict=True))
    area = lambda b: (b[2] - b[0]) * (b[3] - b[1])  # noqa: E731
    assert all(0 <= b[0] < b[2] <= w and 0 <= b[1] < b[3] <= h for b in boxes.values())
    if min(w, h) > 1:
        for tiles in (PAPER_GRID.names[:4], ("top", "bottom"), ("left", "right")):
            assert sum(area(boxes[t]) for t in tiles) == w * h
    assert PAPER_GRID.boxes(w, h, "all") == [(0, 0, w, h)]


def test_x_is_x_and_y_is_y():
    assert PAPER_GRID.boxes(400, 100, ["top-right", "bottom", "center"]) == [
        (200, 0, 400, 50),
        (0, 50, 400, 100),
        (100, 25, 300, 75),
    ]
    with pytest.raises(CropRequestError, match="allowed"):
        PAPER_GRID.boxes(10, 10, ["upper"])


def test_the_cheapest_cover_of_hand_made_cases():
    cases = {
        ((10, 10, 40, 40),): ("top-left",),
        ((90, 90, 130, 130),): ("center",),
        ((100, 10, 130, 40),): ("top",),
        ((10, 100, 40, 130),): ("left",),
        ((10, 10, 40, 40), (180, 180, 200, 200)): ("top-left", "bottom-right"),
        ((10, 10, 40, 40), (180, 10, 200, 40)): ("top",),  # as cheap as two quadrants, and one image
        ((20, 20, 200, 200),): ("all",),
        ((10, 10, 40, 40), (180, 180, 200, 200), (180, 10, 200, 40)): ("top-left", "right"),
    }
    for evidence, names in cases.items():
        assert PAPER_GRID.cheapest_cover(list(evidence), 224, 224) == names
