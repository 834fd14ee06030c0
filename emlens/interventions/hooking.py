"""Interventions on a model while a context lasts; for the same effect as weights see `fold`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emlens.data import Positions, PositionsError
from emlens.interventions.active import active_interventions, register_active
from emlens.interventions.intervention import EVERYWHERE, Intervention
from emlens.interventions.operators import Cap, Operator, Replace, Shift, unit
from emlens.interventions.plan import Fused, SitePlan, plan_interventions
from emlens.models.hooks import HookNeverFiredError
from emlens.models.protocol import HookedModel
from emlens.models.tokens_in_flight import TokensInFlight, select_positions, tokens_in_flight
from emlens.numerics.affine import LowRankAffine
from emlens.numerics.validation import WidthError
from emlens.sites import Site, block_of

Change = Callable[[Tensor, Tensor | None], Tensor]
"""(values [batch pos d], mask [batch pos] or None for all) -> values."""


class PositionsNeverMetError(HookNeverFiredError):
    """Positions that named no token of any pass."""


@contextmanager
def intervene(model: HookedModel, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Change a model's activations while the context lasts, however it ends.

    Affine operators next to each other in the list that meet at one site on the same tokens are one
    low-rank map there. Interventions at one site act in the order given, a nested context's after
    the outer one's, and all of them see an attached adapter's update. Hooks registered inside see
    what they leave.

    Named positions other than `all` need to know which tokens a pass holds: every function of
    emlens that runs chats says so, a bare `model(ids)` does not. `all` acts on every column.

    Args:
        model: a model loaded by emlens, with or without an adapter.
        interventions: in the order in which they act where they meet; none is allowed.

    Raises:
        SiteError: a site the model does not have, that has no vector for each token, or whose axes
            are not those of the site that the vector was made at.
        WidthError: a vector of another width than its site.
        OtherModelError: a vector made from another model, fine-tune, tokenizer or processing.
        ContradictoryInterventionsError: on tokens they may share, those of contexts around this one
            included: a replacement beside anything else, one vector moved toward different values,
            or caps that leave no value between them.
        HookNeverFiredError: on a clean exit: a site was never reached, or no token was ever
            selected by an intervention's positions (PositionsNeverMetError).
    """
    plans = plan_interventions(model, interventions)
    around = active_interventions(model)
    if around and plans:
        plan_interventions(model, (*around, *interventions))  # for its refusals
    selection = _Selection(model)
    make = _Changes(model)
    changes = [_SiteChange(site, make.steps(plan), selection) for site, plan in plans.items()]
    with ExitStack() as stack:
        for change in changes:
            point = model.hook_dict[change.site.hook_name]
            # Torch's own hook: nothing but its handle removes it, `reset_hooks` included.
            stack.callback(point.register_forward_hook(change).remove)
        stack.enter_context(register_active(model, interventions))
        yield
    _check_fired(changes, selection)


def _check_fired(changes: Sequence["_SiteChange"], selection: "_Selection") -> None:
    silent = [str(change.site) for change in changes if not change.fired]
    if silent:
        raise HookNeverFiredError(
            f"interventions never reached at: {', '.join(silent[:5])}; no forward pass was run in "
            "the context, it stopped before them, or the model does not use them"
        )
    idle = [str(positions) for positions, acted in selection.acted.items() if not bool(acted)]
    if idle:
        raise PositionsNeverMetError(
            f"interventions at the positions {', '.join(idle)} met no such token in any forward "
            "pass, so they changed nothing"
        )


class _Selection:
    """Masks of the tokens in flight, made once a pass and shared by all sites."""

    def __init__(self, model: Any):
        self.model = model
        self.tokens: TokensInFlight | None = None
        self.masks: dict[Positions, Tensor] = {}
        self.acted: dict[Positions, Tensor] = {}

    def mask(self, positions: Positions, site: Site) -> Tensor:
        """Where to act at a site [batch pos]."""
        tokens = tokens_in_flight(self.model)
        if tokens is None and block_of(site.hook_name) is None:
            raise PositionsError(
                f"positions: {positions} cannot be told at {site}: what comes after the last block "
                "is computed for chosen tokens only (in generation, for the last of each row), and "
                f"nothing says which. Act at resid_post.{self.model.cfg.n_layers - 1}, or use "
                "positions='all'"
            )
        if tokens is None:
            raise PositionsError(
                f"positions: {positions} cannot be told under a bare model(ids): run chats "
                "through emlens (generate_responses, stream_activations, compare_models), say "
                "which tokens these are with publish_tokens(model, frame_batch(batch, chats)), "
                "or use positions='all'"
            )
        if tokens is not self.tokens:
            self.tokens, self.masks = tokens, {}
        if positions not in self.masks:
            mask = select_positions(tokens, positions)
            self.masks[positions] = mask
            # Kept as a tensor: asking for the answer now would wait for the device.
            before = self.acted.get(positions)
            self.acted[positions] = mask.any() if before is None else before | mask.any()
        return self.masks[positions]


