"""Sites: places in a model where activations are read and written, named by stream and layer.

The only place where hook strings are spelt. Do not use it to ask whether one particular model has
a hook point: architectures leave some out, so compare with its `hook_dict` through `check_sites`.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

_RESIDUAL = ("batch", "pos", "d_model")
_QUERY = ("batch", "pos", "n_heads", "d_head")
_KEY = ("batch", "pos", "n_key_value_heads", "d_head")
_HEADS_RESIDUAL = ("batch", "pos", "n_heads", "d_model")
_SCORES = ("batch", "n_heads", "query_pos", "key_pos")
_MLP = ("batch", "pos", "d_mlp")
_SCALE = ("batch", "pos", "1")
_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")

# Stream -> (hook point inside blocks.l, axes). Axes are those at the host's default flags.
_BLOCK: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (f"hook_{name}", _RESIDUAL) for name in ("resid_pre", "resid_mid", "resid_post")},
    **{name: (f"hook_{name}", _RESIDUAL) for name in ("attn_out", "mlp_out", "mlp_in")},
    **{name: (f"hook_{name}", _HEADS_RESIDUAL) for name in ("attn_in", "q_input")},
    **{
        name: (f"hook_{name}", ("batch", "pos", "n_key_value_heads", "d_model"))
        for name in ("k_input", "v_input")
    },
    **{name: (f"attn.hook_{name}", _QUERY) for name in ("q", "z", "rot_q")},
    **{name: (f"attn.hook_{name}", _KEY) for name in ("k", "v", "rot_k")},
    **{name: (f"attn.hook_{name}", _SCORES) for name in ("attn_scores", "pattern")},
    "result": ("attn.hook_result", _HEADS_RESIDUAL),
    **{name: (f"mlp.hook_{name}", _MLP) for name in ("pre", "pre_linear", "post")},
    **{f"{norm}_scale": (f"{norm}.hook_scale", _SCALE) for norm in _NORMS},
    **{f"{norm}_normalized": (f"{norm}.hook_normalized", _RESIDUAL) for norm in _NORMS},
    # The host flattens batch, position and head before it normalises queries and keys.
    **{f"{x}_norm_scale": (f"attn.{x}_norm.hook_scale", ("batch*pos*head", "1")) for x in "qk"},
    **{
        f"{x}_norm_normalized": (f"attn.{x}_norm.hook_normalized", ("batch*pos*head", "d_head"))
        for x in "qk"
    },
}
_OUTSIDE: dict[str, tuple[str, tuple[str, ...]]] = {
    "embed": ("hook_embed", _RESIDUAL),
    "pos_embed": ("hook_pos_embed", _RESIDUAL),
    "ln_final_scale": ("ln_final.hook_scale", _SCALE),
    "ln_final_normalized": ("ln_final.hook_normalized", _RESIDUAL),
    "unembed_in": ("unembed.hook_in", _RESIDUAL),
    "unembed_out": ("unembed.hook_out", ("batch", "pos", "d_vocab")),
}
_STREAMS = _BLOCK | _OUTSIDE
_BLOCK_HOOKS = {hook: stream for stream, (hook, _) in _BLOCK.items()}
_OUTSIDE_HOOKS = {hook: stream for stream, (hook, _) in _OUTSIDE.items()}

_HOOK_NAME = re.compile(r"blocks\.([^.]*)\.(.+)")
_LAYER = re.compile(r"0|[1-9][0-9]*", re.ASCII)


class SiteError(ValueError):
    """A site that does not exist: unknown stream, missing layer, or layer out of range."""


@runtime_checkable
class SiteConfig(Protocol):
    """The sizes of a model that a site's width depends on, by TransformerLens's names."""

    @property
    def n_layers(self) -> int: ...  # noqa: D102
    @property
    def d_model(self) -> int: ...  # noqa: D102
    @property
    def n_heads(self) -> int: ...  # noqa: D102
    @property
    def d_head(self) -> int: ...  # noqa: D102
    @property
    def d_mlp(self) -> int | None: ...  # noqa: D102
    @property
    def d_vocab(self) -> int: ...  # noqa: D102
    @property
    def n_key_value_heads(self) -> int | None: ...  # noqa: D102


@dataclass(frozen=True)
class Site:
    """One hook point: a stream, and the block it lies in (None outside the blocks).

    Raises:
        SiteError: an unknown stream, a layer where there is none, or none where there must be one.
    """

    layer: int | None
    """Block, counted from 0: `resid_post.l` is Hugging Face's `hidden_states[l + 1]`."""
    stream: str
    """Name of the activation, such as `resid_post` or `ln1_normalized`."""

    def __post_init__(self) -> None:
        if self.stream not in _STREAMS:
            raise SiteError(_unknown(self.stream, _STREAMS))
        if self.stream in _OUTSIDE:
            if self.layer is not None:
                raise SiteError(
                    f"site: {self.stream} lies outside the blocks and takes no layer, "
                    f"got layer {self.layer}; write {self.stream!r}"
                )
        elif self.layer is None:
            raise SiteError(f"site: {self.stream} needs a layer, as in '{self.stream}.0'")
        elif self.layer < 0:
            raise SiteError(
                f"site: layer {self.layer} of {self.stream} is negative; layers count from 0"
            )

    def __str__(self) -> str:
        return self.stream if self.layer is None else f"{self.stream}.{self.layer}"

    @property
    def hook_name(self) -> str:
        """TransformerLens's name of the hook point, such as `blocks.24.hook_resid_post`."""
        hook = _STREAMS[self.stream][0]
        return hook if self.layer is None else f"blocks.{self.layer}.{hook}"

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of the activation; sizes carry the name of their `cfg` field."""
        return _STREAMS[self.stream][1]

    @property
    def is_positional(self) -> bool:
        """Whether the activation has one vector (or one per head) for each position."""
        return self.axes[:2] == ("batch", "pos")

    def shape(self, cfg: SiteConfig) -> tuple[int, ...]:
        """Return the sizes of the axes after `batch, pos`, such as `(n_heads, d_head)`.

        Raises:
            SiteError: attention scores and patterns, whose size grows with the text, or an MLP
                site of a model without MLPs.
        """
        named = self.axes[2:] if self.is_positional else self.axes[1:]
        return tuple(self._size(axis, cfg) for axis in named)

    def width(self, cfg: SiteConfig) -> int:
        """Return the number of values at one position, heads counted together.

        Raises:
            SiteError: see `shape`.
        """
        return prod(self.shape(cfg))

    def _size(self, axis: str, cfg: SiteConfig) -> int:
        if axis == "1":
            return 1
        if axis in ("query_pos", "key_pos"):
            raise SiteError(
                f"site: {self} has axes {self.axes}, which grow with the text: it has no width"
            )
        if axis == "n_key_value_heads" and cfg.n_key_value_heads is None:
            return cfg.n_heads  # the host's way to say: as many as there are query heads
        size = getattr(cfg, axis)
        if size is None:
            raise SiteError(
                f"site: {self} has the axis {axis}, but this model's cfg.{axis} is None"
            )
        return size


def parse_site(text: str) -> Site:
    """Read `resid_post.24`, `blocks.24.hook_resid_post`, `embed` or `hook_embed`.

    Raises:
        SiteError: an unknown stream or hook name (the nearest three are listed), or a layer that
            is missing, superfluous or not a plain number.
    """
    if text in _OUTSIDE_HOOKS:
        return Site(None, _OUTSIDE_HOOKS[text])
    if match := _HOOK_NAME.fullmatch(text):
        number, hook = match.groups()
        layer = _parse_layer(number, text)
        if hook not in _BLOCK_HOOKS:
            raise SiteError(_unknown(text, [f"blocks.{layer}.{name}" for name in _BLOCK_HOOKS]))
        return Site(layer, _BLOCK_HOOKS[hook])
    stream, dot, number = text.partition(".")
    if stream not in _STREAMS:
        known = [f"{name}{dot}{number}" for name in _STREAMS] + [*_OUTSIDE_HOOKS]
        raise SiteError(_unknown(text, known))
    return Site(_parse_layer(number, text) if dot else None, stream)


def expand_sites(sites: str | Site | Sequence[str | Site], cfg: SiteConfig) -> tuple[Site, ...]:
    """Return the sites asked for, in the order asked for; a bare stream is every layer of it.

    A site named twice (`["resid_post", "resid_post.3"]`) is kept once, at its first place.

    Raises:
        SiteError: see `parse_site`; a layer that the model does not have; no site at all.
    """
    items = [sites] if isinstance(sites, str | Site) else list(sites)
    if not items:
        raise SiteError("sites: got an empty list; expected at least one, such as 'resid_post'")
    found: dict[Site, None] = {}
    for item in items:
        for site in _expand_one(item, cfg.n_layers):
            if site.layer is not None and site.layer >= cfg.n_layers:
                raise SiteError(
                    f"sites: {site} is out of range: the model has {cfg.n_layers} layers, "
                    f"0 to {cfg.n_layers - 1}"
                )
            found[site] = None
    return tuple(found)


def check_sites(sites: Sequence[Site], hook_names: Collection[str]) -> None:
    """Check that a model has the sites, given the keys of its `hook_dict`.

    Raises:
        SiteError: a site whose hook point this model lacks; the nearest three it has are listed.
    """
    for site in sites:
        if site.hook_name not in hook_names:
            raise SiteError(
                f"sites: this model has no {site}; " + _unknown(site.hook_name, hook_names)
            )


def block_of(hook_name: str) -> int | None:
    """Return the block that a hook point lies in: -1 before the first, None after the last.

    Args:
        hook_name: any key of a model's `hook_dict`.
    """
    if match := _HOOK_NAME.fullmatch(hook_name):
        return int(match[1])
    return -1 if _OUTSIDE_HOOKS.get(hook_name) in ("embed", "pos_embed") else None


def _expand_one(item: str | Site, n_layers: int) -> list[Site]:
    if isinstance(item, Site):
        return [item]
    if item in _BLOCK:
        return [Site(layer, item) for layer in range(n_layers)]
    return [parse_site(item)]


def _parse_layer(number: str, text: str) -> int:
    if not _LAYER.fullmatch(number):
        raise SiteError(
            f"site: {text!r} has the layer {number!r}; expected a whole number counted from 0"
        )
    return int(number)


def _unknown(text: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(text, list(known), n=3, cutoff=0.0)
    return f"site: {text!r} is not known; nearest: {', '.join(near)}"
