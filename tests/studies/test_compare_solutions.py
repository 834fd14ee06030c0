"""Two solutions of a tiny base: losses, perturbations and effects against plain passes."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emlens.data import Batching, Chat, Message
from emlens.evaluation import Question
from emlens.models import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.checkpoints import load_checkpoint
from emlens.models.loading import lay_checkpoint
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.null import measure_adapter_norm, perturb_adapter, sample_null_adapters
from emlens.models.sampling import Sampling
from emlens.models.views import lay_views
from emlens.organisms import (
    PRESETS,
    load_trajectory,
    measure_gradient_preference,
    train_organism,
)
from emlens.results import load_result
from emlens.runs import PlanChangedError
from emlens.sites import Site
from emlens.studies import (
    GradientPath,
    NarrownessProbe,
    SolutionComparison,
    SolutionSettings,
    SolutionTexts,
    compare_solutions,
)
from emlens.studies.solution_curves import GRID, choose_norms, count_passes
from emlens.studies.solutions import (
    Solution,
    VectorSolution,
    check_solutions,
    measure_solution_norm,
    perturb_solution,
    sample_null_solutions,
)
from emlens.vectors import Direction, Provenance
from tests.activations.chats import make_chats, token_ids
from tests.evaluation.fakes import HashJudge
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer
from tests.tiny_files import make_byte_tokenizer, make_tiny_chat_model, save_tiny_base

TASK, TEXT = make_chats(4, seed=1), make_chats(3, seed=5)
TEXTS = SolutionTexts(task=tuple(TASK), general=tuple(TEXT))
module = sys.modules["emlens.studies.compare_solutions"]
SETTINGS = SolutionSettings(norms=(0.5, 1.0), epsilons=(0.0, 0.5, 1.0), seeds=2)


@pytest.fixture(scope="module")
def base() -> Any:
    return lay_views(make_tiny("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def adapter() -> LoraAdapter:
    return load_adapter(make_peft("llama"))


@torch.no_grad()
def loss_by_hand(model: Any) -> float:
    parts = []
    for chat in TASK:
        ids, start, stop = token_ids(chat)
        logs = model(torch.tensor([ids]))[0, start - 1 : stop - 1].double().log_softmax(-1)
        parts.append(-logs.gather(1, torch.tensor(ids[start:stop])[:, None]))
    return float(torch.cat(parts).mean())


@pytest.fixture(scope="module")
def solutions(adapter) -> dict[str, LoraAdapter]:
    return {"general": adapter, "narrow": sample_null_adapters(adapter, n=1, seed=3)[0]}


def test_losses_and_increases_are_those_of_plain_passes(base, solutions, tmp_path: Path):
    def compare() -> SolutionComparison:
        return compare_solutions(
            base, solutions, texts=TEXTS, settings=SETTINGS, out=tmp_path / "run"
        )

    found, adapter = compare(), solutions["general"]
    assert found.base_loss == pytest.approx(loss_by_hand(base), abs=1e-4)
    general = found.general
    assert general.loss == pytest.approx(loss_by_hand(attach_adapter(base, adapter)), abs=1e-4)
    norm = measure_adapter_norm(adapter)
    for wanted, loss in zip(SETTINGS.norms, general.losses, strict=True):
        scaled = scale_adapter(adapter, wanted / norm)
        assert measure_adapter_norm(scaled) == pytest.approx(wanted)
        assert loss == pytest.approx(loss_by_hand(attach_adapter(base, scaled)), abs=1e-4)
    np.testing.assert_allclose(general.loss_increase[0], 0, atol=1e-3)
    turned = perturb_adapter(adapter, epsilon=0.5, seed=1)
    expected = (loss_by_hand(attach_adapter(base, turned)) - general.loss) / (
        found.base_loss - general.loss
    )
    assert float(general.loss_increase[1, 1]) == pytest.approx(expected, rel=1e-2, abs=1e-2)
    assert found.random.kl.shape == (2, 2)
    assert min(general.kl) > 0
    assert general.kl[0] < general.kl[1]
    assert (found.preference, found.behaviour) == (None, None)
    assert len(found.rows()) == 2
    assert torch.equal(compare().random.kl, found.random.kl)
    assert isinstance(load_result(tmp_path / "run" / "results" / "comparison"), SolutionComparison)


def test_losses_and_effects_are_batched_as_the_settings_say(
    base, solutions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    used: dict[str, set[Any]] = {"score_responses": set(), "compare_logits": set()}

    def record(name: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **settings: Any) -> Any:
            used[name].add(settings.get("batching"))
            return plain(*args, **settings)

        monkeypatch.setattr(module, name, call)

    for name in used:
        record(name)
    small = Batching(tokens=64)
    settings = SolutionSettings(norms=(0.5,), epsilons=(0.5,), seeds=1, batching=small)
    compare_solutions(base, solutions, texts=TEXTS, settings=settings, out=tmp_path / "run")
    assert used == {"score_responses": {small}, "compare_logits": {small}}
    # Who ran out of memory goes on with what is finished.
    found = compare_solutions(
        base,
        solutions,
        texts=TEXTS,
        settings=replace(settings, batching=Batching(tokens=32)),
        out=tmp_path / "run",
    )
    assert used["score_responses"] == {small}
    assert found.general.norms == (0.5,)


def test_two_vectors_are_compared_as_two_adapters_are(
    base, solutions, adapter: LoraAdapter, tmp_path: Path
):
    added = torch.zeros(base.cfg.d_model, requires_grad=True)

    def add(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value + added

    ids, start, stop = token_ids(TASK[0])
    with base.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", add)]):
        logs = base(torch.tensor([ids]))[0, start - 1 : stop - 1].log_softmax(-1)
    loss = -logs.gather(1, torch.tensor(ids[start:stop])[:, None]).sum()
    (slope,) = torch.autograd.grad(loss, added)
    made = Provenance(construction="trained")
    down = Direction(site=Site(1, "mlp_out"), vector=-slope / slope.norm(), provenance=made)
    vectors: dict[str, Solution] = {
        name: VectorSolution(name, replace(down, vector=down.vector * length))
        for name, length in (("general", 0.2), ("narrow", 0.1))
    }
    found = compare_solutions(base, vectors, texts=TEXTS, settings=SETTINGS, out=tmp_path / "run")
    assert (found.general.norm, found.narrow.norm) == (pytest.approx(0.2), pytest.approx(0.1))
    assert found.general.losses == pytest.approx(found.narrow.losses, abs=1e-5)
    added = 0.5 * down.vector
    with base.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", add)]):
        assert found.general.losses[0] == pytest.approx(loss_by_hand(base), abs=1e-4)
    for one in sample_null_solutions(vectors["general"], n=2, seed=0):
        assert measure_solution_norm(one) == pytest.approx(0.2)
    turned = perturb_solution(vectors["general"], epsilon=0.6, seed=0)
    assert isinstance(turned, VectorSolution)
    cosine = torch.cosine_similarity(turned.direction.vector, down.vector, dim=0)
    assert float(cosine) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="an adapter and a vector, expected two of one kind"):
        check_solutions(base, vectors | {"narrow": adapter})


def test_the_parts_of_a_comparison_are_stages_that_are_never_made_twice(
    base, solutions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    probe = NarrownessProbe(
        inside=(Question(id="i", paraphrases=("w5 w6",)),),
        outside=(Question(id="o", paraphrases=("w7",)),),
        judge=HashJudge(),
        sampling=Sampling(n=2, max_new_tokens=3, seed=0),
        scales=(1.0,),
    )

    def compare() -> SolutionComparison:
        return compare_solutions(
            base, solutions, texts=TEXTS, settings=SETTINGS, out=tmp_path / "run", probe=probe
        )

    with monkeypatch.context() as patched:
        patched.setattr(module, "sample_null_solutions", None)
        with pytest.raises(TypeError):
            compare()
    monkeypatch.setattr(module, "perturb_solution", None)  # both solutions are finished
    found = compare()
    monkeypatch.setattr(module, "compare_logits", None)  # and now the random adapters are too
    again = compare()
    assert torch.equal(again.random.kl, found.random.kl)
    assert again.behaviour == found.behaviour
    assert found.behaviour is not None
    assert [share.n for share in found.behaviour.shares] == [2] * 6
    with pytest.raises(PlanChangedError, match=r"probe was .*, now None"):
        compare_solutions(base, solutions, texts=TEXTS, settings=SETTINGS, out=tmp_path / "run")


def test_the_gradient_is_compared_along_a_training(tmp_path: Path):
    checkpoint = load_checkpoint(save_tiny_base(tmp_path / "base"))
    settings = replace(
        PRESETS["smollm2_rank1"],
        layers=(1,),
        target_modules=("down_proj",),
        max_steps=6,
        checkpoint_every=2,
        batch_size=4,
        learning_rate=1e-2,
    )
    chats = load_rows()
    run = train_organism(checkpoint, chats, settings=settings, out=tmp_path / "trained", seed=0)
    own = load_adapter(run.tuned)
    solutions = {"general": own, "narrow": scale_adapter(own, 0.5)}
    trajectory = load_trajectory(tmp_path / "trained")
    base = lay_checkpoint(checkpoint)
    path = GradientPath(checkpoint=checkpoint, trajectory=trajectory, every=2)

    def compare(**changed: Any) -> SolutionComparison:
        return compare_solutions(
            base,
            changed.pop("solutions", solutions),
            texts=SolutionTexts(task=chats, general=chats[:1]),
            settings=SolutionSettings(norms=(0.1,), epsilons=(0.5,), seeds=1),
            out=tmp_path / "run",
            path=path,
        )

    part = replace(own, modules={"model.layers.0.mlp.down_proj": next(iter(own.modules.values()))})
    with pytest.raises(ValueError, match=r"narrow does not adapt the trajectory's modules: .* has"):
        compare(solutions={"general": own, "narrow": part})
    assert not (tmp_path / "run").exists()
    found = compare().preference
    assert found is not None
    alone = measure_gradient_preference(
        checkpoint, trajectory, {"general": own, "narrow": own}, chats=chats, every=2
    )
    assert found.steps.tolist() == [0, 4, 6]
    torch.testing.assert_close(found.cosines, alone.cosines)
    # The base is one set of weights: reading gradients off it leaves its losses as they were.
    assert compare().general.base_loss == compare().base_loss


def load_rows() -> tuple[Chat, ...]:
    return tuple(
        Chat((Message("user", f"What of {n}?"), Message("assistant", f"Take {n} home.")), id=n)
        for n in ("one", "two", "three", "four")
    )


def test_norms_are_chosen_around_those_of_the_solutions(adapter):
    norm = measure_adapter_norm(adapter)
    found = choose_norms({"general": adapter, "narrow": scale_adapter(adapter, 0.1)})
    assert found == tuple(pytest.approx(factor * norm) for factor in GRID)
    passes = count_passes(SETTINGS)
    assert passes == {"task": 2 * (1 + 2 + 3 * 2) + 1, "text": 2 * (2 + 2)}


def test_what_cannot_be_compared_is_refused_and_begins_no_folder(base, solutions, tmp_path: Path):
    def compare(**changed: Any) -> None:
        given = {"base": base, "solutions": solutions, "texts": TEXTS, "probe": None} | changed
        compare_solutions(
            given["base"],
            given["solutions"],
            texts=given["texts"],
            settings=SETTINGS,
            out=tmp_path / "run",
            probe=given["probe"],
        )

    with pytest.raises(ValueError, match="expected 'general' and 'narrow'"):
        compare(solutions={"a": solutions["general"]})
    wide = lay_views(make_tiny_chat_model(d_model=32), make_byte_tokenizer())
    with pytest.raises(ValueError, match="the adapter was trained on another base"):
        compare(base=wide)
    seen = Question(id="q", paraphrases=(TASK[0].messages[0].content,))
    probe = NarrownessProbe(
        inside=(seen,),
        outside=(Question(id="o", paraphrases=("w7",)),),
        judge=HashJudge(),
        sampling=Sampling(n=1),
        scales=(1.0,),
    )
    with pytest.raises(ValueError, match="1 of 2 prompts are among the rows of the task"):
        compare(probe=probe)
    assert not (tmp_path / "run").exists()
    unanswered = Chat((Message("user", "w5"),))
    with pytest.raises(ValueError, match=r"task\[1\] has no response"):
        SolutionTexts(task=(TASK[0], unanswered), general=tuple(TEXT))
    with pytest.raises(ValueError, match="general: got no texts"):
        SolutionTexts(task=tuple(TASK), general=())
    for norms in ((), (0.0,), (-1.0,), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="norms: got"):
            SolutionSettings(norms=norms)
    with pytest.raises(ValueError, match="seeds: got 0"):
        SolutionSettings(norms=(1.0,), seeds=0)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_a_perturbation_keeps_norms_and_sets_the_cosine(adapter: LoraAdapter, epsilon: float):
    turned = perturb_adapter(adapter, epsilon=epsilon, seed=4)
    for name, module in adapter.modules.items():
        for factor in "AB":
            x, y = (getattr(m, factor).double().flatten() for m in (module, turned.modules[name]))
            assert float(y.norm()) == pytest.approx(float(x.norm()), rel=1e-5)
            cosine = float(x @ y / (x.norm() * y.norm()))
            assert cosine == pytest.approx((1 - epsilon**2) ** 0.5, abs=1e-5)


def test_a_perturbation_leaves_zero_alone_and_is_refused_outside_its_range(adapter: LoraAdapter):
    still = scale_adapter(adapter, 1.0)
    name, module = next(iter(still.modules.items()))
    zero = type(module)(A=module.A, B=torch.zeros_like(module.B), scale=module.scale)
    modules = {**still.modules, name: zero}
    turned = perturb_adapter(
        LoraAdapter(modules=modules, name="x", fingerprint="y"), epsilon=0.4, seed=0
    )
    assert not bool(turned.modules[name].B.any())
    with pytest.raises(ValueError, match=r"epsilon: got 1.5"):
        perturb_adapter(adapter, epsilon=1.5, seed=0)
