"""How do several fine-tunes of one base differ from it, latent by latent? A run that goes on.

For one pair in memory, and nothing on disk, use `emlens.features.compare_features`. What the
differences mean is asked by `find_persona_features`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emlens.codecs import SparseCodec, check_fits
from emlens.data import Chat, Message, prompt_hash
from emlens.data.prompts import hash_chats
from emlens.features import FeatureDiff, compare_features
from emlens.features.steering import require_autoencoder
from emlens.models.adapter_files import fingerprint_modules, load_adapter
from emlens.models.identity import hash_weights, identify_model
from emlens.models.lora import LoraAdapter
from emlens.models.pair import ModelPair, is_adapter, load_pair
from emlens.models.protocol import HookedModel
from emlens.models.source_hash import hash_source
from emlens.models.views import origin_of
from emlens.runs import RunFolder
from emlens.sources import Source
from emlens.studies.persona_settings import ComparisonSettings, FineTune, FineTunes, Tuned
from emlens.studies.sample_responses import sample_responses
from emlens.studies.stages import Stages

logger = logging.getLogger(__name__)

RESPONSES = "responses"
"""Folder of sampled responses, in the run folder."""


class LoadedPairs:
    """Pairs over one base, loaded when they are asked for; of full checkpoints the last is kept.

    Args:
        base: shared by all.
    """

    def __init__(self, base: HookedModel) -> None:
        self._base: Any = base
        self._adapted: dict[int, ModelPair] = {}
        self._full: tuple[int, ModelPair] | None = None

    def load(self, one: FineTune) -> ModelPair:
        """The base with a fine-tune.

        Raises:
            AdapterNotInEffectError: the adapter is not what the fine-tune computes.
        """
        if isinstance(one.source, ModelPair):
            return one.source
        if one.number in self._adapted:
            return self._adapted[one.number]
        if self._full is not None and self._full[0] == one.number:
            return self._full[1]
        self._full = None  # before another is loaded, so that two never are in memory
        pair = load_pair(self._base, one.source)
        if pair.adapter is None:
            self._full = one.number, pair
        else:
            self._adapted[one.number] = pair
        return pair


@dataclass(frozen=True, kw_only=True)
class LatentComparisons:
    """Fine-tunes compared with one base."""

    diffs: tuple[FeatureDiff, ...]
    """Those with the behaviour first, then their twins."""
    chats: tuple[Chat, ...]
    """What the base read: the chats as they were given, or with its own responses."""


def compare_by_latents(
    base: HookedModel,
    fine_tunes: FineTunes,
    *,
    codec: SparseCodec,
    chats: Sequence[Chat],
    settings: ComparisonSettings,
    out: str | Path,
    pairs: LoadedPairs | None = None,
) -> LatentComparisons:
    """Compare each fine-tune with the base, on the same prompts; the same call goes on.

    Args:
        base: what all were trained on, loaded.
        fine_tunes: with the behaviour first, then their twins; so are the comparisons.
        codec: of the base's architecture.
        chats: prompts or answered chats.
        settings: positions, whose responses, batches.
        out: run folder.
        pairs: the same fine-tunes where they are loaded already.

    Raises:
        CodecError: a codec of another site, width or model, or a crosscoder.
        PlanChangedError: `out` holds comparisons of another plan.
        ValueError: see `compare_features`; or no prompt that every model answers.
    """
    require_autoencoder(codec)
    loaded: Any = base
    check_fits(codec, base.cfg, weights=origin_of(loaded).lineage)
    plan = {"kind": "latent_comparisons", **plan_comparison(base, fine_tunes, codec, settings)}
    run = RunFolder.start(out, plan | {"chats_sha256": hash_chats(chats)})
    work = _Comparisons(base, codec, chats, settings, run, pairs or LoadedPairs(base))
    diffs = tuple(work.compare(one, fine_tunes) for one in fine_tunes)
    return LatentComparisons(diffs=diffs, chats=work.read_by_base(diffs[0]))


def plan_comparison(
    base: HookedModel, fine_tunes: FineTunes, codec: SparseCodec, settings: ComparisonSettings
) -> dict[str, Any]:
    """What decides comparisons, models by what they compute; the sizes of batches do not.

    Raises:
        ValueError: a pair over another base than the one in memory.
    """
    for one in fine_tunes:
        pair = one.source
        if isinstance(pair, ModelPair) and pair.base is not base:
            raise ValueError(
                f"tuned: the pair {pair.tuned_name} lies over another {pair.base_name} than the "
                "one that fine-tunes are compared with; load both over one base"
            )
    own = {k: v for k, v in vars(settings).items() if k != "batching"}
    return {
        "base": {k: v for k, v in vars(identify_model(base)).items() if k != "name"},
        "tuned": [describe_tuned(one.source) for one in fine_tunes],
        "misaligned": [one.misaligned for one in fine_tunes],
        "domains": [one.domain for one in fine_tunes],
        "codec": codec.fingerprint,
        "site": str(codec.site),
        "comparison": own | {"positions": settings.positions or codec.positions},
    }


def describe_tuned(source: Tuned) -> str:
    """What tells a fine-tune from any other: its factors as they act, its files, or its weights."""
    if isinstance(source, str | Path | Source):
        # The same adapter is the same, whether its folder or what was read of it is given.
        if not is_adapter(source):
            return hash_source(source)
        source = load_adapter(source)
    if isinstance(source, ModelPair):
        source = source.tuned if source.adapter is None else source.adapter
    if isinstance(source, LoraAdapter):
        return fingerprint_modules(source.modules)
    return hash_weights(source)


class _Comparisons:
    """The stages of one run."""

    def __init__(
        self,
        base: HookedModel,
        codec: SparseCodec,
        chats: Sequence[Chat],
        settings: ComparisonSettings,
        run: RunFolder,
        pairs: LoadedPairs,
    ) -> None:
        self.base, self.codec, self.chats, self.settings = base, codec, tuple(chats), settings
        self.run, self.pairs, self.stages = run, pairs, Stages(run)
        self._texts: dict[int, tuple[Chat, ...]] | None = None

    def compare(self, one: FineTune, everyone: FineTunes) -> FeatureDiff:
        def make() -> FeatureDiff:
            logger.info("%s: comparing %s", self.run.path, one.name)
            texts = self._read_by_each(everyone)
            own = self.settings.responses == "own"
            return compare_features(
                self.pairs.load(one),
                self.codec,
                chats=texts[0],
                tuned_chats=texts[one.number] if own else None,
                positions=self.settings.positions,
                batching=self.settings.batching,
                seed=self.settings.seed,
            )

        return self.stages.keep(f"{one.number:02d}", FeatureDiff, make)

    def read_by_base(self, diff: FeatureDiff) -> tuple[Chat, ...]:
        """What the base read in a finished comparison."""
        if self.settings.responses == "given":
            return self.chats
        return tuple(c for c in self._answer(self.base, 0) if prompt_hash(c) in set(diff.prompts))

    def _read_by_each(self, everyone: FineTunes) -> dict[int, tuple[Chat, ...]]:
        """What each model reads, the base as number 0; on prompts that all of them answered."""
        if self._texts is None:
            self._texts = self._sample(everyone)
        return self._texts

    def _sample(self, everyone: FineTunes) -> dict[int, tuple[Chat, ...]]:
        if self.settings.responses == "given":
            return {0: self.chats}
        said = {0: self._answer(self.base, 0)}
        if self.settings.responses == "own":
            for one in everyone:
                said[one.number] = self._answer(self.pairs.load(one).tuned, one.number)
        shared = set.intersection(*({prompt_hash(c) for c in own} for own in said.values()))
        if not shared:
            raise ValueError("chats: there is no prompt that every model answers with any text")
        return {k: tuple(c for c in own if prompt_hash(c) in shared) for k, own in said.items()}

    def _answer(self, model: Any, number: int) -> list[Chat]:
        """A model's responses that are not empty."""
        sampling = self.settings.sampling
        assert sampling is not None
        found = sample_responses(
            model,
            [chat.without_response() for chat in self.chats],
            sampling=sampling,
            out=self.run.path / RESPONSES / f"{number:02d}",
            batching=self.settings.batching,
        )
        return [
            Chat((*self.chats[r.prompt_index].without_response().messages, made), r.prompt_id)
            for r in found.responses
            if (made := Message("assistant", r.text)).content.strip()
        ]
