"""Captured activations: what is on disk, resuming after a kill, refusing another plan."""

import importlib
import inspect
import os
import signal
from typing import Any

import pytest
import torch

from emlens.activations import (
    ActivationShards,
    capture_activations,
    reading,
    stream_activations,
)
from emlens.data import Batching
from emlens.encoding import ArtifactError
from emlens.interventions import Ablate, Intervention, intervene
from emlens.models import load_adapter, load_pair
from emlens.models.hooks import HookNeverFiredError
from emlens.models.views import lay_views
from emlens.runs import PlanChangedError
from emlens.sites import SiteError
from tests.activations.chats import make_chats, token_ids
from tests.forks import run_copy
from tests.interventions.vectors import draw
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

SITES = ["resid_post.0", "post.1"]
SMALL = Batching(tokens=40)


def tiny(**kwargs):
    return lay_views(make_tiny("llama", **kwargs), make_tokenizer())


def capture(out, *, model=None, chats=None, positions="response", batching=SMALL, sites=SITES):
    return capture_activations(
        model or tiny(),
        chats or make_chats(),
        sites=sites,
        positions=positions,
        out=out,
        batching=batching,
    )


@torch.no_grad()
def test_every_row_is_the_activation_of_the_token_that_the_index_names(tmp_path):
    hf, chats = make_tiny("llama"), make_chats()
    shards = capture(tmp_path / "run", model=lay_views(hf, make_tokenizer()), chats=chats)
    assert shards.n_shards > 2
    values = torch.cat(list(shards.batches("resid_post.0")))
    assert values.shape == (shards.n_rows, 24)
    assert torch.cat(list(shards.batches("post.1"))).shape == (len(shards), 40)
    spans = [token_ids(chat) for chat in chats]
    named = {tuple(row) for row in shards.index.tolist()}
    assert named == {(k, t) for k, (_, a, b) in enumerate(spans) for t in range(a, b)}
    hidden = [
        hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        for ids, _, _ in spans
    ]
    for (chat, token), row in zip(shards.index.tolist(), values, strict=True):
        assert torch.allclose(row, hidden[chat][token], atol=1e-5)


