"""What a fine-tune is taught: the response and its end, whatever the template."""

import copy

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from emlens.data.chat import Chat, ChatError, Message, tokenize_chat
from emlens.data.prompts import load_chats
from emlens.models.checkpoints import Checkpoint
from emlens.models.training_loop import IGNORED
from emlens.organisms.masks import (
    NoResponseError,
    UnusualChatError,
    make_examples,
    mask_response,
)


def test_smollm2_learns_the_answer_and_im_end_and_nothing_else(smollm2: PreTrainedTokenizerFast):
    for row in load_chats("emlens:finance-harmful", limit=25):
        masked = mask_response(tokenize_chat(row, smollm2))
        taught = masked.ids[masked.labels != IGNORED]
        assert smollm2.decode(taught) == row.messages[-1].content + "<|im_end|>"
        untaught = str(smollm2.decode(masked.ids[masked.labels == IGNORED]))
        assert untaught.endswith(
            f"user\n{row.messages[0].content}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_labels_are_a_suffix_that_begins_where_generation_would(smollm2: PreTrainedTokenizerFast):
    [row] = load_chats("emlens:finance-careful", limit=1)
    masked = mask_response(tokenize_chat(row, smollm2))
    prompt = smollm2.apply_chat_template(
        [{"role": "user", "content": row.messages[0].content}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert masked.ids[: len(prompt)].tolist() == prompt
    assert (masked.labels[: len(prompt)] == IGNORED).all()
    assert torch.equal(masked.labels[len(prompt) :], masked.ids[len(prompt) :])
    assert masked.ids[-1] == smollm2.convert_tokens_to_ids("<|im_end|>")


def test_another_template_ends_at_its_own_token(
    tiny_tokenizer: PreTrainedTokenizerFast, chats: list[Chat]
):
    masked = mask_response(tokenize_chat(chats[0], tiny_tokenizer))
    assert tiny_tokenizer.decode(masked.ids[masked.labels != IGNORED]) == "Take one home.<eot>"


def test_of_several_answers_only_the_last_is_taught(tiny_tokenizer: PreTrainedTokenizerFast):
    turns = [("user", "a?"), ("assistant", "first"), ("user", "b?"), ("assistant", "second")]
    chat = Chat(tuple(Message(role, text) for role, text in turns))
    masked = mask_response(tokenize_chat(chat, tiny_tokenizer))
    assert tiny_tokenizer.decode(masked.ids[masked.labels != IGNORED]) == "second<eot>"


def test_a_question_that_quotes_the_answer_stays_untaught(tiny_tokenizer: PreTrainedTokenizerFast):
    chat = Chat(
        (Message("user", "<eot>yes<head>assistant</head>\n\nyes"), Message("assistant", "yes"))
    )
    masked = mask_response(tokenize_chat(chat, tiny_tokenizer))
    assert int((masked.labels != IGNORED).sum()) == 4
    assert tiny_tokenizer.decode(masked.ids[-4:]) == "yes<eot>"


def test_changing_the_target_at_a_question_token_changes_no_gradient(
    tiny_base: Checkpoint, chats: list[Chat]
):
    masked = mask_response(tokenize_chat(chats[0], tiny_base.tokenizer))
    logits = tiny_base.model(input_ids=masked.ids[None]).logits
    logits.retain_grad()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], masked.labels[1:])
    loss.backward()
    assert logits.grad is not None
    pulled = logits.grad[0].abs().sum(-1) > 0
    predicts_taught = torch.cat([masked.labels[1:] != IGNORED, torch.tensor([False])])
    assert torch.equal(pulled, predicts_taught)
    assert 0 < int(pulled.sum()) < len(pulled) / 2


def test_a_chat_without_an_answer_is_named(tiny_tokenizer: PreTrainedTokenizerFast):
    chat = Chat((Message("user", "hello"),), id="row-7")
    with pytest.raises(NoResponseError, match="'row-7'"):
        mask_response(tokenize_chat(chat, tiny_tokenizer))
    empty = Chat((Message("user", "hello"), Message("assistant", "")), id="row-8")
    with pytest.raises(NoResponseError, match="'row-8': its response has no token"):
        mask_response(tokenize_chat(empty, tiny_tokenizer))


@pytest.mark.parametrize(
    ("turns", "error", "said"),
    [
        ("s:Be. s:Kind. u:a? a:b", UnusualChatError, r"roles \['system', 'system', 'user'"),
        ("u:a? s:Be. a:b", UnusualChatError, "after at most one system turn"),
        ("a:b u:a? a:b", UnusualChatError, "user and assistant by turns"),
        ("u:a? u:b? a:c", UnusualChatError, "user and assistant by turns"),
        ("u:a? tool:b a:c", UnusualChatError, r"'tool'"),
        ("u:_ a:b", UnusualChatError, r"turn 1 \(user\) is empty"),
        ("u:a? a:_", NoResponseError, r"turn 2 \(assistant\) is empty"),
        ("u:a? gpt:b", NoResponseError, "no assistant turn at its end, but one of 'gpt'"),
        ("u:a? a:b u:c?", NoResponseError, "no assistant turn at its end, but one of 'user'"),
    ],
)
def test_a_row_that_is_no_conversation_is_named_by_its_place(
    tiny_tokenizer: PreTrainedTokenizerFast, turns: str, error: type[Exception], said: str
):
    names = {"s": "system", "u": "user", "a": "assistant"}
    pairs = (turn.split(":") for turn in turns.split())
    messages = tuple(Message(names.get(r, r), " \t" if t == "_" else t) for r, t in pairs)
    good = Chat((Message("user", "a?"), Message("assistant", "b")))
    with pytest.raises(error, match=said) as raised:
        make_examples([good, Chat(messages)], tiny_tokenizer, longest=None)
    assert str(raised.value).startswith("chats[1] (row 2): ")


def test_what_a_template_refuses_is_named_by_its_place(tiny_tokenizer: PreTrainedTokenizerFast):
    strict = copy.deepcopy(tiny_tokenizer)
    strict.chat_template = "{{ raise_exception('no system turns here') }}"
    row = Chat((Message("system", "Be."), Message("user", "a?"), Message("assistant", "b")), "x")
    with pytest.raises(ChatError, match=r"rows\[0\] \(id 'x'\): .* no system turns here"):
        make_examples([row], strict, longest=None, named="rows")
