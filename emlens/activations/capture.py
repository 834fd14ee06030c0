"""Activations themselves, in safetensors shards on disk, one a batch; resumable and read lazily.

They are large: a token takes d_model values a site. Where a mean or a variance will do, stream it.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.activations.reading import (
    ReadingPlan,
    Selection,
    SitesLike,
    plan_reading,
    require_one,
)
from emlens.activations.shard_writer import ShardWriter
from emlens.data import Batching, Chat, Positions, PositionsError, parse_positions
from emlens.encoding import ArtifactError
from emlens.models.acting import describe_acting
from emlens.models.identity import foreign_hooks, identify_model
from emlens.models.pair import ModelPair
from emlens.models.reading import Readable
from emlens.runs import PlanChangedError, RunFolder
from emlens.sites import Site, SiteError, parse_site

_TASK = "capture_activations"
_FOLDER = "shards"
_ROWS = "rows"
"""Name of the tensor [n 2] with the chat and the token of every row of a shard."""


@dataclass(frozen=True)
class ActivationShards:
    """Captured activations in a folder, opened without reading them.

    Rows are numbered through all shards, in the order in which batches were run. A row is one token
    of one chat.
    """

    folder: Path
    """The run folder."""
    plan: dict[str, Any] = field(repr=False)
    """What was captured, as the manifest says."""

    @classmethod
    def open(cls, folder: str | Path) -> "ActivationShards":
        """Open what `capture_activations` wrote.

        Raises:
            ArtifactError: the folder holds something else, or the capture was not finished.
        """
        run = RunFolder.open(folder)
        if run.plan.get("task") != _TASK:
            raise ArtifactError(f"{folder} holds no captured activations, but another run")
        shards = cls(Path(folder), dict(run.plan))
        missing = [
            index for index in range(shards.n_shards) if not shards.shard_path(index).exists()
        ]
        if missing:
            raise ArtifactError(
                f"{folder} lacks {len(missing)} of {shards.n_shards} shards, the first is "
                f"{shards.shard_path(missing[0]).name}: run the same capture again to finish it"
            )
        return shards

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where was captured."""
        return tuple(parse_site(site) for site in self.plan["sites"])

    @property
    def streams(self) -> tuple[str, ...]:
        """`model`; of a pair `base` and `tuned`."""
        return tuple(self.plan["streams"])

    @property
    def n_shards(self) -> int:
        """Number of files."""
        return len(self.plan["shard_rows"])

    @property
    def n_rows(self) -> int:
        """Number of tokens captured."""
        return sum(self.plan["shard_rows"])

    def __len__(self) -> int:
        return self.n_rows

    @cached_property
    def index(self) -> Int[Tensor, "n 2"]:
        """Chat (as an index in what was captured) and token (in its unpadded ids) of every row."""
        return torch.cat([self._tensor(shard, _ROWS) for shard in range(self.n_shards)])

    def shard_path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / _FOLDER / f"{shard:06d}.safetensors"

    def batches(
        self, site: str | Site, *, stream: str | None = None
    ) -> Iterator[Float[Tensor, "n d"]]:
        """Yield the activations of one shard after another, in the dtype they were captured in.

        Args:
            site: one of the sites captured.
            stream: `base` or `tuned` of a pair; may be left out for one model.

        Raises:
            SiteError: a site that was not captured.
            ValueError: a stream that was not captured, or none where there are two.
        """
        name = self._name(site, stream)
        return (self._tensor(shard, name) for shard in range(self.n_shards))

    def read_shard(
        self, shard: int, site: str | Site, *, stream: str | None = None
    ) -> Float[Tensor, "n d"]:
        """Read all rows of one shard; arguments and errors as for `batches`."""
        return self._tensor(shard, self._name(site, stream))

    def read(
        self, site: str | Site, rows: Sequence[int] | slice, *, stream: str | None = None
    ) -> Float[Tensor, "n d"]:
        """Read some rows, from the shards they lie in and no other; arguments as for `batches`.

        Raises:
            IndexError: a row that does not exist.
        """
        name = self._name(site, stream)
        wanted = list(range(self.n_rows)[rows]) if isinstance(rows, slice) else list(rows)
        if bad := [row for row in wanted if not 0 <= row < self.n_rows]:
            raise IndexError(f"rows: {bad[0]} does not exist, there are {self.n_rows}")
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(wanted):
            shard, first = self._locate(row)
            by_shard.setdefault(shard, []).append((place, row - first))
        # An empty read takes its width and dtype from the first shard.
        parts = [self._rows(shard, name, [i for _, i in p]) for shard, p in by_shard.items()]
        found = torch.cat(parts or [self._rows(0, name, [])])
        places = torch.tensor(
            [place for p in by_shard.values() for place, _ in p], dtype=torch.long
        )
        return found[places.argsort()]

    def _locate(self, row: int) -> tuple[int, int]:
        """The shard of a row, and that shard's first row."""
        starts = [0, *accumulate(self.plan["shard_rows"])]
        shard = next(k for k in range(self.n_shards) if row < starts[k + 1])
        return shard, starts[shard]

    def _name(self, site: str | Site, stream: str | None) -> str:
        wanted = parse_site(site) if isinstance(site, str) else site
        if wanted not in self.sites:
            raise SiteError(
                f"site: {wanted} was not captured; captured are {', '.join(self.plan['sites'])}"
            )
        if stream is None and len(self.streams) == 1:
            stream = self.streams[0]
        if stream is None or stream not in self.streams:
            raise ValueError(f"stream: got {stream!r}, expected one of {list(self.streams)}")
        return _tensor_name(stream, wanted)

    def _tensor(self, shard: int, name: str) -> Tensor:
        with self._opened(shard) as file:
            return file.get_tensor(name)

    def _rows(self, shard: int, name: str, rows: list[int]) -> Tensor:
        """Some rows of a shard, read as the one span that holds them."""
        low, high = (min(rows), max(rows) + 1) if rows else (0, 0)
        with self._opened(shard) as file:
            span = file.get_slice(name)[low:high]
        return span[torch.tensor(rows, dtype=torch.long) - low]

    def _opened(self, shard: int) -> Any:
        try:
            return safetensors.safe_open(self.shard_path(shard), "pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.shard_path(shard)} cannot be read: {error}") from error


