"""Marks: the same tokens have the same code, whatever lies around them; others have another."""

import pytest
import torch

from airrep.marks import CODE, OPENINGS, WIDTH, marks

START = 2  # the prompt's first token
PROMPT = list(range(10, 20))
PARTS = {"first": 0, "response": 1, "opening 2": 2, "opening 8": 3}


def marked(prompt: list[int], response: list[int], padding: int = 0) -> dict[str, torch.Tensor]:
    """The codes of a text by their names."""
    ids = [1, 2, *prompt, 3, *response, 4] + [0] * padding
    mask = torch.zeros(len(ids), dtype=torch.bool)
    first = START + len(prompt) + 1
    mask[first : first + len(response)] = True
    (codes,) = marks(torch.tensor([ids]), mask[None], START).view(1, len(PARTS), CODE)
    return {name: codes[row] for name, row in PARTS.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in PARTS if torch.equal(one[name], other[name])}


def test_codes_are_plus_and_minus_one_of_the_stated_width() -> None:
    found = marked(PROMPT, [5, 6])
    assert WIDTH == sum(len(code) for code in found.values()) == CODE * (2 + len(OPENINGS))
    assert all(set(code.tolist()) == {1.0, -1.0} for code in found.values())


def test_what_is_the_same_has_the_same_code() -> None:
    text = marked(PROMPT, [5, 6])
    assert same(text, marked(PROMPT, [5, 6], padding=7)) == set(PARTS)
    # Prompts of other lengths move the response; tokens behind the openings do not count.
    assert same(text, marked([*PROMPT, 30, 31], [5, 6])) == set(PARTS)
    assert same(text, marked(PROMPT, [5, 7])) == {"first", "opening 2", "opening 8"}
    assert same(text, marked(PROMPT, [5, 6, 6])) == {"first", "opening 2", "opening 8"}
    assert same(text, marked(PROMPT, [6, 5])) == {"opening 2", "opening 8"}
    assert same(text, marked([*PROMPT[:5], 40, *PROMPT[6:]], [8])) == {"opening 2"}
    assert same(text, marked([PROMPT[1], PROMPT[0], *PROMPT[2:]], [5, 6])) == {"first", "response"}


def test_a_short_prompt_does_not_read_the_response_or_padding() -> None:
    assert same(marked([10], [5]), marked([10], [6], padding=5)) == {"opening 2", "opening 8"}


def test_other_tokens_have_codes_that_are_as_good_as_orthogonal() -> None:
    ids = torch.arange(6000).view(2000, 3) + 100
    response = torch.tensor([[False, False, True]]).expand(2000, 3)
    codes = marks(ids, response, 0).view(2000, len(PARTS), CODE)
    for row in range(len(PARTS)):
        products = (codes[:, row] @ codes[:, row].T / CODE).fill_diagonal_(0.0)
        assert products.abs().max() < 0.75
        assert products.square().mean().sqrt() == pytest.approx(CODE**-0.5, rel=0.02)
    # Of one text, too: a response of one token is no code of its first token.
    across = (codes[:, 0] * codes[:, 1]).mean(dim=1)
    assert across.square().mean().sqrt() == pytest.approx(CODE**-0.5, rel=0.1)
