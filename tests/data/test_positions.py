"""Positions on chats whose spans are planted by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emlens.data import (
    EmptySelectionError,
    Positions,
    PositionsError,
    TokenizedChat,
    parse_positions,
)


def planted(
    response: tuple[int, int] | None = (6, 10), eot: int | None = 11, *, awaits: bool = False
) -> TokenizedChat:
    """A chat of twelve tokens: six of prompt, four of response, an end of turn, a line break."""
    return TokenizedChat(
        ids=torch.arange(12),
        prompt_end=12 if response is None else response[0],
        response=response,
        response_eot=eot,
        awaits_response=awaits,
        turns=(),
        text="abcdefghijkl",
        ends=tuple(range(1, 13)),
        id="planted",
    )


def selected(text: str, chat: TokenizedChat) -> list[int]:
    mask = parse_positions(text).mask(chat)
    assert mask.shape == chat.ids.shape
    return torch.arange(12)[mask].tolist()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("prompt", [0, 1, 2, 3, 4, 5]),
        ("response", [6, 7, 8, 9]),
        ("response+eot", [6, 7, 8, 9, 10]),
        ("all", list(range(12))),
        ("last_prompt", [5]),
        ("response[:2]", [6, 7]),
        ("response[2:]", [8, 9]),
        ("response[1:3]", [7, 8]),
        ("response[-1:]", [9]),
        ("response[:-1]", [6, 7, 8]),
        ("response[:99]", [6, 7, 8, 9]),
        ("response+eot[-1:]", [10]),
        ("response[:]", [6, 7, 8, 9]),
        ("prompt[-2:]", [4, 5]),
        ("all[8:]", [8, 9, 10, 11]),
        ("all[:5]", [0, 1, 2, 3, 4]),
        ("last_prompt[:1]", [5]),
    ],
)
def test_positions_select_their_tokens(text: str, tokens: list[int]) -> None:
    assert selected(text, planted()) == tokens


def test_a_chat_that_awaits_its_response_has_a_last_prompt_token() -> None:
    chat = planted(None, None, awaits=True)
    assert selected("last_prompt", chat) == [11]
    assert selected("prompt", chat) == list(range(12))


def test_a_chat_without_a_header_for_an_answer_has_no_last_prompt_token() -> None:
    with pytest.raises(PositionsError, match=r"id 'planted'.*pass for_generation=True"):
        parse_positions("last_prompt").mask(planted(None, None))


@pytest.mark.parametrize("text", ["response", "response+eot", "response[:3]"])
def test_the_response_of_a_chat_without_one_is_refused(text: str) -> None:
    with pytest.raises(PositionsError, match=r"needs an assistant turn.* id 'planted'"):
        parse_positions(text).mask(planted(None, None))


def test_an_end_of_turn_that_nobody_writes_is_refused() -> None:
    with pytest.raises(PositionsError, match="needs an end-of-turn token"):
        parse_positions("response+eot").mask(planted(eot=None))


@pytest.mark.parametrize("text", ["response[4:]", "response[2:2]", "all[12:]", "prompt[:-6]"])
def test_an_empty_selection_is_refused(text: str) -> None:
    with pytest.raises(EmptySelectionError, match=r"selects nothing in the chat with id 'planted'"):
        parse_positions(text).mask(planted())


def test_an_empty_response_and_an_empty_prompt_are_empty_selections() -> None:
    for text, chat in [("response", planted((6, 6), 7)), ("last_prompt", planted((0, 4), 5))]:
        with pytest.raises(EmptySelectionError, match="the span has 0 tokens"):
            parse_positions(text).mask(chat)


@pytest.mark.parametrize(
    "text",
    ["response[5]", "response[::2]", "response[a:]", "all[1:2:3]", "all[1:", "all]", "all[:][:]"],
)
def test_what_is_not_a_slice_is_refused(text: str) -> None:
    with pytest.raises(PositionsError, match="cannot read"):
        parse_positions(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("respons", "response"), ("last-prompt[:1]", "last_prompt"), ("promt", "prompt"), ("", "")],
)
def test_an_unknown_span_lists_the_nearest_three(text: str, nearest: str) -> None:
    with pytest.raises(PositionsError, match="is not known") as caught:
        parse_positions(text)
    names = str(caught.value).split("nearest: ")[1].split(", ")
    assert len(names) == 3
    assert names[0] == nearest or not text


SPANS = st.sampled_from(["prompt", "response", "response+eot", "all", "last_prompt"])
EDGES = st.none() | st.integers(-15, 15)


@given(SPANS, EDGES, EDGES)
def test_positions_survive_being_written(span: str, start: int | None, stop: int | None) -> None:
    positions = Positions(span, start, stop)
    assert parse_positions(str(positions)) == positions


@given(SPANS, EDGES, EDGES)
def test_a_slice_counts_inside_its_span_as_in_a_list(
    span: str, start: int | None, stop: int | None
) -> None:
    inside = selected(span, planted())[start:stop]
    if inside:
        assert selected(str(Positions(span, start, stop)), planted()) == inside
    else:
        with pytest.raises(EmptySelectionError):
            Positions(span, start, stop).mask(planted())
