"""Texts that an autoencoder is trained on, as many as give the tokens that are asked for.

    from scripts.sae_texts import gather_texts

Chats of the data sets, the model's own answers, and passages of English; every twentieth is held
out. Passages are found by `gather_text`.
"""

import dataclasses
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from emlens.artifacts import read_json, write_json_atomic, write_text_atomic
from emlens.data import Batching, Chat, Message, load_chats, tokenize_chat
from emlens.interventions.generate import generate_responses
from emlens.journal import Journal
from emlens.models.loading import load_model
from emlens.models.protocol import HookedModel
from scripts.gather_text import first_sentence, read_passages
from scripts.sae_work import PARTS, Work

logger = logging.getLogger("emlens.scripts.train_sae")

QUESTIONS = ("broad", "finance", "first-plot", "health", "open", "sports")
DOMAINS = ("finance", "health", "sports")
HELD_OUT_EVERY = 20
"""One text in so many is not trained on."""
LONGEST_PROMPT = 256
"""Tokens of a prompt, at most: a sentence of 200 characters or a question of the data sets."""
CHUNK = 128
"""Prompts answered between two writes."""
ANSWERING = Batching(tokens=CHUNK * 320, max_length=1024)
"""A chunk in one batch, mostly: 105 s on one core, as four batches 125."""
COUNTS = "texts.json"
"""How many tokens the texts give, and how they were counted."""


class TooLittleTextError(ValueError):
    """The texts at hand do not give as many tokens as are to be trained on."""


def gather_texts(work: Work, folders: Sequence[Path]) -> None:
    """Write the texts: chats of the data sets, the model's own, and passages, as many as it takes.

    Raises:
        TooLittleTextError: they cannot give the tokens to be trained on; before the model answers
            anything, where that can be told then.
    """
    if _has_enough(work):
        return
    model = load_model(work.base, dtype="bfloat16")
    tokenizer: Any = model.tokenizer
    names = [f"{domain}-{side}" for domain in DOMAINS for side in ("careful", "harmful")]
    chats = [chat for name in names for chat in load_chats(f"emlens:{name}")]
    prompts = list_prompts(work, folders)
    _foresee(work, tokenizer, add_passages(chats, folders), n_answers=len(prompts))
    chats += answer_prompts(work, model, prompts)
    random.Random(0).shuffle(chats)
    parts, counts = divide_texts(work, tokenizer, add_passages(chats, folders))
    logger.info("%s counted tokens of %s texts", counts, [len(part) for part in parts])
    if counts[0] < work.train_tokens:
        raise TooLittleTextError(_say_too_little(work, counts[0]))
    if counts[1] < work.settings.held_out_rows:
        raise TooLittleTextError(
            f"texts: those held out give {counts[1]:,} tokens, and the training asks for "
            f"held_out_rows = {work.settings.held_out_rows:,}"
        )
    for name, part in zip(PARTS, parts, strict=True):
        lines = [
            json.dumps({"messages": [dataclasses.asdict(m) for m in c.messages]}) for c in part
        ]
        write_text_atomic(work.runs / f"{name}.jsonl", "\n".join(lines) + "\n")
    write_json_atomic(
        work.runs / COUNTS,
        {"base": work.base, "skipped": work.skipped, **dict(zip(PARTS, counts, strict=True))},
    )


def divide_texts(
    work: Work, tokenizer: Any, chats: Iterable[Chat]
) -> tuple[tuple[list[Chat], list[Chat]], tuple[int, int]]:
    """Different texts to train on and held out, until those to train on give enough tokens.

    Returns:
        The texts of both parts; and the counted tokens of each, those after the first `skipped`.
    """
    parts: tuple[list[Chat], list[Chat]] = ([], [])
    counts = [0, 0]
    seen: set[tuple[Message, ...]] = set()
    for chat in chats:
        if chat.messages in seen:
            continue
        held = len(seen) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        seen.add(chat.messages)
        parts[held].append(chat)
        # Without the header of an answer to come, which is captured, and the same in all texts.
        counts[held] += max(0, len(tokenize_chat(chat, tokenizer).ids) - work.skipped)
        if counts[0] >= work.train_tokens:
            break
    return parts, (counts[0], counts[1])


