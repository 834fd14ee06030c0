"""Searches among latents of a codec of other weights are refused before a folder is begun."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlens.codecs import CodecError, allow_other_model
from emlens.models.views import origin_of
from emlens.studies import (
    ComparisonSettings,
    FineTunes,
    PersonaProbe,
    PersonaSettings,
    PersonaTexts,
)
from emlens.studies.compare_by_latents import compare_by_latents
from emlens.studies.persona_plan import check_search
from tests.activations.chats import make_chats
from tests.features.planted import make_codec
from tests.studies.personas import make_base

FOREIGN = replace(make_codec(), base_fingerprint="another base")
CHATS = tuple(make_chats(2))


@pytest.fixture(scope="module")
def base() -> Any:
    return make_base()


def check(base: Any, codec: Any) -> None:
    settings = PersonaSettings(n_latents=1)
    check_search(base, codec, PersonaTexts(chats=CHATS), settings, PersonaProbe())


def test_a_search_wants_a_codec_of_its_base(base: Any):
    with pytest.raises(CodecError, match="was trained on weights another base"):
        check(base, FOREIGN)
    for known in (None, origin_of(base).fingerprint):
        check(base, replace(FOREIGN, base_fingerprint=known))
    check(base, allow_other_model(FOREIGN))


def test_comparisons_want_a_codec_of_their_base(base: Any, tmp_path: Path):
    with pytest.raises(CodecError, match="was trained on weights another base"):
        compare_by_latents(
            base,
            FineTunes(tuned=("a",)),
            codec=FOREIGN,
            chats=CHATS,
            settings=ComparisonSettings(),
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
