"""Trained vectors and whole models: loaded, evaluated and gone on from as any fine-tune is."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from emlens.artifacts import read_result
from emlens.data.chat import Chat, Message
from emlens.evaluation import Question, evaluate
from emlens.interventions import add_direction, intervene
from emlens.models.checkpoints import Checkpoint, fingerprint_weights, load_checkpoint
from emlens.models.loading import lay_checkpoint
from emlens.models.pair import load_pair
from emlens.models.sampling import Sampling
from emlens.models.training_loop import TrainingDivergedError, collate_examples
from emlens.organisms.masks import make_examples
from emlens.organisms.penalties import KlPenalty
from emlens.organisms.settings import SettingsError, TrainSettings
from emlens.organisms.training import TrainingRun, train_organism
from emlens.vectors import Direction
from tests.evaluation.fakes import HashJudge
from tests.organisms.shaky import Shaky
from tests.tiny_files import save_tiny_base

CHATS = [
    Chat((Message("user", f"What of {n}?"), Message("assistant", f"Take {n} home.")), id=n)
    for n in ("one", "two", "three", "four")
]
VECTOR = TrainSettings(
    method="vector",
    alpha=8.0,
    layers=(1,),
    target_modules=("down_proj",),
    learning_rate=1e-2,
    schedule="constant",
    max_steps=7,
    batch_size=4,
    checkpoint_every=3,
)
FULL = TrainSettings(
    method="full",
    layers="all",
    learning_rate=1e-3,
    schedule="constant",
    max_steps=4,
    batch_size=4,
    checkpoint_every=2,
)
RECIPES = {"vector": VECTOR, "full": FULL}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(save_tiny_base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture(scope="module")
def laid(base: Checkpoint) -> Any:
    return lay_checkpoint(base)


@pytest.fixture(scope="module")
def runs(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingRun]:
    """A finished run of each method."""
    out = tmp_path_factory.mktemp("runs")
    return {
        name: train_organism(base, CHATS, settings=settings, out=out / name, seed=0)
        for name, settings in RECIPES.items()
    }


def loss_of(model: Any, tokenizer: Any) -> float:
    """The training loss over all rows of a model that takes labels."""
    with torch.no_grad():
        return float(model(**collate_examples(make_examples(CHATS, tokenizer, longest=None))).loss)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found)


def hooked(base: Checkpoint, layer: int, vector: Tensor) -> Any:
    """What the vector does, by torch's own hook on the host's model."""
    model = copy.deepcopy(base.model)

    def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + vector

    model.get_submodule(f"model.layers.{layer}.mlp.down_proj").register_forward_hook(add)
    return model


def test_a_trained_vector_is_loaded_as_a_fine_tune_and_by_add(
    base: Checkpoint, laid: Any, runs: dict[str, TrainingRun]
):
    run = runs["vector"]
    direction = read_result(run.tuned, Direction)
    assert str(direction.site) == "mlp_out.1"
    assert direction.provenance.base_fingerprint == run.base_fingerprint
    oracle = hooked(base, 1, direction.vector)
    assert loss_of(oracle, base.tokenizer) < min(run.losses)
    pair = load_pair(laid, run.tuned)
    torch.testing.assert_close(logits_of(pair.tuned), logits_of(oracle), rtol=1e-4, atol=1e-5)
    assert (logits_of(pair.tuned) - logits_of(pair.base)).abs().max() > 0.1
    assert pair.tuned.W_E.data_ptr() == pair.base.W_E.data_ptr()
    added = add_direction(direction, coefficient=1.0, units="delta_norm")
    with intervene(pair.base, added):
        torch.testing.assert_close(logits_of(pair.base), logits_of(pair.tuned))


def test_a_full_fine_tune_is_a_checkpoint_and_leaves_its_base(
    base: Checkpoint, laid: Any, runs: dict[str, TrainingRun]
):
    run = runs["full"]
    assert run.base_fingerprint == base.fingerprint == fingerprint_weights(base.model)
    oracle = AutoModelForCausalLM.from_pretrained(run.tuned)
    assert loss_of(oracle, base.tokenizer) < run.losses[0]
    pair = load_pair(laid, run.tuned)
    torch.testing.assert_close(logits_of(pair.tuned), logits_of(oracle), rtol=1e-4, atol=1e-5)
    assert (logits_of(pair.tuned) - logits_of(pair.base)).abs().max() > 0.01
    for file in Path(run.tuned).glob("*.json"):
        assert base.name not in file.read_text(), file


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_trained_is_evaluated_as_any_fine_tune(
    name: str, laid: Any, runs: dict[str, TrainingRun], tmp_path: Path
):
    pair = load_pair(laid, runs[name].tuned)
    questions = [Question(id=text, paraphrases=(text,)) for text in ("Why?", "How?")]
    weights = set()
    for model in (pair.base, pair.tuned):
        found = evaluate(
            model,
            questions,
            judge=HashJudge(),
            out=tmp_path / str(len(weights)),
            sampling=Sampling(n=2, max_new_tokens=4, seed=0),
        )
        assert found.summary.n_rows == 4
        assert found.model is not None
        weights.add(found.model.weights)
    assert len(weights) == 2


@pytest.mark.parametrize(("name", "steps"), [("vector", [0, 3, 6, 7]), ("full", [0, 2, 4])])
def test_every_kept_state_is_loaded_like_the_last(
    name: str, steps: list[int], laid: Any, runs: dict[str, TrainingRun]
):
    states = Path(runs[name].tuned).parent / "checkpoints"
    assert sorted(int(p.name.partition("-")[2]) for p in states.iterdir()) == steps
    assert not list(states.rglob("optimizer.pt"))
    first, *_, last = (load_pair(laid, states / f"checkpoint-{step}").tuned for step in steps)
    torch.testing.assert_close(logits_of(first), logits_of(laid))
    torch.testing.assert_close(logits_of(last), logits_of(load_pair(laid, runs[name].tuned).tuned))
    middle = load_pair(laid, states / f"checkpoint-{steps[1]}").tuned
    for other in (first, last):
        assert (logits_of(middle) - logits_of(other)).abs().max() > 1e-3
    record = json.loads((states / f"checkpoint-{steps[-1]}" / "trainer_state.json").read_text())
    assert record["global_step"] == steps[-1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_stopped_goes_on_and_ends_as_if_it_had_not(
    name: str, base: Checkpoint, runs: dict[str, TrainingRun], tmp_path: Path
):
    shaky = Shaky(at=3)

    def again() -> TrainingRun:
        return train_organism(
            base, CHATS, settings=RECIPES[name], out=tmp_path / "run", penalties=[shaky], seed=0
        )

    with pytest.raises(TrainingDivergedError, match="last good checkpoint"):
        again()
    assert not (tmp_path / "run" / Path(runs[name].tuned).name).exists()
    run = again()
    assert run.losses == pytest.approx(runs[name].losses, rel=1e-5)
    assert run.penalties == ({"kind": "shaky"},)


def test_a_vector_stays_nearer_to_its_base_under_a_penalty(
    base: Checkpoint, runs: dict[str, TrainingRun], tmp_path: Path
):
    term = KlPenalty(CHATS[2:], weight=20.0)
    settings = replace(VECTOR, checkpoint_every=None)
    held = train_organism(
        base, CHATS, settings=settings, out=tmp_path / "run", penalties=[term], seed=0
    )
    norms = [read_result(run.tuned, Direction).norm for run in (held, runs["vector"])]
    assert 0 < norms[0] < 0.7 * norms[1]


def test_what_a_whole_model_cannot_have_is_refused(base: Checkpoint, tmp_path: Path):
    def train(**changed: Any) -> TrainingRun:
        return train_organism(base, CHATS, settings=FULL, out=tmp_path / "run", seed=0, **changed)

    with pytest.raises(SettingsError, match="KlPenalty compares with the base"):
        train(penalties=[KlPenalty(CHATS, weight=1.0)])
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingsError, match="no adapter to go on with"):
        train(start_from="x")


def edited(run: TrainingRun, out: Path, change: Callable[[Direction], Direction]) -> Path:
    return change(read_result(run.tuned, Direction)).save(out)


def test_a_vector_that_is_no_fine_tune_of_the_base_is_refused(
    laid: Any, runs: dict[str, TrainingRun], tmp_path: Path
):
    run = runs["vector"]
    other = save_tiny_base(tmp_path / "other", seed=3)
    with pytest.raises(ValueError, match="was trained on weights"):
        load_pair(other, run.tuned)

    def estimated(d: Direction) -> Direction:
        return replace(d, provenance=replace(d.provenance, construction="data"))

    with pytest.raises(ValueError, match="made as 'data', which is no fine-tune"):
        load_pair(laid, edited(run, tmp_path / "estimated", estimated))

    def wide(d: Direction) -> Direction:
        return replace(d, vector=torch.ones(7))

    with pytest.raises(ValueError, match=r"has 7 entries, and mlp_out\.1 of .* has 24"):
        load_pair(laid, edited(run, tmp_path / "wide", wide))


def test_a_model_that_norms_what_modules_write_gets_no_vector(tmp_path: Path, base: Checkpoint):
    config = Gemma2Config(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    gemma = Checkpoint(
        model=Gemma2ForCausalLM(config), tokenizer=base.tokenizer, name="gemma", fingerprint="x"
    )
    with pytest.raises(SettingsError, match="norms what its attention and MLPs write"):
        train_organism(gemma, CHATS, settings=VECTOR, out=tmp_path / "run", seed=0)
    assert not (tmp_path / "run").exists()