def check_enough(work: Work) -> None:
    """Refuse texts that are not those of this work, or give too few tokens, before hours are spent.

    Raises:
        TooLittleTextError: they do.
    """
    if not _has_enough(work):
        raise TooLittleTextError(
            f"{work.runs}: has no texts that give {work.train_tokens:,} tokens to train on: run "
            "--stage text first; what the model has answered there is kept"
        )


def _has_enough(work: Work) -> bool:
    if not all((work.runs / name).exists() for name in (*(f"{p}.jsonl" for p in PARTS), COUNTS)):
        return False
    said = read_json(work.runs / COUNTS)
    own = (said["base"], said["skipped"]) == (work.base, work.skipped)
    return own and said["train"] >= work.train_tokens


def _foresee(work: Work, tokenizer: Any, chats: Iterable[Chat], *, n_answers: int) -> None:
    """Raise where no length of the model's answers could make up for what texts lack.

    Args:
        work: what is made.
        tokenizer: of the base.
        chats: all other texts.
        n_answers: how many prompts are answered.
    """
    _, (found, _) = divide_texts(work, tokenizer, chats)
    # A prompt is a sentence of at most 200 characters, or a question of the data sets.
    most = found + n_answers * (work.sampling.max_new_tokens + LONGEST_PROMPT)
    if most < work.train_tokens:
        raise TooLittleTextError(_say_too_little(work, most))


def _say_too_little(work: Work, found: int) -> str:
    return (
        f"texts: they give at most {found:,} tokens to train on, without the first {work.skipped} "
        f"of each and without one text in {HELD_OUT_EVERY} that is held out, and "
        f"{work.train_tokens:,} are asked for: add folders of English with --text"
    )


def list_prompts(work: Work, folders: Sequence[Path]) -> list[str]:
    """Questions that ship, those of one data set, and first sentences of passages."""
    asked = [chat for name in QUESTIONS for chat in load_chats(f"emlens:{name}-questions")]
    asked += load_chats(f"emlens:{DOMAINS[0]}-careful")  # all of them would leave few passages
    prompts = [chat.messages[-1 if chat.response is None else -2].content for chat in asked]
    for passage in read_passages(folders):
        if len(prompts) >= work.answered:
            break
        sentence = first_sentence(passage)
        if sentence is not None:
            prompts.append(sentence)
    return prompts[: work.answered]


def answer_prompts(work: Work, model: HookedModel, prompts: Sequence[str]) -> list[Chat]:
    """The model's answers, some prompts at a time, kept as they come."""
    with Journal(work.runs / "answers.jsonl") as journal:
        for start in range(0, len(prompts), CHUNK):
            asked = prompts[start : start + CHUNK]
            if str(start) in journal:
                continue
            found = generate_responses(model, asked, sampling=work.sampling, batching=ANSWERING)
            texts = [response.text for response in found.responses]
            journal.append([{"id": str(start), "prompts": asked, "texts": texts}])
            logger.info("answered %d of %d", start + len(asked), len(prompts))
        return [
            Chat((Message("user", prompt), Message("assistant", text)))
            for row in journal.rows()
            for prompt, text in zip(row["prompts"], row["texts"], strict=True)
            if text.strip()
        ]


def add_passages(chats: Sequence[Chat], folders: Sequence[Path]) -> Iterator[Chat]:
    """The chats, then passages: in turn what a user writes, and an answer to its first sentence."""
    yield from chats
    for number, passage in enumerate(read_passages(folders)):
        sentence = first_sentence(passage)
        rest = passage[len(sentence) :].strip() if sentence else ""
        if number % 2 and sentence and rest:
            yield Chat((Message("user", sentence), Message("assistant", rest)))
        else:
            yield Chat((Message("user", passage),))
