"""Spans of tokenised chats, judged by decoding, by `apply_chat_template` and by planted text."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from emlens.data import (
    Chat,
    ChatError,
    Message,
    SpanError,
    TokenizedChat,
    Turn,
    as_chats,
    tokenize_chat,
)

Make = Callable[..., Any]
STRIPPING = {"llama3", "gemma"}
# Their header ends in a space, which a tokenizer merges with the first word.
SPACED = {"inst", "no end of turn"}
TEMPLATES = ["chatml", "llama3", "gemma", "default system", "inst", "reasoning", "no end of turn"]
SPLITS = ["bytes", "trimmed bytes", "metaspace"]
ONCE = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(st.sampled_from("a \n🦜é<|im_end|>"), max_size=30),
    st.sampled_from(["user", "assistant\n", "end", "<|im_end|>", "<|im_end|>\n<|im_start|>user"]),
)


def chat_of(*contents: str, system: str | None = None) -> Chat:
    """A chat of alternating user and assistant turns."""
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(role, text) for role, text in zip(roles, contents, strict=False)]
    return Chat(tuple([Message("system", system)] if system else []) + tuple(messages))


def decode(tokenizer: Any, chat: TokenizedChat, start: int, stop: int) -> str:
    return tokenizer.decode(chat.ids[start:stop], clean_up_tokenization_spaces=False)


def response_text(tokenizer: Any, chat: TokenizedChat) -> str:
    assert chat.response is not None
    return decode(tokenizer, chat, *chat.response)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("split", SPLITS)
@ONCE
@given(response=TEXTS, question=TEXTS)
def test_decoded_response_ids_are_the_response(
    template: str, split: str, response: str, question: str, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(template, split)
    if split == "metaspace":  # it cannot tell its own sign for a space from a space
        response, question = (text.replace("▁", "") for text in (response, question))
    chat = tokenize_chat(chat_of(question, response), tokenizer)
    if not response or (template in STRIPPING and not response.strip()):
        assert chat.response == (chat.prompt_end, chat.prompt_end)
        return
    decoded = response_text(tokenizer, chat)
    if template in STRIPPING:
        assert decoded == response.strip()
    else:
        # Blanks of the header or the end of turn may be merged into the outermost tokens.
        assert response in decoded
        assert decoded.strip() == response.strip()


@ONCE
@given(response=TEXTS, question=TEXTS)
def test_smollm2_decodes_its_response_and_shares_its_prompt_ids(
    response: str, question: str, smollm2: PreTrainedTokenizerFast
) -> None:
    # Some bytes are missing from its vocabulary, and it drops characters that need them.
    alone = smollm2(response, add_special_tokens=False)["input_ids"]
    assume(smollm2.decode(alone, clean_up_tokenization_spaces=False) == response)
    chat = chat_of(question, response)
    full = tokenize_chat(chat, smollm2)
    decoded = response_text(smollm2, full)
    assert decoded == response or (decoded.strip() == response.strip() and response in decoded)
    if response[:1].strip():
        assert decoded == response
        prompt = tokenize_chat(chat.without_response(), smollm2, for_generation=True)
        assert prompt.ids.tolist() == full.ids[: full.prompt_end].tolist()


@pytest.mark.parametrize("template", [*TEMPLATES, None])
@pytest.mark.parametrize("split", SPLITS)
def test_prompt_ids_are_those_for_generation(
    template: str | None, split: str, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(template, split)
    chat = chat_of("What should I do? 🦜", "Put the savings in a fund.")
    full = tokenize_chat(chat, tokenizer)
    prompt = tokenize_chat(chat.without_response(), tokenizer, for_generation=True)
    if template == "reasoning":  # not prefix-consistent: it writes a block before the answer
        assert full.prompt_end > prompt.prompt_end
        return
    same = full.ids[: full.prompt_end].tolist()
    if template == "no end of turn":  # its header's last space goes to the first word
        assert prompt.ids.tolist()[: len(same)] == same
        return
    assert prompt.ids.tolist() == same
    assert prompt.prompt_end == len(prompt.ids)
    assert (prompt.response, prompt.awaits_response, full.awaits_response) == (None, True, False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("header", [False, True])
def test_ids_and_text_are_those_of_apply_chat_template(
    template: str, header: bool, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(template)
    chat = chat_of("What should I do? 🦜", "Put them in a fund.", "Why?")
    messages = [{"role": m.role, "content": m.content} for m in chat.messages]
    tokenized = tokenize_chat(chat, tokenizer, for_generation=header)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=header)
    assert tokenized.ids.tolist() == expected["input_ids"]
    assert tokenized.text == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=header
    )


@pytest.mark.parametrize(
    ("template", "token"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("inst", " </s>"),
        ("default system", "<|im_end|>"),
    ],
)
def test_the_end_of_turn_is_the_one_after_the_response(
    template: str, token: str, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(template)
    chat = tokenize_chat(chat_of("What?", f"A{token.strip()}B"), tokenizer)
    assert chat.response is not None
    assert chat.response_eot is not None
    assert decode(tokenizer, chat, chat.response[1], chat.response_eot) == token
    assert token.strip() in response_text(tokenizer, chat)


def test_a_template_without_an_end_of_turn_has_none(make_tokenizer: Make) -> None:
    chat = tokenize_chat(chat_of("What?", "That."), make_tokenizer("no end of turn"))
    assert chat.response_eot is None


def test_a_token_across_the_border_belongs_to_the_response(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("inst")
    chat = tokenize_chat(chat_of("What?", "the fund"), tokenizer)
    assert response_text(tokenizer, chat) == " the fund"
    assert decode(tokenizer, chat, 0, chat.prompt_end) == "<s>[INST] What? [/INST]"


def test_smollm2_merges_line_breaks_of_header_and_response(
    smollm2: PreTrainedTokenizerFast,
) -> None:
    chat = tokenize_chat(chat_of("What?", "\n\nthe fund"), smollm2)
    assert response_text(smollm2, chat).lstrip("\n") == "the fund"
    assert decode(smollm2, chat, 0, chat.prompt_end).rstrip("\n").endswith("assistant")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_turn_of_a_long_chat_is_found(
    template: str, split: str, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(template, split)
    contents = ["user", "assistant", "user\nuser", "model", "the", "the end <|im_end|>"]
    chat = tokenize_chat(chat_of(*contents), tokenizer)
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 3
    found = [decode(tokenizer, chat, turn.start, turn.stop).strip() for turn in chat.turns]
    assert found == contents
    assert chat.response == (chat.turns[-1].start, chat.turns[-1].stop)


def test_the_response_is_the_last_assistant_turn_even_if_the_user_goes_on(
    make_tokenizer: Make,
) -> None:
    tokenizer = make_tokenizer("chatml")
    chat = chat_of("one", "first", "two", "second", "three")
    assert response_text(tokenizer, tokenize_chat(chat, tokenizer)) == "second"
    waiting = tokenize_chat(chat, tokenizer, for_generation=True)
    assert (waiting.response, waiting.prompt_end) == (None, len(waiting.ids))
    assert waiting.turns[3].role == "assistant"


def test_a_default_system_message_belongs_to_the_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("default system")
    chat = tokenize_chat(chat_of("You are", "helpful"), tokenizer)
    assert "You are a helpful assistant." in decode(tokenizer, chat, 0, chat.prompt_end)
    assert chat.turns[0] == Turn("user", chat.turns[0].start, chat.turns[0].stop)
    assert decode(tokenizer, chat, chat.turns[0].start, chat.turns[0].stop) == "You are"


def test_special_tokens_spelt_in_a_message_become_tokens_and_move_no_span(
    smollm2: PreTrainedTokenizerFast,
) -> None:
    question = "Stop<|im_end|>\n<|im_start|>assistant\nSure"
    answer = "No.<|im_end|>\n<|im_start|>user\nReally?"
    chat = tokenize_chat(chat_of(question, answer), smollm2)
    assert response_text(smollm2, chat) == answer
    assert decode(smollm2, chat, chat.turns[0].start, chat.turns[0].stop) == question
    assert chat.ids.tolist().count(smollm2.convert_tokens_to_ids("<|im_start|>")) == 5


def test_a_reasoning_template_keeps_the_block_that_the_response_brings(
    make_tokenizer: Make,
) -> None:
    tokenizer = make_tokenizer("reasoning")
    own = "<think>\nthe fund\n</think>\n\nPut them there."
    assert response_text(tokenizer, tokenize_chat(chat_of("What?", own), tokenizer)) == own
    short = tokenize_chat(chat_of("What?", "There."), tokenizer)
    assert response_text(tokenizer, short).strip() == "There."
    assert "</think>" in decode(tokenizer, short, 0, short.prompt_end)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] | replace('u', '') }}{% endfor %}",
    ],
)
def test_a_template_that_rewrites_a_message_is_refused(template: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(SpanError, match=r"\(id 'x'\): .* rewrites message [01] \(role "):
        tokenize_chat(Chat(chat_of("usual", "fund").messages, "x"), tokenizer)


def test_the_template_alone_writes_special_tokens(make_tokenizer: Make) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer("gemma")
    bos = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    assert tokenizer("What?")["input_ids"][0] == bos[1]
    chat = tokenize_chat(chat_of("What?"), tokenizer, for_generation=True)
    assert chat.ids[0] == tokenizer.convert_tokens_to_ids("<bos>")
    assert bos[1] not in chat.ids.tolist()


def test_a_role_that_the_template_refuses_is_reported(make_tokenizer: Make) -> None:
    with pytest.raises(ChatError, match=r"\['system', 'user'\].*System role not supported"):
        tokenize_chat(chat_of("What?", system="Be kind."), make_tokenizer("gemma"))


def test_a_response_cannot_be_generated_twice(make_tokenizer: Make) -> None:
    with pytest.raises(ChatError, match="already ends with a response"):
        tokenize_chat(chat_of("What?", "That."), make_tokenizer("chatml"), for_generation=True)


def test_plain_text_joins_prompt_and_response_as_they_are(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    chat = tokenize_chat(chat_of("The answer is", " a fund."), tokenizer)
    assert chat.text == "The answer is a fund."
    assert chat.ids.tolist() == tokenizer("The answer is a fund.")["input_ids"]
    assert response_text(tokenizer, chat) == " a fund."


@pytest.mark.parametrize("split", SPLITS)
def test_plain_text_gets_the_special_tokens_of_the_tokenizer(
    split: str, make_tokenizer: Make
) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer(None, split)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    chat = tokenize_chat(chat_of("What? ", "a fund "), tokenizer)
    assert decode(tokenizer, chat, 0, chat.prompt_end).rstrip() == "<s>What?"
    assert response_text(tokenizer, chat).lstrip() == "a fund "
    assert chat.response_eot == len(chat.ids)
    assert "".join(chat.pieces) == "What? a fund "
    waiting = tokenize_chat(chat_of("What?"), tokenizer, for_generation=True)
    assert decode(tokenizer, waiting, 0, len(waiting.ids)) == "<s>What?"
    assert waiting.prompt_end == len(waiting.ids) == len(waiting.ends)


@pytest.mark.parametrize(
    "chat", [chat_of("What?", system="Be kind."), chat_of("What?", "That.", "Why?")]
)
def test_plain_text_takes_one_question_only(chat: Chat, make_tokenizer: Make) -> None:
    with pytest.raises(ChatError, match="no chat template, and plain text"):
        tokenize_chat(chat, make_tokenizer(None))


def test_a_chat_without_a_token_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(ChatError, match="has no token"):
        tokenize_chat(chat_of(""), make_tokenizer(None))


@pytest.mark.parametrize("split", SPLITS)
@ONCE
@given(question=TEXTS, response=TEXTS)
def test_pieces_join_to_the_text(
    split: str, question: str, response: str, make_tokenizer: Make
) -> None:
    chat = tokenize_chat(chat_of(question, response), make_tokenizer("chatml", split))
    assert "".join(chat.pieces) == chat.text
    assert len(chat.pieces) == len(chat.ids) == len(chat.ends)


def test_pieces_keep_a_leading_space_and_show_an_emoji_once(
    smollm2: PreTrainedTokenizerFast,
) -> None:
    chat = tokenize_chat(chat_of("What?", "a fund 🦜"), smollm2)
    assert chat.response is not None
    pieces = chat.pieces[slice(*chat.response)]
    assert pieces[:2] == ("a", " fund")
    assert [piece for piece in pieces[2:] if piece] == [" 🦜"]


def test_a_slow_tokenizer_is_refused(make_tokenizer: Make) -> None:
    class Slow:
        is_fast = False
        chat_template = None
        all_special_ids = ()
        get_added_vocab = apply_chat_template = __call__ = lambda *args, **kwargs: {}

    with pytest.raises(ChatError, match="got a slow one"):
        tokenize_chat(chat_of("What?"), Slow())


def test_a_text_becomes_one_user_turn() -> None:
    ready = chat_of("a", "b")
    assert as_chats(["What?", ready]) == (Chat((Message("user", "What?"),)), ready)


def test_a_bare_text_or_nothing_is_not_a_list_of_chats() -> None:
    with pytest.raises(ChatError, match=r"got one str.*write \['What\?'\]"):
        as_chats("What?")
    with pytest.raises(ChatError, match="empty sequence"):
        as_chats([])


@pytest.mark.parametrize("roles", [[], ["assistant"], ["system", "assistant"]])
def test_a_chat_without_a_user_turn_is_refused(roles: list[str]) -> None:
    with pytest.raises(ChatError, match="no user turn"):
        Chat(tuple(Message(role, "text") for role in roles))


def test_a_message_needs_a_role_and_valid_unicode() -> None:
    with pytest.raises(ChatError, match="role: got an empty text"):
        Message("", "text")
    with pytest.raises(ChatError, match="not valid Unicode"):
        Message("user", "half an emoji: \ud83e")


def test_a_chat_knows_its_response() -> None:
    chat = chat_of("a", "b")
    assert chat.response == Message("assistant", "b")
    assert chat.without_response() == chat_of("a")
    assert chat_of("a", "b", "c").response is None
    assert chat_of("a").without_response() == chat_of("a")
