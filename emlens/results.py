"""Load any saved result by its kind; not for a result whose class is known (`read_result`)."""

import difflib
import importlib
from pathlib import Path
from types import MappingProxyType

from emlens.artifacts import Result, read_kind, read_result
from emlens.encoding import ArtifactError

# The only names that loading a file can lead to. Imported when asked for, as some are heavy.
RESULT_CLASSES = MappingProxyType(
    {
        "sae": "emlens.codecs.runtime:Sae",
        "crosscoder": "emlens.codecs.crosscoder:Crosscoder",
        "activation_diff": "emlens.diffing.results:ActivationDiff",
        "logit_diff": "emlens.diffing.results:LogitDiff",
        "model_diff": "emlens.diffing.results:ModelDiff",
        "null_band": "emlens.diffing.results:NullBand",
        "activation_statistics": "emlens.activations.results:ActivationStatistics",
        "cosine_matrix": "emlens.directions.compare:CosineMatrix",
        "direction": "emlens.vectors:Direction",
        "directions": "emlens.vectors:Directions",
        "adapter_proof": "emlens.models.proof:AdapterProof",
        "adapter_summary": "emlens.models.adapter_summary:AdapterSummary",
        "memory_plan": "emlens.models.memory:MemoryPlan",
        "environment": "emlens.models.environment:Environment",
        "behaviour_difference": "emlens.evaluation.compare:BehaviourDifference",
        "behaviour_summary": "emlens.evaluation.summary:BehaviourSummary",
        "evaluation": "emlens.evaluation.evaluation:Evaluation",
        "judge_calibration": "emlens.evaluation.calibration:JudgeCalibration",
        "judge_report": "emlens.evaluation.judge_report:JudgeReport",
        "spillover_lexicon": "emlens.evaluation.spillover:SpilloverLexicon",
        "crosscoder_training": "emlens.codecs.train_crosscoder:CrosscoderTraining",
        "latent_scaling": "emlens.codecs.latent_scaling:LatentScaling",
        "sae_training": "emlens.codecs.train:SaeTraining",
        "training_run": "emlens.organisms.training:TrainingRun",
        "adapter_trajectory": "emlens.organisms.trajectory:AdapterTrajectory",
        "gradient_preference": "emlens.organisms.gradients:GradientPreference",
        "phase_transition": "emlens.organisms.transition:PhaseTransition",
        "feature_cards": "emlens.features.cards:FeatureCards",
        "feature_screen": "emlens.features.screen_results:FeatureScreen",
        "sae_health": "emlens.features.results:SaeHealth",
        "feature_diff": "emlens.features.results:FeatureDiff",
        "feature_ranking": "emlens.features.rank:FeatureRanking",
        "model_classification": "emlens.features.classify:ModelClassification",
        "early_warning": "emlens.features.early_warning:EarlyWarning",
        "latent_codes": "emlens.features.latents:LatentCodes",
        "feature_contrast": "emlens.features.contrast:FeatureContrast",
        "diff_run": "emlens.studies.diff_finetunes:DiffRun",
        "sampled_responses": "emlens.studies.sample_responses:SampledResponses",
        "exported_model": "emlens.studies.export_model:ExportedModel",
        "responses": "emlens.interventions.generate:Responses",
        "direction_removal": "emlens.studies.removal:DirectionRemoval",
        "direction_choice": "emlens.studies.removal:Choice",
        "disturbance": "emlens.studies.removal:Disturbance",
        "ablation_screen": "emlens.studies.screen_ablations:AblationScreen",
        "odds_curve": "emlens.studies.transition_trace:OddsCurve",
        "transition_trace": "emlens.studies.transition_trace:TransitionTrace",
        "solution_curves": "emlens.studies.solution_curves:SolutionCurves",
        "random_effect": "emlens.studies.solution_curves:RandomEffect",
        "solution_comparison": "emlens.studies.solution_curves:SolutionComparison",
        "narrowness": "emlens.studies.measure_narrowness:Narrowness",
        "plain_difference": "emlens.studies.plain_difference:PlainDifference",
        "persona_features": "emlens.studies.persona_features:PersonaFeatures",
        "stage_times": "emlens.studies.stages:StageTimes",
        "demo": "emlens.studies.run_demo:DemoResult",
    }
)


def result_class(kind: str) -> type[Result]:
    """Class of the results of a kind.

    Raises:
        ArtifactError: No result is of this kind; the nearest three are named.
    """
    if kind not in RESULT_CLASSES:
        near = difflib.get_close_matches(kind, RESULT_CLASSES, 3, cutoff=0)
        raise ArtifactError(
            f"kind is {kind!r}, which this emlens does not know; nearest: {', '.join(near)}. "
            "It may have been saved by a newer emlens"
        )
    module, name = RESULT_CLASSES[kind].split(":")
    return getattr(importlib.import_module(module), name)


def load_result(path: str | Path) -> Result:
    """Load what the `save` of a result wrote.

    Args:
        path: The folder it was saved to, or the `result.json` in it.

    Returns:
        The result, of the class that its kind has in `RESULT_CLASSES`.

    Raises:
        ArtifactError: There is no result, its kind is unknown, or it is damaged.
    """
    return read_result(path, result_class(read_kind(path)))
