"""LoRA adapters by hooks: permanent on a model of their own, or for a while on some batch rows.

An attached adapter reads what enters the module and adds to the module's output hook point, so
that users' hooks and caches see its effect. Not for embeddings, which only merging supports.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.config import Architecture
from emlens.models.lora import LoraAdapter, architecture_of
from emlens.models.placed import PlacedAdapter, PlacedGroup, place_adapter
from emlens.models.products import add_product, multiply
from emlens.models.views import origin_of, share_model

_ATTACHED: WeakKeyDictionary[HookedTransformer, LoraAdapter] = WeakKeyDictionary()
_PLACED: WeakKeyDictionary[HookedTransformer, PlacedAdapter] = WeakKeyDictionary()
"""The factors that the hooks of an attached adapter hold."""
_ON_ROWS: WeakKeyDictionary[HookedTransformer, int] = WeakKeyDictionary()
"""How many adapters act on some rows of each model's batches."""


def attached_adapter(model: HookedTransformer) -> LoraAdapter | None:
    """Return the adapter attached to a model, if any."""
    return _ATTACHED.get(model)


def placed_on(model: HookedTransformer) -> PlacedAdapter | None:
    """Return the adapter attached to a model as it was placed there, if any."""
    return _PLACED.get(model)


def attach_adapter(model: HookedTransformer, adapter: LoraAdapter) -> HookedTransformer:
    """Return a new model over the same storage with the adapter in permanent hooks.

    ``reset_hooks()`` leaves the adapter in place. The argument stays as it was.

    Raises:
        ValueError: an adapter that does not fit, targets embeddings, or a model that has one.
    """
    if attached_adapter(model) is not None:
        raise ValueError("model already has an adapter attached; attach to its base instead")
    placed = place_adapter(adapter, model)
    shell = share_model(model, name=f"{origin_of(model).name} + {adapter.name}")
    _install(shell, placed, rows=None)
    _ATTACHED[shell], _PLACED[shell] = adapter, placed
    return shell


def hooked_by_user(model: HookedTransformer) -> Iterator[str]:
    """Names of the hook points that carry a hook other than those of an attached adapter."""
    for name, point in model.hook_dict.items():
        hooks = (*point._forward_hooks.values(), *point._forward_pre_hooks.values())
        owners = (getattr(hook, "__self__", None) for hook in hooks)
        if any(not isinstance(owner, _Reader | _Writer) for owner in owners):
            yield name


def is_hooked_by_user(model: HookedTransformer) -> bool:
    """Whether a hook point carries a hook other than those of an attached adapter."""
    return any(True for _ in hooked_by_user(model))


@contextmanager
def adapter_on_rows(
    model: HookedTransformer, adapter: LoraAdapter | PlacedAdapter, rows: slice
) -> Iterator[None]:
    """Apply an adapter to some rows of every batch while the context lasts.

    Writes in place into those rows, so gradients must be off.

    Args:
        model: a base model.
        adapter: an adapter without embedding targets; placed on the model, if it is used again.
        rows: the batch rows it acts on.
    """
    with ExitStack() as stack:
        placed = adapter if isinstance(adapter, PlacedAdapter) else place_adapter(adapter, model)
        for handle in _install(model, placed, rows=rows):
            stack.callback(handle.remove)
        _ON_ROWS[model] = _ON_ROWS.get(model, 0) + 1
        stack.callback(lambda: _ON_ROWS.update({model: _ON_ROWS[model] - 1}))
        yield


def acts_on_rows(model: HookedTransformer) -> bool:
    """Whether an adapter acts on some rows: then rows may neither move nor stand for others."""
    return _ON_ROWS.get(model, 0) > 0


def _follow(factor: Tensor, x: Tensor) -> Tensor:
    """A factor where the activations are by now: ``model.to`` moves parameters, not hooks."""
    if factor.dtype == x.dtype and factor.device == x.device:
        return factor
    with torch.inference_mode(False):  # kept for later passes, which may need gradients
        return factor.to(x.device, x.dtype)


