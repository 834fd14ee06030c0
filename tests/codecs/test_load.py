"""Where codecs come from: sources, releases by name, published pickles; no network."""

import collections
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from emlens.codecs import CodecError, load_sae, pickles, releases, save_sae
from emlens.codecs.releases import find_release
from emlens.codecs.sae_lens_package import import_sae_lens
from emlens.sources import SourceError, SourceNotFoundError
from tests.codecs.builders import draw, make_sae, make_sae_lens

COMMIT = "0123456789abcdef0123456789abcdef01234567"
X = draw(30, 12, seed=9)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def publish(tmp_path: Path, repo: str, files: dict[str, Any]) -> None:
    """Files as the Hub's cache holds them: links to blobs."""
    repository = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for number, (name, write) in enumerate(files.items()):
        blob = repository / "blobs" / f"{number}"
        write(blob)
        place = repository / "snapshots" / COMMIT / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(blob)


def state_of(sae: Any, kind: str) -> dict[str, torch.Tensor]:
    """Weights as dictionary_learning's classes name them."""
    k = torch.tensor(sae.k or 9)
    if kind == "MatryoshkaBatchTopKSAE":
        names = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        return names | {"k": k, "threshold": torch.tensor(2.5), "group_sizes": torch.ones(2)}
    if kind == "JumpReluAutoEncoder":
        names = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        return names | {"threshold": sae.threshold}
    state = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    if kind == "GatedAutoEncoder":
        gates = {"gate_bias": sae.b_enc, "r_mag": sae.r_mag, "mag_bias": sae.b_mag}
        return state | gates | {"decoder_bias": sae.b_dec}
    state |= {"encoder.bias": sae.b_enc}
    if kind == "AutoEncoder":
        return state | {"bias": sae.b_dec}
    return state | {"b_dec": sae.b_dec, "k": k, "threshold": torch.tensor(2.5)}


def dictionary(sae: Any, kind: str, **changes: Any) -> dict[str, Any]:
    """`ae.pt` and `config.json` as dictionary_learning writes them."""
    trainer = {
        **{"dict_class": kind, "layer": 15, "lm_name": "Qwen/Qwen2.5-7B-Instruct"},
        **{"submodule_name": "resid_post_layer_15", "activation_dim": 12, "dict_size": 96, "k": 9},
    } | changes
    return {
        "ae.pt": lambda file: torch.save(state_of(sae, kind), file),
        "config.json": lambda file: file.write_text(
            json.dumps({"trainer": trainer, "buffer": {"ctx_len": 512}})
        ),
    }


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, save in files.items():
        save(folder / name)
    return folder


def import_loaders() -> Any:
    """sae_lens's own readers of published files."""
    import_sae_lens()
    from sae_lens.loading import pretrained_sae_loaders

    return pretrained_sae_loaders


KINDS = {
    "AutoEncoder": "standard",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
}


@pytest.mark.parametrize(("kind", "architecture"), KINDS.items())
def test_autoencoders_of_dictionary_learning_are_read_as_sae_lens_reads_them(
    tmp_path: Path, kind: str, architecture: str, monkeypatch: pytest.MonkeyPatch
):
    files = dictionary(make_sae(architecture), kind)
    folder = write(tmp_path / "codec", files)
    ours = load_sae(folder, device="cpu")
    loaders = import_loaders()
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, **_: str(Path(repo_id, filename))
    )
    config, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1(str(tmp_path), "codec")
    plain = "jumprelu" if "batchtopk" in architecture else architecture
    options = {"apply_b_dec_to_input": config["apply_b_dec_to_input"]}
    theirs = make_sae_lens(plain, hook_name=config["hook_name"], **options)
    theirs.load_state_dict(state)
    assert ours.site.hook_name == config["hook_name"] == "blocks.15.hook_resid_post"
    codes = theirs.encode(X).detach()
    got = ours.encode(X)
    assert torch.allclose(got.values, codes, atol=1e-4)
    assert torch.allclose(ours.decode(got), theirs.decode(codes), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dict_class": "AutoEncoderNew"}, "dict_class: 'AutoEncoderNew' is not supported; supp"),
        ({"submodule_name": "mlp_layer_15"}, "only the residual stream is supported"),
        ({"layer": "15"}, "layer: got '15'"),
        ({"dict_size": 95}, r"expected \(12, 95\)|expected \(95, 12\)"),
        ({"k": 8}, "k: 8 in config.json, 9 in weights"),
    ],
)
def test_what_its_configuration_says_is_honoured_or_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
):
    folder = write(tmp_path / "codec", dictionary(make_sae("topk"), "AutoEncoderTopK", **changes))
    with pytest.raises(CodecError, match=said):
        load_sae(folder)


