"""One pass over chats that encodes the activations of a model or a pair as it goes.

Everything that is learnt of codes at a site begins here; not for activations without a codec
(`emlens.activations`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from emlens.activations import ReadingPlan, plan_reading
from emlens.codecs import SparseCodec, check_fits
from emlens.codecs.inputs import place_rows
from emlens.data import Batching, Chat, as_chats, prompt_hash
from emlens.features.accumulate import FeatureAccumulator
from emlens.features.encode import encode_models, split_rows
from emlens.features.steering import require_autoencoder
from emlens.models.reading import Readable, base_of, count_models
from emlens.models.views import origin_of
from emlens.sites import Site

TASK = "encoding (tokens)"


def plan_codes(
    model: Readable,
    codec: SparseCodec,
    chats: Sequence[Chat | str],
    *,
    positions: str | None,
    batching: Batching,
) -> ReadingPlan:
    """Plan the reading of a codec's site.

    Args:
        model: one model or a pair.
        codec: whose site is read.
        chats: prompts (str) or chats.
        positions: which tokens; None is those that the codec was trained on.
        batching: tokens run at once, all models counted.

    Raises:
        CodecError: a crosscoder; or the model lacks the site, has another width there than the
            codec's, or is another one than the codec was trained on.
        ValueError: as `plan_reading` raises.
    """
    require_autoencoder(codec)
    base = base_of(model)
    check_fits(codec, base.cfg, weights=origin_of(base).lineage)
    where = codec.positions if positions is None else positions
    return plan_reading(model, chats, sites=codec.site, positions=where, batching=batching)


def group_by_prompt(chats: Sequence[Chat | str]) -> tuple[Int64[Tensor, " chat"], tuple[str, ...]]:
    """Number the prompts of chats in order; responses to one prompt share its number.

    Returns:
        The prompt's number of each chat, and the hash of each prompt.
    """
    places: dict[str, int] = {}
    found = [places.setdefault(prompt_hash(chat), len(places)) for chat in as_chats(chats)]
    return torch.tensor(found), tuple(places)


def accumulate_codes(
    plan: ReadingPlan,
    codec: SparseCodec,
    *,
    prompts: Int64[Tensor, " chat"],
    n_prompts: int,
    keep_codes: bool = True,
) -> FeatureAccumulator:
    """Run a plan and sum activations and codes by prompt.

    Args:
        plan: of one site and positions, by `plan_codes`.
        codec: its codec.
        prompts: number of each chat's prompt.
        n_prompts: prompts of the whole run, of which a shard's plan may hold only some.
        keep_codes: whether codes are summed by prompt and latent, beside how often they are active.
    """
    found = FeatureAccumulator(
        count_models(plan.model),
        n_prompts=n_prompts,
        d_in=codec.d_in,
        d_sae=codec.d_sae,
        keep_codes=keep_codes,
    )

    def count(site: Site, x: Tensor, chosen: tuple) -> None:
        (selection,) = chosen
        count_rows(found, codec, prompts=prompts[selection.rows], x=selection.take(x))

    for _ in plan.read(count, TASK):
        pass
    return found


def count_rows(
    found: FeatureAccumulator,
    codec: SparseCodec,
    *,
    prompts: Int64[Tensor, " n"],
    x: Float[Tensor, "models n d_in"],
) -> None:
    """Encode rows of all models, a chunk at a time, and add them to the sums.

    Rows that both models share to the last bit are encoded once.

    Args:
        found: what they are added to.
        codec: the codec.
        prompts: prompt of each row, on the CPU.
        x: activations, base first.
    """
    for part in split_rows(x.shape[1], codec.d_sae, device=codec.W_dec.device.type):
        chunk = place_rows(x[:, part], codec)
        found.update(prompts[part], chunk, encode_models(codec, chunk))