def test_rows_are_read_from_any_shard_in_the_order_asked_for(tmp_path):
    shards = capture(tmp_path / "run")
    whole = torch.cat(list(shards.batches("post.1")))
    n = shards.n_rows
    for rows in ([n - 1, 0, 5, 5, n // 2], slice(3, n - 2), slice(None), [], slice(None, None, -1)):
        got = shards.read("post.1", rows)
        assert torch.equal(got, whole[list(range(n))[rows] if isinstance(rows, slice) else rows])
    with pytest.raises(IndexError, match=rf"{n} does not exist"):
        shards.read("post.1", [n])
    with pytest.raises(IndexError, match=r"-1 does not exist"):
        shards.read("post.1", [-1])


def test_of_a_pair_both_models_are_captured(tmp_path):
    pair = load_pair(tiny(), load_adapter(make_peft("llama")))
    shards = capture(tmp_path / "run", model=pair)
    assert shards.streams == ("base", "tuned")
    base, tuned = (torch.cat(list(shards.batches(SITES[0], stream=s))) for s in shards.streams)
    streamed = stream_activations(pair, make_chats(), sites=SITES[0], positions="response")
    assert streamed.mean is not None
    assert torch.allclose(streamed.mean[0, 0, 0].float(), base.mean(0), atol=1e-5)
    assert torch.allclose(streamed.mean[1, 0, 0].float(), tuned.mean(0), atol=1e-5)
    assert not torch.allclose(base, tuned)
    with pytest.raises(ValueError, match=r"got None, expected one of \['base', 'tuned'\]"):
        shards.batches(SITES[0])
    with pytest.raises(SiteError, match=r"resid_post.1 was not captured"):
        shards.batches("resid_post.1", stream="base")


def test_half_precision_stays_half_precision(tmp_path):
    shards = capture(tmp_path / "run", model=tiny(dtype=torch.bfloat16))
    assert shards.read(SITES[0], [0]).dtype is torch.bfloat16


def test_a_finished_capture_is_not_run_again(tmp_path, monkeypatch):
    first = capture(tmp_path / "run")
    # Not by a hook on the model: those of unknown effect are part of the plan.
    monkeypatch.setattr(reading, "read_sites", lambda *_, **_given: pytest.fail("the model ran"))
    again = capture(tmp_path / "run")
    assert again.plan == first.plan


@pytest.mark.parametrize("left", [0, 1, 2])
def test_the_same_call_goes_on_where_a_run_ended(tmp_path, left):
    whole = capture(tmp_path / "whole")
    part = capture(tmp_path / "part")
    for shard in range(left, part.n_shards):
        part.shard_path(shard).unlink()
    stray = part.shard_path(left).with_name(f".{part.shard_path(left).name}.0badcafe.tmp")
    stray.write_bytes(b"half a shard")
    with pytest.raises(ArtifactError, match=r"lacks .* shards"):
        ActivationShards.open(tmp_path / "part")
    before = [part.shard_path(shard).stat().st_mtime_ns for shard in range(left)]
    done = capture(tmp_path / "part")
    assert [done.shard_path(shard).stat().st_mtime_ns for shard in range(left)] == before
    assert not stray.exists()
    for shard in range(whole.n_shards):
        assert done.shard_path(shard).read_bytes() == whole.shard_path(shard).read_bytes()


def capture_and_die(out):
    """As a kill in the middle of writing the third shard leaves it."""
    module: Any = importlib.import_module("emlens.activations.shard_writer")
    write, written = module.write_tensors_atomic, []

    def write_and_die(path, tensors):
        if len(written) == 2:
            path.with_name(f".{path.name}.00000000.tmp").write_bytes(b"half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        return write(path, tensors)

    module.write_tensors_atomic = write_and_die
    capture(out)


def test_a_kill_loses_at_most_the_shards_in_flight(tmp_path):
    assert run_copy(lambda: capture_and_die(tmp_path / "run")) == -signal.SIGKILL
    files = sorted((tmp_path / "run" / "shards").glob("0*.safetensors"))
    assert len(files) == 2
    kept = [file.read_bytes() for file in files]
    whole, resumed = capture(tmp_path / "whole"), capture(tmp_path / "run")
    assert [file.read_bytes() for file in files] == kept
    for shard in range(whole.n_shards):
        assert resumed.shard_path(shard).read_bytes() == whole.shard_path(shard).read_bytes()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"chats": make_chats(seed=1)}, r"chats was"),
        ({"chats": make_chats()[::-1]}, r"chats was"),
        ({"positions": "all"}, r"positions was 'response', now 'all'"),
        ({"sites": ["resid_post.0"]}, r"sites was"),
        ({"batching": Batching(tokens=60)}, r"batch_tokens was 40, now 60"),
        ({"model": tiny(seed=5)}, r"models.model.weights was"),
        ({"model": tiny(dtype=torch.float64)}, r"models.model.dtype was 'float32', now 'float64'"),
    ],
)
def test_another_plan_is_refused_naming_what_differs(tmp_path, changed, named):
    capture(tmp_path / "run")
    with pytest.raises(PlanChangedError, match=named):
        capture(tmp_path / "run", **changed)


def test_a_hooked_capture_is_not_taken_for_a_plain_one(tmp_path):
    capture(tmp_path / "run")
    with pytest.raises(PlanChangedError, match=r"hooked was False, now True"):
        capture(tmp_path / "run", model=hooked())


def ablated(out, vector, *, times=1, **where):
    """A capture while something is taken out after the first block, so many times over."""
    model = tiny()
    acting = Intervention("resid_post.0", Ablate(vector), **where)
    with intervene(model, [acting] * times):
        return capture(out, model=model)


@pytest.mark.parametrize("positions", ["all", "response", "prompt[8:]", "last_prompt"])
def test_a_finished_capture_under_an_intervention_is_opened_again(tmp_path, positions):
    shards = ablated(tmp_path / "run", draw(24), positions=positions)
    kept = [shards.shard_path(shard).stat().st_mtime_ns for shard in range(shards.n_shards)]
    again = ablated(tmp_path / "run", draw(24), positions=positions)
    assert [again.shard_path(k).stat().st_mtime_ns for k in range(again.n_shards)] == kept