@pytest.mark.parametrize(
    ("lm_name", "positions"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "all[8:]"),
        ("meta-llama/Llama-3.1-8B-Instruct", "all[8:]"),
        ("openai/gpt-oss-20b", "all[8:]"),
        ("Qwen/Qwen2.5-7B", "all"),
        (None, "all"),
    ],
)
def test_a_copy_of_a_published_codec_leaves_out_first_tokens_as_it_does(
    tmp_path: Path, lm_name: str | None, positions: str
):
    files = dictionary(make_sae("batchtopk"), "BatchTopKSAE", lm_name=lm_name)
    assert load_sae(write(tmp_path / "copy", files), device="cpu").positions == positions


def test_a_codec_that_somebody_else_published_counts_every_token(tmp_path: Path):
    files = dictionary(make_sae("batchtopk"), "BatchTopKSAE")
    publish(tmp_path, "someone/saes-qwen", files)
    assert load_sae("someone/saes-qwen", device="cpu").positions == "all"


def test_a_threshold_that_was_never_set_is_refused(tmp_path: Path):
    files = dictionary(make_sae("batchtopk"), "BatchTopKSAE")
    state = state_of(make_sae("batchtopk"), "BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}
    folder = write(tmp_path / "codec", files | {"ae.pt": lambda file: torch.save(state, file)})
    with pytest.raises(CodecError, match="threshold: below zero, as before training sets one"):
        load_sae(folder)


def test_a_published_release_is_found_by_name_and_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = dictionary(make_sae("batchtopk"), "BatchTopKSAE")
    folder = "resid_post_layer_15/trainer_1"
    publish(
        tmp_path,
        "andyrdt/saes-qwen2.5-7b-instruct",
        {f"{folder}/{name}": save for name, save in files.items()},
    )
    release = "qwen2.5-7b-instruct-andyrdt"
    sae = load_sae(release, sae_id="resid_post_layer_15_trainer_1", device="cpu")
    assert str(sae.site) == "resid_post.15"
    assert sae.positions == "all[8:]"
    assert sae.name == f"{release}#resid_post_layer_15_trainer_1"
    assert sae.base_name == "Qwen/Qwen2.5-7B-Instruct"
    assert sae.link(7) == ("https://www.neuronpedia.org/qwen2.5-7b-it/15-resid-post-aa/7")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened again")

    monkeypatch.setattr(torch, "load", refuse)
    repository = "andyrdt/saes-qwen2.5-7b-instruct"
    for source, sae_id in ((f"{repository}/{folder}", None), (repository, folder)):
        again = load_sae(source, sae_id=sae_id, device="cpu")
        assert (again.fingerprint, again.positions) == (sae.fingerprint, "all[8:]")
    half = load_sae(f"{repository}@main/{folder}", dtype="bfloat16", device="cpu")
    assert (half.W_dec.dtype, half.positions) == (torch.bfloat16, "all[8:]")
    with pytest.raises(CodecError, match="opened again"):  # another file: not what was kept
        load_sae(write(tmp_path / "other", files))


def test_what_was_kept_of_a_conversion_and_is_damaged_is_made_anew(tmp_path: Path):
    folder = write(tmp_path / "codec", dictionary(make_sae("topk"), "AutoEncoderTopK"))
    first = load_sae(folder, device="cpu")
    (file,) = (tmp_path / "home").glob("emlens/codecs/*/tensors-*")
    file.write_bytes(file.read_bytes()[:-4])
    assert load_sae(folder, device="cpu").fingerprint == first.fingerprint
    assert first.positions == "all[8:]"


def test_qwen_scope_is_read_by_the_names_of_its_files(tmp_path: Path):
    sae = make_sae("topk", k=50, apply_b_dec_to_input=False)
    state = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec.T, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    repository = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    publish(tmp_path, repository, {"layer3.sae.pt": lambda file: torch.save(state, file)})
    read = load_sae(f"{repository}/layer3.sae.pt", device="cpu")
    assert read.fingerprint == sae.fingerprint
    assert read.base_name == "Qwen/Qwen3-1.7B-Base"
    named = load_sae("qwen-scope-3-1.7b-base-w32k-l50", sae_id="layer3", device="cpu")
    assert named.fingerprint == sae.fingerprint
    torch.save(state, tmp_path / "layer3.sae.pt")
    with pytest.raises(CodecError, match="a repository named"):
        load_sae(tmp_path / "layer3.sae.pt")


class Evil:
    """Runs code when an ordinary unpickler meets it."""

    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_pickles_that_hold_more_than_tensors_are_refused_unread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for what in ({"W_enc": Evil()}, Evil(), {"W_enc": 3}, {3: torch.ones(2)}, [torch.ones(2)]):
        torch.save(what, tmp_path / "ae.pt")
        with pytest.raises(CodecError, match=r"holds|expected a tensor"):
            pickles.read_pickled_tensors(tmp_path, "ae.pt")
    assert capsys.readouterr().out == ""
    torch.save(Evil(), tmp_path / "ae.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CodecError, match=r"is no archive as torch.save writes"):
        pickles.read_pickled_tensors(tmp_path, "ae.pt")


def test_pickles_that_claim_more_than_they_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "ae.pt"
    torch.save({"W_enc": torch.zeros(1).expand(2**40)}, file)
    with pytest.raises(CodecError, match="W_enc is larger than what is stored of it"):
        pickles.read_pickled_tensors(tmp_path, "ae.pt")
    torch.save({"W_enc": torch.zeros(10**6)}, file)
    packed = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(file) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for member in archive.infolist():
            out.writestr(member.filename, archive.read(member))
    assert packed.stat().st_size < 10**5
    with pytest.raises(CodecError, match="unpacks to more than it is"):
        pickles.read_pickled_tensors(tmp_path, "packed.pt")
    monkeypatch.setattr(pickles, "MAX_WEIGHTS_BYTES", 1000)
    with pytest.raises(CodecError, match=r"ae.pt has .* bytes, expected at most 1000"):
        pickles.read_pickled_tensors(tmp_path, "ae.pt")


def test_state_dicts_as_torch_saves_them_are_read(tmp_path: Path):
    state = collections.OrderedDict(b_dec=torch.arange(3.0))
    torch.save(state, tmp_path / "ae.pt")
    assert torch.equal(pickles.read_pickled_tensors(tmp_path, "ae.pt")["b_dec"], state["b_dec"])


def test_unknown_releases_and_ids_list_the_nearest():
    with pytest.raises(CodecError, match=r"nearest: qwen2.5-7b-instruct-andyrdt, .*, "):
        load_sae("qwen2.5-7b-andyrdt", sae_id="x")
    with pytest.raises(CodecError, match=r"no 'resid_post_layer_15'; nearest: resid_post_layer_1"):
        load_sae("llama-3.1-8b-instruct-andyrdt", sae_id="resid_post_layer_15")
    with pytest.raises(CodecError, match=r"has 7 codecs; name one, such as resid_post_layer_3_"):
        load_sae("llama-3.1-8b-instruct-andyrdt")


def test_other_layouts_are_read_by_sae_lens(monkeypatch: pytest.MonkeyPatch):
    loaders = import_loaders()
    theirs = make_sae_lens("jumprelu")
    asked = []
    monkeypatch.setattr(
        loaders, "load_sae_config_from_huggingface", lambda *_: theirs.cfg.to_dict()
    )
    monkeypatch.setattr(
        import_sae_lens().SAE,
        "from_pretrained",
        lambda *given, **named: asked.append(named) or theirs,
    )
    release = "gemma-scope-2-270m-it-res"
    sae = load_sae(release, sae_id="layer_12_width_16k_l0_big", dtype="float64", device="cpu")
    assert sae.W_enc.dtype == torch.float64
    assert asked == [{"device": "cpu", "dtype": "float64"}]
    transcoder = theirs.cfg.to_dict() | {"architecture": "jumprelu_skip_transcoder"}
    monkeypatch.setattr(loaders, "load_sae_config_from_huggingface", lambda *_: transcoder)
    with pytest.raises(CodecError, match=r"270m-it-res#.*'jumprelu_skip_transcoder' is not supp"):
        load_sae(release, sae_id="layer_12_width_16k_l0_big")
    assert len(asked) == 1  # refused before its weights were fetched


def test_a_release_that_cannot_be_had_says_why():
    with pytest.raises(CodecError, match=r"270m-it-res#.*: sae_lens could not load it: "):
        load_sae("gemma-scope-2-270m-it-res", sae_id="layer_12_width_16k_l0_big")
    found = find_release("qwen2.5-7b-instruct-andyrdt", "resid_post_layer_3_trainer_1")
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        load_sae(found.source)


def test_pickled_releases_that_sae_lens_reads_are_opened_here_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaders = import_loaders()
    theirs = make_sae_lens("standard")
    monkeypatch.setattr(
        loaders, "load_sae_config_from_huggingface", lambda *_: theirs.cfg.to_dict()
    )
    found = find_release("goodfire-llama-3.1-8b-instruct", "layer_19")
    repository, name = found.source.rsplit("/", 1)
    publish(tmp_path, repository, {name: lambda file: torch.save({"a": Evil()}, file)})
    with pytest.raises(CodecError, match="holds more than tensors"):
        releases.load_with_sae_lens(found, name="x", dtype=None)


def test_sources_that_hold_no_codec_are_refused_by_name(tmp_path: Path):
    (tmp_path / "layer_3").mkdir()
    with pytest.raises(CodecError, match=r"holds no codec: .*There are layer_3"):
        load_sae(tmp_path)
    with pytest.raises(SourceNotFoundError):
        load_sae(tmp_path, sae_id="layer_4")
    for sae_id in ("../elsewhere", "/elsewhere"):
        with pytest.raises(CodecError, match="is no folder inside"):
            load_sae(tmp_path, sae_id=sae_id)
    with pytest.raises(CodecError, match="is no folder inside emlens:"):
        load_sae("emlens:reckless-finance", sae_id="x")
    with pytest.raises(CodecError, match="holds no codec"):
        load_sae("emlens:reckless-finance")
    with pytest.raises(CodecError, match="dtype: got 'int8', expected auto, float32"):
        load_sae(tmp_path, dtype="int8")
    with pytest.raises(CodecError, match="expected a folder"):
        load_sae("emlens:smollm2")


def test_what_the_cache_holds_a_part_of_is_refused_offline_with_the_reason(tmp_path: Path):
    write_text = {"README.md": lambda file: file.write_text("about")}
    publish(tmp_path, "someone/other-files", write_text)
    with pytest.raises(CodecError, match=r"Name it: someone.other-files/FOLDER.*HF_HUB_OFFLINE"):
        load_sae("someone/other-files")
    config = {"cfg.json": lambda file: file.write_text("{}")}
    publish(tmp_path, "someone/half", config)
    with pytest.raises(CodecError, match=r"sae_weights.safetensors is not.*HF_HUB_OFFLINE"):
        load_sae("someone/half")
    with pytest.raises(SourceNotFoundError, match=r"has no 'layer_3'.*HF_HUB_OFFLINE"):
        load_sae("someone/half", sae_id="layer_3")
    # Nothing of the Hub is said of a folder that lies here.
    (tmp_path / "here").mkdir()
    with pytest.raises(CodecError) as refused:
        load_sae(tmp_path / "here")
    assert "HF_HUB_OFFLINE" not in str(refused.value)


def test_a_subfolder_is_named_by_its_id(tmp_path: Path):
    save_sae(make_sae(), tmp_path / "a" / "b")
    sae = load_sae(tmp_path, sae_id="a/b", dtype=torch.float64, device="cpu")
    assert (sae.name, sae.W_enc.dtype) == (f"{tmp_path}#a/b", torch.float64)


def test_our_folders_and_sae_lenss_are_read_without_sae_lens(tmp_path: Path):
    from tests.codecs.test_files import write_sae_lens

    save_sae(make_sae("gated"), tmp_path / "own")
    write_sae_lens(tmp_path / "theirs")
    code = (
        "import sys, emlens\n"
        "assert 'torch' not in sys.modules\n"
        f"a = emlens.load_sae({str(tmp_path / 'own')!r})\n"
        f"b = emlens.load_sae({str(tmp_path / 'theirs')!r})\n"
        "heavy = {'sae_lens', 'transformer_lens', 'transformers', 'wandb'} & set(sys.modules)\n"
        "print(a.architecture, b.architecture, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "gated standard set()"


def test_without_sae_lens_a_release_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(CodecError, match=r"sae_lens is not installed.*emlens-interp\[sae\]"):
        load_sae("qwen2.5-7b-instruct-andyrdt", sae_id="x")
