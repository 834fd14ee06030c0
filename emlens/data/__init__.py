"""Chats as token ids: templates, prompt files, named positions, batches."""

from emlens.data.batches import (
    Batch,
    BatchError,
    Batching,
    pad_batch,
    plan_batches,
    position_mask,
)
from emlens.data.chat import (
    Chat,
    ChatError,
    Message,
    SpanError,
    TokenizedChat,
    TokenizerLike,
    Turn,
    as_chats,
    tokenize_chat,
)
from emlens.data.positions import (
    EmptySelectionError,
    Positions,
    PositionsError,
    parse_positions,
)
from emlens.data.progress import report_progress, show_progress, tell_progress, track
from emlens.data.prompts import PromptFileError, load_chats

__all__ = [
    "Batch",
    "BatchError",
    "Batching",
    "Chat",
    "ChatError",
    "EmptySelectionError",
    "Message",
    "Positions",
    "PositionsError",
    "PromptFileError",
    "SpanError",
    "TokenizedChat",
    "TokenizerLike",
    "Turn",
    "as_chats",
    "load_chats",
    "pad_batch",
    "parse_positions",
    "plan_batches",
    "position_mask",
    "report_progress",
    "show_progress",
    "tell_progress",
    "tokenize_chat",
    "track",
]
