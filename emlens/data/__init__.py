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
from emlens.data.contrast import (
    ContrastError,
    ContrastTexts,
    prompt_hash,
    prompt_hashes,
    split_by_score,
    text_hash,
)
from emlens.data.positions import (
    EmptySelectionError,
    Positions,
    PositionsError,
    parse_positions,
)
from emlens.data.progress import report_progress, show_progress, tell_progress, track
from emlens.data.prompts import PromptFileError, load_chats
from emlens.data.scores import BehaviourScores, ModelScorer, ResponseScorer
from emlens.data.tokenized import TokenizedChats

__all__ = [
    "Batch",
    "BatchError",
    "Batching",
    "BehaviourScores",
    "Chat",
    "ChatError",
    "ContrastError",
    "ContrastTexts",
    "EmptySelectionError",
    "Message",
    "ModelScorer",
    "Positions",
    "PositionsError",
    "PromptFileError",
    "ResponseScorer",
    "SpanError",
    "TokenizedChat",
    "TokenizedChats",
    "TokenizerLike",
    "Turn",
    "as_chats",
    "load_chats",
    "pad_batch",
    "parse_positions",
    "plan_batches",
    "position_mask",
    "prompt_hash",
    "prompt_hashes",
    "report_progress",
    "show_progress",
    "split_by_score",
    "tell_progress",
    "text_hash",
    "tokenize_chat",
    "track",
]
