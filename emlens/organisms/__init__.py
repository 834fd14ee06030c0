"""Model organisms: small fine-tunes with a known flaw, made to be studied beside their base."""

from emlens.organisms.masks import mask_response as mask_response
from emlens.organisms.settings import PRESETS as PRESETS
from emlens.organisms.settings import TrainSettings as TrainSettings
from emlens.organisms.training import TrainingRun as TrainingRun
from emlens.organisms.training import train_organism as train_organism
