"""What did one or several fine-tunes of a base change? Proof, comparison and null band of each.

It writes a run folder that the same call goes on with. For one pair in memory, and nothing on disk,
use `emlens.compare_models`.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from emlens.artifacts import Result
from emlens.data import Batching, Chat, parse_positions
from emlens.diffing import ModelDiff, NullBand, compare_models, compare_nulls
from emlens.models.adapter_files import load_adapter
from emlens.models.loading import load_base
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.memory import read_sizes
from emlens.models.pair import ModelPair, is_adapter, load_pair
from emlens.models.proof import AdapterProof
from emlens.models.source_hash import hash_source
from emlens.organisms.training import hash_chats
from emlens.runs import RunFolder
from emlens.sites import expand_sites
from emlens.sources import Source

logger = logging.getLogger(__name__)

SourceLike = str | Path | Source


@dataclass(frozen=True, kw_only=True)
class DiffSettings:
    """What is compared, and how.

    Raises:
        ValueError: a number below 0.
    """

    sites: tuple[str, ...] = ("resid_post",)
    """Streams and sites, in the grammar of `emlens.sites`."""
    positions: tuple[str, ...] | None = None
    """Named positions; None is `response` where every chat has one, else `all`."""
    examples: int = 20
    """Chats kept token by token."""
    nulls: int = 0
    """Random adapters in the null band; 0 leaves it out."""
    seed: int = 0
    """Of the first of them."""
    scale: float | dict[str, float] = 1.0
    """Factor on the strength of the adapters, as a whole or by module."""
    dtype: str = "auto"
    """Of the weights; `auto` is the checkpoint's own."""

    def __post_init__(self) -> None:
        for name in ("examples", "nulls"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class DiffRun(Result):
    """A base and its fine-tunes compared; one entry of each list a fine-tune."""

    kind: ClassVar[str] = "diff_run"

    run: str
    """Run folder."""
    tuned: tuple[str, ...]
    proofs: tuple[AdapterProof | None, ...]
    """None for a full checkpoint."""
    diffs: tuple[ModelDiff, ...]
    nulls: tuple[NullBand | None, ...]

    def results(self) -> list[Result]:
        """Everything in the order of a report: proof, comparison, null band of each."""
        groups = zip(self.proofs, self.diffs, self.nulls, strict=True)
        return [result for group in groups for result in group if result is not None]

    def rows(self) -> list[dict[str, Any]]:
        """One row a fine-tune."""
        return [
            {
                "tuned": name,
                "kl_base_tuned": diff.logits.kl_base_tuned,
                "kl_tuned_base": diff.logits.kl_tuned_base,
                "agreement": diff.logits.agreement,
                "first_differing_site": diff.activations.first_differing_site,
                "largest_relative_rms": float(diff.activations.relative_rms.max()),
                "null_kl_high": None if band is None else float(band.kl_base_tuned.max()),
            }
            for name, diff, band in zip(self.tuned, self.diffs, self.nulls, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class DiffPlan:
    """All that decides what a run computes; what is written into its manifest."""

    kind: str
    base: str
    base_files: str
    """`hash_source`."""
    tuned: tuple[str, ...]
    tuned_files: tuple[str, ...]
    prompts_sha256: str
    n_chats: int
    settings: DiffSettings


def plan_diff(
    base: SourceLike,
    tuned: Sequence[SourceLike],
    chats: Sequence[Chat],
    *,
    settings: DiffSettings,
) -> DiffPlan:
    """Check what can be checked without a model, and write down what a run would do.

    Raises:
        ValueError: no fine-tune, no chat, an unknown position; a null band or a scale for a
            fine-tune that is no adapter.
        SiteError: a site that the base does not have.
        SourceError: a source that cannot be found.
    """
    if not tuned:
        raise ValueError("tuned: got none, expected at least one fine-tune")
    if not chats:
        raise ValueError("chats: got none, expected at least one")
    chosen = settings.positions or default_positions(chats)
    for name in chosen:
        parse_positions(name)
    expand_sites(settings.sites, read_sizes(base))
    for source in tuned:
        _check_tuned(source, settings)
    return DiffPlan(
        kind=DiffRun.kind,
        base=str(base),
        base_files=hash_source(base),
        tuned=tuple(str(source) for source in tuned),
        tuned_files=tuple(hash_source(source) for source in tuned),
        prompts_sha256=hash_chats(chats),
        n_chats=len(chats),
        settings=dataclasses.replace(settings, positions=chosen),
    )


def default_positions(chats: Sequence[Chat]) -> tuple[str, ...]:
    """`response` where every chat has one, else `all`."""
    return ("response",) if all(chat.response is not None for chat in chats) else ("all",)


def diff_finetunes(
    base: SourceLike,
    tuned: Sequence[SourceLike],
    chats: Sequence[Chat],
    *,
    settings: DiffSettings,
    out: str | Path,
    device: str | torch.device = "auto",
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> DiffRun:
    """Compare a base with each of its fine-tunes, over one copy of the base's weights.

    The same call on the same `out` goes on: what is finished is read, not computed again.

    Args:
        base: the base's source.
        tuned: adapters or full checkpoints.
        chats: read by all models alike.
        settings: what is compared.
        out: run folder.
        device: where the weights go; it may change between calls.
        batching: tokens run at once; it may change between calls.

    Raises:
        PlanChangedError: `out` holds a run of another plan.
        ValueError: see `plan_diff` and `compare_models`.
        AdapterNotInEffectError: an adapter is not what the tuned model computes.
    """
    plan = plan_diff(base, tuned, chats, settings=settings)
    run = RunFolder.start(out, vars(plan))
    loaded: Any = None
    for index, source in enumerate(tuned, start=1):
        if all(run.has_result(name) for name in _names(index, source, plan.settings)):
            logger.info("%s: %s is finished, read as it is", run.path, source)
            continue
        loaded = loaded or load_base(base, dtype=plan.settings.dtype, device=device)
        pair = load_pair(loaded, _read_tuned(source, plan.settings))
        _compare(pair, chats, index, run=run, settings=plan.settings, batching=batching)
    return _read_run(run, plan)


def _compare(
    pair: ModelPair,
    chats: Sequence[Chat],
    index: int,
    *,
    run: RunFolder,
    settings: DiffSettings,
    batching: Batching,
) -> None:
    where: dict[str, Any] = {
        "sites": list(settings.sites),
        "positions": list(settings.positions or ()),
        "batching": batching,
    }
    if pair.proof is not None:
        run.save_result(_name(index, "proof"), pair.proof)
    if not run.has_result(_name(index, "diff")):
        diff = compare_models(pair, chats, examples=settings.examples, **where)
        run.save_result(_name(index, "diff"), diff)
    if settings.nulls and not run.has_result(_name(index, "nulls")):
        band = compare_nulls(pair, chats, n=settings.nulls, seed=settings.seed, **where)
        run.save_result(_name(index, "nulls"), band)


def _read_run(run: RunFolder, plan: DiffPlan) -> DiffRun:
    def read(name: str, cls: Any) -> Any:
        return run.read_result(name, cls) if run.has_result(name) else None

    numbers = range(1, len(plan.tuned) + 1)
    return DiffRun(
        run=str(run.path),
        tuned=plan.tuned,
        proofs=tuple(read(_name(i, "proof"), AdapterProof) for i in numbers),
        diffs=tuple(run.read_result(_name(i, "diff"), ModelDiff) for i in numbers),
        nulls=tuple(read(_name(i, "nulls"), NullBand) for i in numbers),
    )


def _name(index: int, part: str) -> str:
    """Sorted by name, a null band follows the comparison that it belongs to."""
    return f"{index:02d}_{part}"


def _names(index: int, source: SourceLike, settings: DiffSettings) -> list[str]:
    names = [_name(index, "diff")]
    names += [_name(index, "proof")] if is_adapter(source) else []
    return names + ([_name(index, "nulls")] if settings.nulls else [])


def _check_tuned(source: SourceLike, settings: DiffSettings) -> None:
    if is_adapter(source):
        _read_tuned(source, settings)
    elif settings.nulls:
        raise ValueError(f"nulls: {source} is no adapter, so there are no shapes to draw from")
    elif settings.scale != 1.0:
        raise ValueError(f"scale: {source} is no adapter, its strength cannot be scaled")


def _read_tuned(source: SourceLike, settings: DiffSettings) -> SourceLike | LoraAdapter:
    if not is_adapter(source):
        return source
    adapter = load_adapter(source)
    return adapter if settings.scale == 1.0 else scale_adapter(adapter, settings.scale)