def capture_activations(
    model: Readable,
    chats: Sequence[Chat | str],
    *,
    sites: SitesLike,
    positions: str,
    out: str | Path,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> ActivationShards:
    """Write the activations of every selected token to disk; the same call again resumes.

    One shard holds one batch at all sites, in the models' dtype, and appears whole or not at all.
    It is written while the next batch runs: a kill loses at most these two, an error only the one
    that was running. Under interventions a batch that is
    kept already may run once more, so that each is seen to act in this call too.

    Args:
        model: one model, or a pair: then base and tuned are written.
        chats: prompts (str) or chats.
        sites: where; widths may differ.
        positions: which tokens.
        out: folder, new or of the same capture.
        batching: tokens run at once, both models of a pair counted: also the size of a shard.

    Raises:
        PlanChangedError: the folder holds a capture of other models, interventions, texts, sites or
            positions; or shards made under hooks that are no interventions, which no plan can tell
            from others.
        ValueError: no tokenizer, several positions, or some that a chat does not have.
    """
    one = require_one(positions)
    plan = plan_reading(model, chats, sites=sites, positions=one, batching=batching)
    run = RunFolder.start(out, _describe(plan))
    shards = ActivationShards(run.path, dict(run.plan))
    for stray in (run.path / _FOLDER).glob(".*.tmp"):  # of a run that was killed while writing
        stray.unlink(missing_ok=True)
    done = next(
        (k for k in range(shards.n_shards) if not shards.shard_path(k).exists()), shards.n_shards
    )
    if done:
        _refuse_hooks(plan, run.path)
    _write_shards(plan, shards, range(done, shards.n_shards))
    if again := _list_again(plan, done):
        list(plan.read(_look_away, "acting once more (tokens)", chosen=again))
    return ActivationShards.open(run.path)


def _write_shards(plan: ReadingPlan, shards: ActivationShards, todo: range) -> None:
    held: dict[str, Tensor] = {}

    def keep(site: Site, x: Tensor, chosen: tuple[Selection, ...]) -> None:
        for stream, values in zip(shards.streams, chosen[0].take(x), strict=True):
            # All tokens of a batch are a view of what the model goes on with.
            own = values.clone() if chosen[0].covers_batch else values
            held[_tensor_name(stream, site)] = writer.bring(own)

    with ShardWriter() as writer:
        ran = plan.read(keep, "capturing (tokens)", chosen=todo)
        for shard, chosen in zip(todo, ran, strict=True):
            held[_ROWS] = torch.stack([chosen[0].rows, chosen[0].tokens], dim=1)
            writer.write(shards.shard_path(shard), held)
            held.clear()


def _look_away(_site: Site, _x: Tensor, _chosen: tuple[Selection, ...]) -> None:
    """For batches that are run for their interventions' sake."""


def _list_again(plan: ReadingPlan, done: int) -> list[int]:
    """Batches that are kept already and run once more, so that whatever acts now has acted.

    For each positions of what acts, one that has such a token, unless a batch still to be made has.
    """
    acting = [one for model in _models_of(plan).values() for one in describe_acting(model)]
    again: set[int] = set()
    for named in dict.fromkeys(str(one.get("positions", "all")) for one in acting):
        positions = parse_positions(named)
        meets = (k for k in reversed(range(len(plan.batches))) if _meets(plan, k, positions))
        # The last ones are the shortest, and those still to be made.
        found = next(meets, len(plan.batches) - 1)
        if found < done:
            again.add(found)
    return sorted(again)


def _meets(plan: ReadingPlan, batch: int, positions: Positions) -> bool:
    """Whether a batch has a token that positions name."""
    for row in plan.batches[batch]:
        with suppress(PositionsError):
            if bool(positions.mask(plan.tokenized[row]).any()):
                return True
    return False


def _tensor_name(stream: str, site: Site) -> str:
    return f"{stream}/{site}"


def _describe(plan: ReadingPlan) -> dict[str, Any]:
    """Everything that decides what is captured, and where each row comes to lie."""
    models = _models_of(plan)
    (position,) = plan.positions
    return {
        "task": _TASK,
        "streams": list(models),
        "models": {stream: _identify(model) for stream, model in models.items()},
        "hooked": any(any(foreign_hooks(model)) for model in models.values()),
        "sites": [str(site) for site in plan.sites],
        "positions": str(position),
        "chats": _hash_ids(plan),
        "batch_tokens": plan.batching.tokens,
        "shard_rows": [plan.count_tokens(position, rows) for rows in plan.batches],
    }


def _models_of(plan: ReadingPlan) -> dict[str, Any]:
    """The models by the names of their streams."""
    pair = plan.model if isinstance(plan.model, ModelPair) else None
    return {"base": pair.base, "tuned": pair.tuned} if pair else {"model": plan.model}


def _identify(model: Any) -> dict[str, Any]:
    """What a model computes with; where it was loaded from decides nothing."""
    found = dataclasses.asdict(identify_model(model))
    del found["name"]
    return found | {"interventions": describe_acting(model)}


def _refuse_hooks(plan: ReadingPlan, folder: Path) -> None:
    """Refuse to add shards to others, or to hand them out, where none can say what made them."""
    for model in _models_of(plan).values():
        if hooked := list(foreign_hooks(model)):
            raise PlanChangedError(
                f"{folder} holds shards already, and the model has hooks that are no "
                f"interventions, at {', '.join(hooked[:3])}: whether those made them cannot be "
                "told. Give a new folder, or write the hooks as interventions"
            )


def _hash_ids(plan: ReadingPlan) -> str:
    digest = hashlib.sha256()
    for chat in plan.tokenized:
        digest.update(f"{len(chat.ids)} {chat.prompt_end} {chat.response}\0".encode())
        digest.update(chat.ids.numpy().tobytes())
    return digest.hexdigest()[:32]