@dataclass
class _Reader:
    """The stacked A of all modules that read one tensor, and what was read in this pass."""

    A: Tensor
    rows: slice | None
    writers: int = 0
    """How many writers take what was read, each once a pass."""
    _read: Tensor | None = field(default=None)
    _taken: int = 0

    def __call__(self, x: Tensor) -> None:
        if self.rows is not None:
            x = x[self.rows]
        self.A = _follow(self.A, x)
        self._read, self._taken = multiply(x, self.A), 0

    def take(self) -> Tensor:
        """What was read in this pass; the last writer leaves nothing behind."""
        read = self._read
        if read is None:
            raise RuntimeError(
                "an attached adapter was asked to write before it read; run whole blocks "
                "(start_at_layer and stop_at_layer are fine, calling a submodule alone is not)"
            )
        self._taken += 1
        if self._taken >= self.writers:
            self._read = None
        return read

    def before_module(self, _module: Any, args: tuple, kwargs: dict) -> None:
        """Read the module's input: the normed residual stream, weight included."""
        x = args[0] if args else kwargs["query_input"]
        if x.ndim != 3:
            raise ValueError(
                "an attached adapter cannot read inputs split by head (use_split_qkv_input or "
                "use_attn_in); load the model with form='merged'"
            )
        self(x)

    def at_point(self, _module: Any, _args: Any, output: Tensor) -> None:
        """Read a hook point's value; heads are flattened."""
        self(output.flatten(2) if output.ndim == 4 else output)


@dataclass(frozen=True)
class _Last:
    """A pre-hook that moves a hook behind all others of its hook point before each pass."""

    point: Any
    handle: Any

    def __call__(self, _module: Any, _args: Any) -> None:
        self.point._forward_hooks.move_to_end(self.handle.id)


@dataclass
class _Writer:
    """Adds (scale * B) u for the columns of u that belong to one module's part."""

    reader: _Reader
    columns: slice
    B: Tensor
    rows: slice | None

    def __call__(self, output: Tensor) -> Tensor:
        u = self.reader.take()
        self.B = _follow(self.B, output)
        flat = u[..., self.columns].flatten(0, -2)
        if self.rows is not None:
            part = output[self.rows].view(-1, self.B.shape[0])
            add_product(part, flat, self.B.mT, in_place=True)
            return output
        out = add_product(output.reshape(-1, self.B.shape[0]), flat, self.B.mT)
        return out.view(output.shape)

    def at_point(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        """Write at a torch forward hook."""
        return self(output)


def _install(model: HookedTransformer, placed: PlacedAdapter, *, rows: slice | None) -> list[Any]:
    """Register readers and writers as torch hooks; returns their handles.

    Torch's own hooks rather than the host's: nothing removes them but their handles. What is
    written joins a hook point's value before any other hook there sees it.
    """
    handles: list[Any] = []
    try:
        for group in placed.groups:
            handles += _install_group(model, group, rows)
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return handles


def _install_group(model: HookedTransformer, group: PlacedGroup, rows: slice | None) -> list[Any]:
    block: Any = model.blocks[group.layer]
    reader = _Reader(group.A, rows)
    if group.reads in ("attn", "mlp"):
        module = getattr(block, group.reads)
        handles = [module.register_forward_pre_hook(reader.before_module, with_kwargs=True)]
    else:
        z = group.reads == "z"
        module, point = (block.attn, block.attn.hook_z) if z else (block.mlp, block.mlp.hook_post)
        handle = point.register_forward_hook(reader.at_point)
        # What a user's hook makes of the value is what the module multiplies: read it last.
        last = module.register_forward_pre_hook(_Last(point, handle))
        handles = [handle, last]
    architecture = architecture_of(model)
    for write in group.writes:
        writer = _Writer(reader, write.columns, write.B, rows)
        reader.writers += 1
        point = write_point(block, write.hook, architecture)
        # First, so that interventions of whoever called see the value with the update.
        handles.append(point.register_forward_hook(writer.at_point, prepend=True))
    return handles


def write_point(block: Any, write: str, architecture: Architecture) -> Any:
    """The module whose output the update joins: before a post-norm, where there is one."""
    if architecture.post_norms and write in ("hook_attn_out", "hook_mlp_out"):
        return block.attn if write == "hook_attn_out" else block.mlp
    return block.get_submodule(write)