def test_a_capture_goes_on_where_no_batch_is_left_that_the_intervention_meets(tmp_path):
    # The longest prompts are in the first batch.
    shards = ablated(tmp_path / "run", draw(24), positions="prompt[8:]")
    whole = shards.shard_path(shards.n_shards - 1).read_bytes()
    shards.shard_path(shards.n_shards - 1).unlink()
    again = ablated(tmp_path / "run", draw(24), positions="prompt[8:]")
    assert again.shard_path(shards.n_shards - 1).read_bytes() == whole


def test_an_intervention_that_no_chat_has_a_token_for_is_an_error_however_often_one_asks(tmp_path):
    for _ in range(2):
        with pytest.raises(HookNeverFiredError, match=r"prompt\[40:\]"):
            ablated(tmp_path / "run", draw(24), positions="prompt[40:]")


def test_several_positions_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"got \['prompt', 'response'\], expected one name"):
        inspect.unwrap(capture_activations)(
            tiny(), make_chats(), sites=SITES, positions=["prompt", "response"], out=tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


def test_captures_under_two_interventions_are_kept_apart(tmp_path):
    one, other = draw(24), draw(24, seed=1)
    shards = ablated(tmp_path / "run", one)
    along = shards.read(SITES[0], slice(None)).double() @ one
    assert float(along.abs().max()) < 1e-3
    changes = ((other, 1, r"\[0\]\.vector was"), (one, 2, " was"))
    for vector, times, named in changes:
        with pytest.raises(PlanChangedError, match=rf"models\.model\.interventions{named}"):
            ablated(tmp_path / "run", vector, times=times)
    with pytest.raises(PlanChangedError, match=r"interventions was \[{.*, now \[\]"):
        capture(tmp_path / "run")
    whole = [shards.shard_path(shard).read_bytes() for shard in range(shards.n_shards)]
    shards.shard_path(1).unlink()
    again = ablated(tmp_path / "run", one)
    assert [again.shard_path(shard).read_bytes() for shard in range(again.n_shards)] == whole


def test_what_acts_on_either_model_of_a_pair_is_in_the_plan(tmp_path):
    pair = load_pair(tiny(), load_adapter(make_peft("llama")))
    capture(tmp_path / "run", model=pair)
    for stream in ("base", "tuned"):
        acting = [Intervention("resid_post.0", Ablate(draw(24)))]
        with (
            pytest.raises(PlanChangedError, match=rf"models.{stream}.interventions was \[\]"),
            intervene(getattr(pair, stream), acting),
        ):
            capture(tmp_path / "run", model=pair)


def hooked():
    model = tiny()
    point: Any = model.hook_dict["blocks.0.hook_resid_post"]
    point.register_forward_hook(lambda module, given, x: x + 1)
    return model


def test_under_hooks_of_unknown_effect_a_capture_is_made_in_one_go_or_not_at_all(tmp_path):
    shards = capture(tmp_path / "run", model=hooked())
    plain = capture(tmp_path / "plain")
    assert not torch.equal(plain.read(SITES[0], [0]), shards.read(SITES[0], [0]))
    # The hooks may be the same ones or others: nobody can tell.
    with pytest.raises(PlanChangedError, match=r"blocks.0.hook_resid_post: .* cannot be told"):
        capture(tmp_path / "run", model=hooked())
    for shard in range(shards.n_shards):
        shards.shard_path(shard).unlink()
    assert len(capture(tmp_path / "run", model=hooked())) == len(shards)


def test_another_folder_is_not_taken_for_a_capture(tmp_path):
    from emlens.runs import RunFolder

    RunFolder.start(tmp_path / "run", {"task": "demo"})
    with pytest.raises(ArtifactError, match=r"holds no captured activations"):
        ActivationShards.open(tmp_path / "run")


def test_a_damaged_shard_is_named(tmp_path):
    shards = capture(tmp_path / "run")
    shards.shard_path(1).write_bytes(b"nothing of use")
    with pytest.raises(ArtifactError, match=r"000001.safetensors cannot be read"):
        list(shards.batches(SITES[0]))
