"""Model organisms: small fine-tunes with a known flaw, made to be studied beside their base."""

from emlens.organisms.gradients import GradientPreference as GradientPreference
from emlens.organisms.gradients import (
    measure_gradient_preference as measure_gradient_preference,
)
from emlens.organisms.latent_penalty import LatentPenalty as LatentPenalty
from emlens.organisms.masks import mask_response as mask_response
from emlens.organisms.penalties import KlPenalty as KlPenalty
from emlens.organisms.settings import PRESETS as PRESETS
from emlens.organisms.settings import TrainSettings as TrainSettings
from emlens.organisms.training import TrainingRun as TrainingRun
from emlens.organisms.training import train_organism as train_organism
from emlens.organisms.trajectory import AdapterTrajectory as AdapterTrajectory
from emlens.organisms.trajectory import load_trajectory as load_trajectory
from emlens.organisms.transition import PhaseTransition as PhaseTransition
from emlens.organisms.transition import measure_transition as measure_transition
from emlens.organisms.transition import score_against_last as score_against_last
