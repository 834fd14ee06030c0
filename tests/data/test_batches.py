"""Batch plans as properties; padding judged by the tokenizer's own."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emlens.data import (
    BatchError,
    Batching,
    EmptySelectionError,
    TokenizedChat,
    as_chats,
    pad_batch,
    parse_positions,
    plan_batches,
    position_mask,
    tokenize_chat,
)

PAD = 99


def row_of(length: int) -> TokenizedChat:
    """A row with as many tokens, the last two of them response."""
    return TokenizedChat(
        ids=torch.arange(length) + 10 * length,
        prompt_end=max(length - 2, 0),
        response=(max(length - 2, 0), length),
        response_eot=None,
        awaits_response=False,
        turns=(),
        text="x" * length,
        ends=tuple(range(1, length + 1)),
    )


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 200))
def test_a_plan_holds_every_row_once_within_the_budget(lengths: list[int], tokens: int) -> None:
    plan = plan_batches(lengths, Batching(tokens=tokens))
    assert sorted(row for batch in plan for row in batch) == list(range(len(lengths)))
    for batch in plan:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens
    flat = [(-lengths[row], row) for batch in plan for row in batch]
    assert flat == sorted(flat)


@given(st.lists(st.integers(1, 60), min_size=2, max_size=80), st.integers(1, 200))
def test_no_batch_could_have_taken_one_row_more(lengths: list[int], tokens: int) -> None:
    plan = plan_batches(lengths, Batching(tokens=tokens))
    for batch in plan[:-1]:
        assert (len(batch) + 1) * max(lengths[row] for row in batch) > tokens


def test_a_plan_fills_the_budget_exactly() -> None:
    plan = plan_batches([4, 2, 4, 4, 2], Batching(tokens=8))
    assert plan == ((0, 2), (3, 1), (4,))


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert plan_batches([3, 50, 3], Batching(tokens=8)) == ((1,), (0, 2))


def test_a_row_may_be_as_long_as_the_limit_and_no_longer() -> None:
    batching = Batching(max_length=20)
    assert plan_batches([20], batching) == ((0,),)
    with pytest.raises(BatchError, match=r"row 1 has 21 tokens, more than max_length = 20"):
        plan_batches([5, 21], batching)
    assert plan_batches([16], batching, n_ctx=16) == ((0,),)
    with pytest.raises(BatchError, match=r"row 0 has 17 tokens, more than the model's context"):
        plan_batches([17], batching, n_ctx=16)
    with pytest.raises(BatchError, match="max_length = 20"):
        plan_batches([21], batching, n_ctx=64)


def test_no_rows_and_empty_rows_are_refused() -> None:
    with pytest.raises(BatchError, match="no rows"):
        plan_batches([], Batching())
    with pytest.raises(BatchError, match="row 1 has 0 tokens"):
        plan_batches([3, 0], Batching())


@pytest.mark.parametrize("size", [{"tokens": 0}, {"max_length": -1}])
def test_a_batching_below_one_token_is_refused(size: dict[str, int]) -> None:
    with pytest.raises(BatchError, match=r"expected at least 1"):
        Batching(**size)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_that_of_the_tokenizer(
    side: Literal["left", "right"], make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.pad_token = "</s>"
    texts = ["Put the savings in a fund.", "What?", "🦜 and the user"]
    chats = [tokenize_chat(chat, tokenizer) for chat in as_chats(texts)]
    batch = pad_batch(chats, (2, 0), pad_id=tokenizer.pad_token_id, side=side)
    tokenizer.padding_side = side
    expected = tokenizer(
        [chats[2].text, chats[0].text],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(batch.ids, expected["input_ids"])
    assert torch.equal(batch.mask, expected["attention_mask"])
    assert batch.rows == (2, 0)


def test_padding_is_on_the_left_unless_asked_otherwise() -> None:
    batch = pad_batch([row_of(2), row_of(3)], (0, 1), pad_id=PAD)
    assert batch.ids.tolist() == [[PAD, 20, 21], [30, 31, 32]]
    assert batch.mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_a_pad_id_that_occurs_in_the_text_stays_a_real_token() -> None:
    batch = pad_batch([row_of(2), row_of(3)], (0, 1), pad_id=20)
    assert batch.mask.tolist() == [[0, 1, 1], [1, 1, 1]]


@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=6),
    st.sampled_from(["left", "right"]),
    st.sampled_from(["all", "response", "last_prompt", "response[:1]", "all[-1:]", "prompt"]),
)
def test_a_position_means_the_same_token_in_any_padding(
    lengths: list[int], side: Literal["left", "right"], text: str
) -> None:
    chats = [row_of(length + 1) for length in lengths]
    rows = tuple(reversed(range(len(chats))))
    batch = pad_batch(chats, rows, pad_id=PAD, side=side)
    chosen = position_mask(batch, chats, parse_positions(text))
    assert not (chosen & (batch.mask == 0)).any()
    for place, row in enumerate(rows):
        alone = chats[row].ids[parse_positions(text).mask(chats[row])]
        assert batch.ids[place, chosen[place]].tolist() == alone.tolist()


def test_an_empty_selection_names_its_row() -> None:
    chats = [row_of(5), row_of(3)]
    batch = pad_batch(chats, (1, 0), pad_id=PAD)
    with pytest.raises(EmptySelectionError, match=r"row 1: positions: prompt\[2:\] selects noth"):
        position_mask(batch, chats, parse_positions("prompt[2:]"))


def test_a_batch_without_rows_or_with_an_impossible_pad_id_is_refused() -> None:
    with pytest.raises(BatchError, match="rows: got none"):
        pad_batch([row_of(3)], (), pad_id=PAD)
    with pytest.raises(BatchError, match="pad_id: got -1"):
        pad_batch([row_of(3)], (0,), pad_id=-1)
