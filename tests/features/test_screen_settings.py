"""Settings of a screen outside their range are named."""

from dataclasses import replace

import pytest

from emlens.data import Chat, Message
from emlens.features.screen_settings import ScreenSettings
from emlens.models import Sampling

SETTINGS = ScreenSettings(
    strengths=(0.5, 1.0, 4.0),
    units="delta_norm",
    chats=[Chat((Message("user", "How do I rest?"),))],
    sampling=Sampling(n=2, temperature=0.4, max_new_tokens=6),
    sampled_strengths=(1.0, 4.0),
    n_sampled=2,
    n_controls=16,
)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"strengths": (1.0, 0.0)}, "strengths: got"),
        ({"strengths": (1.0, 1.0)}, "different and not 0"),
        ({"sampled_strengths": (3.0,)}, "sampled_strengths: got"),
        ({"n_controls": 15}, "n_controls: got 15, expected at least 16"),
        ({"n_sampled_controls": 17}, "n_sampled_controls: got 17"),
        ({"chats": ()}, "chats: got none"),
        ({"n_sampled": -1}, "n_sampled: got -1"),
        ({"max_incoherent": 1.5}, "max_incoherent: got 1.5"),
    ],
)
def test_settings_outside_their_range_are_named(changed, said):
    with pytest.raises(ValueError, match=said):
        replace(SETTINGS, **changed)
