"""The same tokens whatever the padding, the cache and the rows that are left."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.data import (
    Chat,
    Message,
    PositionsError,
    pad_batch,
    parse_positions,
    position_mask,
    tokenize_chat,
)
from emlens.models.tokens_in_flight import (
    count_positions,
    frame_batch,
    frame_prompts,
    publish_tokens,
    select_positions,
    tokens_in_flight,
)
from emlens.models.views import lay_views
from tests.models.tiny import make_tiny, make_tokenizer

SPANS = ("all", "prompt", "response", "response+eot", "last_prompt", "response[:2]", "all[-3:]")


def chat(question, answer=None):
    turns = [Message("user", " ".join(f"w{5 + i}" for i in range(question)))]
    if answer is not None:
        turns.append(Message("assistant", " ".join(f"w{40 + i}" for i in range(answer))))
    return Chat(tuple(turns))


def tokenized(*sizes):
    tokenizer = make_tokenizer()
    return [tokenize_chat(chat(*size), tokenizer) for size in sizes]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", SPANS)
def test_the_tokens_are_those_that_the_chats_positions_name(text, side):
    chats = tokenized((3, 4), (1, 2), (6, 3))
    batch = pad_batch(chats, (2, 0, 1), pad_id=0, side=side)
    chosen = select_positions(frame_batch(batch, chats), parse_positions(text))
    assert torch.equal(chosen, position_mask(batch, chats, parse_positions(text)))
    assert not chosen[batch.mask == 0].any()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(3, 6)), min_size=1, max_size=4),
    text=st.sampled_from(SPANS),
    side=st.sampled_from(["left", "right"]),
    cut=st.integers(0, 12),
)
def test_a_text_cut_into_cached_passes_selects_what_the_whole_selects(sizes, text, side, cut):
    chats = tokenized(*sizes)
    batch = pad_batch(chats, range(len(chats)), pad_id=0, side=side)
    frame, positions = frame_batch(batch, chats), parse_positions(text)
    parts = [frame.at(frame.absolute[:, :cut]), frame.at(frame.absolute[:, cut:])]
    joined = torch.cat([select_positions(part, positions) for part in parts], dim=1)
    assert torch.equal(joined, select_positions(frame, positions))


@pytest.mark.parametrize("text", ["all", "prompt", "response", "response[1:2]", "last_prompt"])
def test_decoding_selects_what_the_finished_text_selects(text):
    chats = tokenized((3, 4), (1, 4))
    # A plain text without end-of-turn token, as a response is while it is being generated.
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    prompts = [chat.prompt_end for chat in chats]
    assert prompts == [6, 4]
    frame = frame_prompts(mask)
    steps = [select_positions(frame, parse_positions(text))]
    for step in range(4):
        column = frame.at(torch.tensor(prompts)[:, None] + step)
        steps.append(select_positions(column, parse_positions(text)))
    generated = torch.cat(steps, dim=1)
    for row, chat_ in enumerate(chats):
        expected = parse_positions(text).mask(chat_)[: prompts[row] + 4]
        got = torch.cat([generated[row, :6][mask[row].bool()], generated[row, 6:]])
        assert torch.equal(got, expected)


def test_rows_that_leave_and_rows_repeated_for_each_model_keep_their_tokens():
    chats = tokenized((3, 4), (1, 2), (6, 3))
    batch = pad_batch(chats, (0, 1, 2), pad_id=0)
    frame, positions = frame_batch(batch, chats), parse_positions("response")
    chosen = select_positions(frame, positions)
    assert torch.equal(select_positions(frame.keep([2, 0]), positions), chosen[[2, 0]])
    assert frame.keep([2, 0]).rows.tolist() == [2, 0]
    assert torch.equal(select_positions(frame.repeat(2), positions), chosen.repeat(2, 1))


def test_columns_are_counted_without_the_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert count_positions(mask).tolist() == [[-1, -1, 0, 1], [0, 1, 2, -1]]


@pytest.mark.parametrize("text", ["response[-2:]", "all[:-1]"])
def test_a_growing_text_has_no_end_to_count_from(text):
    with pytest.raises(PositionsError, match="still being generated"):
        select_positions(frame_prompts(torch.ones(1, 3, dtype=torch.int64)), parse_positions(text))


@pytest.mark.parametrize(
    ("text", "why"),
    [("response", "row 1 has no response"), ("last_prompt", "row 1 has no place")],
)
def test_a_row_without_the_span_is_named(text, why):
    chats = tokenized((3, 4), (2,))
    frame = frame_batch(pad_batch(chats, (0, 1), pad_id=0), chats)
    with pytest.raises(PositionsError, match=why):
        select_positions(frame, parse_positions(text))


def test_what_is_published_last_holds_until_its_context_ends():
    model = lay_views(make_tiny("llama"), None)
    frame = frame_prompts(torch.ones(1, 3, dtype=torch.int64))

    def rows_seen():
        held = tokens_in_flight(model)
        return None if held is None else len(held.absolute)

    def interrupted():
        with publish_tokens(model, frame.repeat(2)):
            assert rows_seen() == 2
            raise KeyboardInterrupt

    assert rows_seen() is None
    with publish_tokens(model, frame):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert rows_seen() == 1
    assert rows_seen() is None