@dataclass(eq=False)
class _SiteChange:
    """A torch forward hook that applies the steps of one site; it runs at every step of decoding.

    A step without positions acts on every column, and asks nobody which tokens those are.
    """

    site: Site
    steps: list[tuple[Change, Positions | None]]
    selection: _Selection
    fired: bool = field(default=False)

    def __call__(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        self.fired = True
        values = output if output.ndim == 3 else output.flatten(2)
        for change, positions in self.steps:
            values = change(values, None if positions is None else self._mask(positions, values))
        return values if output.ndim == 3 else values.view(output.shape)

    def _mask(self, positions: Positions, values: Tensor) -> Tensor:
        mask = self.selection.mask(positions, self.site)
        if mask.shape != values.shape[:2]:
            raise WidthError(
                f"interventions: {self.site} holds {tuple(values.shape[:2])} values [batch pos], "
                f"but the tokens published for this pass are {tuple(mask.shape)}; positions "
                f"{positions} cannot be told there"
            )
        return mask


class _Changes:
    """Makes what the hooks call; sites that do the same share one map."""

    def __init__(self, model: Any):
        self.model = model
        self.fused: Fused = {}
        self.moved: dict[int, LowRankAffine] = {}

    def steps(self, plan: SitePlan) -> list[tuple[Change, Positions | None]]:
        """What happens at a site, on which tokens; None for every column."""
        return [
            (self._change(step.does), None if step.positions == EVERYWHERE else step.positions)
            for step in plan.steps(self.fused)
        ]

    def _change(self, does: LowRankAffine | Operator) -> Change:
        if isinstance(does, LowRankAffine):
            if id(does) not in self.moved:
                # In the precision it is used in, once: half precision is computed in float32.
                wide = torch.promote_types(self.model.cfg.dtype, torch.float32)
                self.moved[id(does)] = does.to(self.model.embed.W_E.device, wide)
            return self.moved[id(does)].apply
        if isinstance(does, Cap):
            return _CapChange(does)
        if isinstance(does, Shift):
            return _ShiftChange(does)
        assert isinstance(does, Replace)
        return _ReplaceChange(does, self.model)


class _CapChange:
    def __init__(self, cap: Cap):
        self.unit, self.threshold = unit(cap.vector), cap.threshold
        self.sign = 1.0 if cap.side == "above" else -1.0

    def __call__(self, values: Tensor, mask: Tensor | None) -> Tensor:
        wide = torch.promote_types(values.dtype, torch.float32)
        self.unit = self.unit.to(values.device, wide)
        flat = values.reshape(-1, values.shape[-1]).to(wide)
        excess = torch.relu(self.sign * (flat.mv(self.unit) - self.threshold))
        if mask is not None:
            excess = excess * mask.flatten()
        out = torch.addr(flat, -self.sign * excess, self.unit)
        return out.to(values.dtype).view(values.shape)


class _ShiftChange:
    def __init__(self, shift: Shift):
        self.vector, self.amount = shift.vector, shift.amount

    def __call__(self, values: Tensor, mask: Tensor | None) -> Tensor:
        wide = torch.promote_types(values.dtype, torch.float32)
        self.vector = self.vector.to(values.device, wide)
        flat = values.reshape(-1, values.shape[-1]).to(wide)
        if mask is None:
            amount = self._measure(flat)
        else:
            # Others are not looked at: where an activation is extreme, as that of a first token,
            # there may be no such number.
            amount = flat.new_zeros(len(flat))
            chosen = mask.flatten().nonzero()[:, 0]
            if len(chosen):
                amount = amount.index_copy(0, chosen, self._measure(flat[chosen]))
        return torch.addr(flat, amount, self.vector).to(values.dtype).view(values.shape)

    def _measure(self, values: Tensor) -> Tensor:
        amount = self.amount(values).to(values)
        if amount.shape != values.shape[:1]:
            raise WidthError(
                f"amount: it gave {tuple(amount.shape)} for {len(values)} values, expected "
                f"[{len(values)}], one number each"
            )
        return amount


class _ReplaceChange:
    def __init__(self, replace: Replace, model: Any):
        self.values, self.model = replace.values, model

    def __call__(self, values: Tensor, mask: Tensor | None) -> Tensor:
        self.values = self.values.to(values.device, values.dtype)
        new = self.values if self.values.ndim == 1 else self._look_up(values, mask)
        if mask is None:
            return new.expand_as(values).clone()
        return torch.where(mask[..., None], new, values)

    def _look_up(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """Each token's own value, by its row in the run and its index in the row's text."""
        tokens = tokens_in_flight(self.model)
        if tokens is None:
            if self.values.shape[:2] != values.shape[:2]:
                raise WidthError(
                    f"values: {tuple(self.values.shape[:2])} [rows text] for a pass of "
                    f"{tuple(values.shape[:2])}; under a bare model(ids) both must be equal"
                )
            return self.values
        rows = tokens.rows.to(values.device)[:, None]
        present = tokens.absolute >= 0
        asked = present if mask is None else mask
        missing = asked & ((tokens.absolute >= self.values.shape[1]) | (rows >= len(self.values)))
        if bool(missing.any()):
            raise WidthError(
                f"values: {tuple(self.values.shape[:2])} [rows text] do not reach every token "
                "that is to be replaced; name fewer positions, or capture longer texts"
            )
        at = tokens.absolute.clamp(0, self.values.shape[1] - 1)
        found = self.values[rows.clamp(max=len(self.values) - 1), at]
        return torch.where(present[..., None], found, values)
