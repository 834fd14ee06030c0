"""Directions for tiny models, and the host's own hooks as the judge of ours."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from emlens.data import Batch, Chat, Message, TokenizedChat, pad_batch, tokenize_chat
from emlens.interventions import intervene, write_sites
from emlens.models.views import lay_views, origin_of
from emlens.sites import parse_site
from emlens.vectors import Direction, Directions, Provenance
from tests.models.tiny import make_tiny, make_tokenizer

D_MODEL = 24


@functools.cache
def load_tiny(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return lay_views(make_tiny(name, dtype=dtype), make_tokenizer())


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_direction(
    model: Any = None,
    site: str = "resid_post.1",
    *,
    seed: int = 0,
    scale: float = 3.0,
    resid_norm: float | None = None,
    width: int | None = None,
) -> Direction:
    own = D_MODEL if model is None else int(model.cfg.d_model)
    fingerprint = "" if model is None else origin_of(model).fingerprint
    return Direction(
        site=parse_site(site),
        vector=scale * draw(width or own, seed=seed),
        resid_norm=resid_norm,
        provenance=Provenance(construction="data", base_fingerprint=fingerprint),
    )


def per_layer(model: Any, stream: str = "resid_post") -> Directions:
    return Directions(
        directions=tuple(
            make_direction(model, f"{stream}.{layer}", seed=layer)
            for layer in range(model.cfg.n_layers)
        )
    )


def project_out(v: torch.Tensor) -> Any:
    """A hook function of the host: v taken out in float64."""
    u = v.double() / v.double().norm()

    def hook(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
        wide = x.double()
        return (wide - (wide @ u)[..., None] * u).to(x.dtype)

    return hook


def run_hooked(model: Any, ids: Any, hooks: Mapping[Any, Any], **settings: Any) -> Any:
    """The forward pass under the host's own hooks."""
    named = [(parse_site(str(site)).hook_name, hook) for site, hook in hooks.items()]
    return model.run_with_hooks(ids, fwd_hooks=named, **settings)


def ablate_writes(model: Any, ids: Any, v: torch.Tensor, **settings: Any) -> Any:
    return run_hooked(model, ids, dict.fromkeys(write_sites(model), project_out(v)), **settings)


def make_batch(*sizes: tuple[int, int], side: Any = "left") -> tuple[list[TokenizedChat], Batch]:
    """Chats of (question, answer) words in one padded batch."""
    tokenizer = make_tokenizer()

    def words(first: int, n: int) -> str:
        return " ".join(f"w{first + i}" for i in range(n))

    chats = [
        tokenize_chat(
            Chat((Message("user", words(5, q)), Message("assistant", words(40, a)))), tokenizer
        )
        for q, a in sizes
    ]
    return chats, pad_batch(chats, range(len(chats)), pad_id=0, side=side)


def count_hooks(model: Any) -> int:
    return sum(
        len(point._forward_hooks) + len(point._forward_pre_hooks)
        for point in model.hook_dict.values()
    )


def close(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> bool:
    """Equal to a share of the largest entry."""
    return float((got - expected).abs().max()) <= relative * float(expected.abs().max())


def enter_and_leave(model: Any, interventions: Any, run: Any = lambda: None) -> None:
    """A whole context, with nothing or something run in it."""
    with intervene(model, interventions):
        run()
