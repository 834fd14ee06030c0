"""When did a fine-tune turn, in its weights and in what it says? Both curves, and the lag between.

It takes neither for the cause of the other. For the weights alone without a folder see
`trace_weights`, for one window `emlens.organisms.measure_transition`.
"""

from pathlib import Path
from typing import Any

from emlens.data import text_hash
from emlens.organisms.trajectory import AdapterTrajectory
from emlens.organisms.transition import (
    PhaseTransition,
    check_window,
    list_last_scores,
    measure_transition,
)
from emlens.runs import RunFolder
from emlens.studies.stages import Stages
from emlens.studies.trace_behaviour import BEHAVIOUR, start_behaviour
from emlens.studies.transition_trace import (
    BehaviourProbe,
    TraceSettings,
    TrainingCurves,
    TransitionTrace,
)

TRACE = "trace"
"""Name of the result in the run folder."""


def trace_transition(
    trajectory: AdapterTrajectory,
    *,
    settings: TraceSettings,
    out: str | Path,
    probe: BehaviourProbe | None = None,
) -> TransitionTrace:
    """Measure weights, and behaviour, along a training; the same call on the same `out` goes on.

    The weights are looked at first, without a model. Then the base is asked for, with B multiplied
    by each scale: texts are scored at all checkpoints, answers sampled and judged at some of them.

    Args:
        trajectory: the checkpoints.
        settings: windows, scales, how many checkpoints.
        out: run folder; each evaluation is a folder of its own in it.
        probe: what behaviour is measured with; None for the weights alone.

    Raises:
        ValueError: fewer than two checkpoints, none that adapts a module, a window that none are
            apart, no scale for the probe, or a base that the adapter does not fit.
        PlanChangedError: `out` holds a run of another plan.

    Source: Turner et al. 2025, arXiv 2506.11613, sections 4.1 and 4.2.
    Differs: odds of fixed texts at all checkpoints beside sampled answers at some; onset and lag
        with intervals over texts and questions.
    """
    _check(trajectory, settings, probe)
    run = RunFolder.start(out, plan_trace(trajectory, settings, probe))
    stages = Stages(run)
    transitions = tuple(
        stages.keep(
            f"transition_{window}{'_normalised' if normalised else ''}",
            PhaseTransition,
            lambda window=window, normalised=normalised: _measure(
                trajectory, settings, window, normalised
            ),
        )
        for window, normalised in _paths(settings)
    )
    found = _gather(trajectory, transitions, settings)
    if probe is not None:
        found = start_behaviour(run.path / BEHAVIOUR, trajectory, settings, probe).trace(found)
    run.save_result(TRACE, found)
    return found


def trace_weights(trajectory: AdapterTrajectory, *, settings: TraceSettings) -> TransitionTrace:
    """Look at the weights alone, and write nothing; arguments and errors as `trace_transition`."""
    _check(trajectory, settings, None)
    found = (_measure(trajectory, settings, *path) for path in _paths(settings))
    return _gather(trajectory, tuple(found), settings)


def plan_trace(
    trajectory: AdapterTrajectory, settings: TraceSettings, probe: BehaviourProbe | None
) -> dict[str, Any]:
    """All that decides a trace and is known without a model; base and judge have their own plan."""
    plan: dict[str, Any] = {
        "kind": TransitionTrace.kind,
        "trajectory": trajectory.fingerprint(),
        "settings": settings,
    }
    if probe is None:
        return plan
    texts = (probe.texts.positive, probe.texts.negative)
    return plan | {
        "texts": [list(map(text_hash, part)) for part in texts],
        "questions": {question.id: question for question in probe.questions},
        "sampling": probe.sampling if probe.questions else None,
        "batching": probe.batching,
    }


def _paths(settings: TraceSettings) -> list[tuple[int, bool]]:
    """Window, and whether norms are taken out."""
    return [(window, normalised) for window in settings.windows for normalised in (False, True)]


def _measure(
    trajectory: AdapterTrajectory, settings: TraceSettings, window: int, normalised: bool
) -> PhaseTransition:
    return measure_transition(
        trajectory,
        window=window,
        threshold=settings.threshold,
        factor=settings.factor,
        normalised=normalised,
        seed=settings.seed,
    )


def _gather(
    trajectory: AdapterTrajectory,
    transitions: tuple[PhaseTransition, ...],
    settings: TraceSettings,
) -> TransitionTrace:
    return TransitionTrace(
        source=trajectory.source,
        training=TrainingCurves(
            steps=trajectory.steps,
            norms_A=trajectory.norms("A"),
            norms_B=trajectory.norms("B"),
            logged_steps=trajectory.logged_steps,
            losses=trajectory.losses,
            gradient_norms=trajectory.gradient_norms,
        ),
        transitions=transitions,
        likeness=list_last_scores(trajectory, factor=settings.factor),
    )


def _check(
    trajectory: AdapterTrajectory, settings: TraceSettings, probe: BehaviourProbe | None
) -> None:
    if len(trajectory) < 2 or not trajectory.modules:
        raise ValueError(
            f"trajectory: {len(trajectory)} checkpoints of {len(trajectory.modules)} modules, "
            "expected at least two of an adapter with its A and B: there is nothing to follow or "
            "to scale; load it with load_trajectory from where the checkpoints are"
        )
    for window in settings.windows:  # before the folder is begun with one that cannot be measured
        check_window(trajectory.steps, window)
    if probe is not None and not settings.scales:
        raise ValueError("scales: got none, expected factors to measure behaviour at, such as 1")
