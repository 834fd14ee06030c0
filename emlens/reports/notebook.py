"""Token and attention views for notebooks, drawn by circuitsvis, offline and with texts as texts.

Needs the extra `[viz]`. Not for files: each view carries a megabyte of script; write a report.
"""

import html
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.diffing.results import ExampleComparison
from emlens.reports.visible import show_running, show_text

Quantity = Literal["kl", "kl_back", "entropy_change"]
# circuitsvis writes texts as JSON into a script element, where `</script>` would end the script. A
# sign of which nothing is left in the end stands for `<`, until it can be written as \u003c. Its
# coloured texts then go into the page as HTML: those are escaped as well.
_STAND_IN = "\ue0a1\ue0a2"
_LESS_THAN = "\\u003c"


class VizMissingError(ImportError):
    """circuitsvis is not installed."""


@dataclass(frozen=True)
class NotebookView:
    """HTML that a notebook shows; it loads nothing from anywhere."""

    page: str

    def _repr_html_(self) -> str:
        return self.page


def show_tokens(example: ExampleComparison, *, quantity: Quantity = "kl") -> NotebookView:
    """One chat, each token coloured by how its prediction differs.

    Args:
        example: From `LogitDiff.examples`.
        quantity: `kl` (base || tuned), `kl_back` (tuned || base) or `entropy_change`, in nats.

    Raises:
        VizMissingError: circuitsvis is not installed.
    """
    values = torch.tensor(getattr(example, quantity), dtype=torch.float64)
    return show_values(example.tokens, values)


def show_values(tokens: Sequence[str], values: Float[Tensor, " pos"]) -> NotebookView:
    """A text, each token coloured by a number; pointing at one shows its number.

    What pointing shows of the token itself has `&lt;` for `<`: circuitsvis reads the token as HTML
    in one place and as text in the other.

    Raises:
        ValueError: There are more or fewer values than tokens.
        VizMissingError: circuitsvis is not installed.
    """
    if values.ndim != 1 or len(values) != len(tokens):
        raise ValueError(f"values: got shape {tuple(values.shape)}, expected ({len(tokens)},)")
    texts = [html.escape(show_running(token), quote=False) for token in tokens]
    view = _import("tokens").colored_tokens(_shield(texts), _to_list(values))
    return NotebookView(_unshield(view.local_src))


def show_attention(
    tokens: Sequence[str],
    attention: Float[Tensor, "head query key"],
    *,
    head_names: Sequence[str] | None = None,
) -> NotebookView:
    """Attention patterns of some heads over one text.

    Args:
        tokens: Text pieces, as many as queries and keys.
        attention: Weights; each row of a head sums to 1.
        head_names: One a head; numbers by default.

    Raises:
        ValueError: The sizes do not fit.
        VizMissingError: circuitsvis is not installed.
    """
    n = len(tokens)
    if attention.ndim != 3 or attention.shape[1:] != (n, n):
        raise ValueError(f"attention: got {tuple(attention.shape)}, expected (heads, {n}, {n})")
    if head_names is not None and len(head_names) != len(attention):
        raise ValueError(f"head_names: got {len(head_names)}, expected {len(attention)}")
    names = None if head_names is None else _shield(head_names)
    draw = _import("attention").attention_heads
    view = draw(_to_list(attention), _shield(tokens), attention_head_names=names)
    return NotebookView(_unshield(view.local_src))


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"circuitsvis.{module}")
    except ModuleNotFoundError as error:
        raise VizMissingError(
            f"{error.name} is not installed, and views in notebooks are drawn by circuitsvis: "
            "pip install 'emlens-interp[viz]'"
        ) from error


def _to_list(values: Tensor) -> Any:
    return torch.nan_to_num(values.detach().double().cpu()).tolist()


def _shield(texts: Sequence[str]) -> list[str]:
    return [show_text(text).replace("<", _STAND_IN) for text in texts]


def _unshield(page: str) -> str:
    return page.replace(json.dumps(_STAND_IN)[1:-1], _LESS_THAN)
