"""Load tuned: how many bytes does a second model over the same base own?

Bound: the matrices that the adapter touches (merged), or the adapter itself (attached).
Beside it: the same twice, that is a second model loaded TransformerLens's own way, and a second
Hugging Face model.

Bytes are those of all tensor storage alive after ``load_pair`` that was not alive before, the
adapter in the caller's hand left out; so what the proof, a hook or a table keeps is counted. What
the latest forward pass keeps for itself (rotations, masks) is that of one token.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.adapters import Case, make_cases
from benchmarks.memory import count_new_bytes, free_memory
from benchmarks.models import describe_model, draw_ids, load_hugging_face, load_tokenizer
from benchmarks.peers import find_peers, load_own_way, merge_plainly
from benchmarks.records import Figure, Record
from benchmarks.reference import check_logits
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import exact_ratio
from emlens.models.lora import LoraAdapter
from emlens.models.pair import ModelPair, load_pair
from emlens.models.views import lay_views

AIM = 1.05
FORMS = ("merged", "attached")
PEERS = ("transformer_lens", "huggingface")
SHOWN = ("nine down_proj, rank 1", "every module, rank 1", "every module, rank 32")


def measure(settings: Settings) -> Record:
    """Count, for each adapter, what either form owns."""
    figures: list[Figure] = []
    sizes: dict[str, Any] = {}
    notes = ["ratios beside peers are bytes of theirs over bytes of ours"]
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        sizes |= describe_model(hf)
        base = lay_views(hf, load_tokenizer(settings))
        _warm_up(base, hf)
        for case in make_cases(hf, settings):
            if case.name not in SHOWN:
                continue
            for form in FORMS:
                figures.append(_count(base, hf, case, form, settings))
        figures += _peers(base, hf, settings, notes)
    return Record(
        row="load_tuned",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={
            "merged_over_touched": f"{SHOWN[0]}, merged / touched bytes",
            "attached_over_adapter": f"{SHOWN[0]}, attached / adapter's bytes",
            "vs_huggingface": "second model's bytes / merged: huggingface",
        },
        notes=tuple(dict.fromkeys(notes)),
        peak_sides=(*FORMS, *PEERS),
    )


def _warm_up(base: Any, hf: Any) -> None:
    """Load one pair beforehand, so that tables shared by all models are not charged to one."""
    case = Case.down_proj(hf, [0], name="warm-up")
    load_pair(base, case.adapter, form="attached")


@torch.inference_mode()
def _load_and_settle(base: Any, adapter: LoraAdapter, form: Any) -> ModelPair:
    """Load a pair and run one token: what a pass leaves behind grows with that pass's tokens."""
    pair = load_pair(base, adapter, form=form)
    for model in (base, pair.tuned):
        model(torch.tensor([[3]], device=base.W_E.device))
    return pair


def _count(base: Any, hf: Any, case: Case, form: Any, settings: Settings) -> Figure:
    pair, owned = count_new_bytes(lambda: _load_and_settle(base, case.adapter, form))
    ids = draw_ids(hf, 2, 16)
    with torch.inference_mode():
        logits = pair.tuned(ids)
    # The model that it is checked by is a whole copy: beside a base and a merged one of 14 billion
    # parameters it does not fit into 80 GB.
    del pair
    free_memory()
    check_logits(logits, merge_plainly(hf, case.adapter), ids, what=f"{case.name} {form}")
    against = case.adapter.n_bytes if form == "attached" else case.touched_bytes(hf)
    what = "adapter's bytes" if form == "attached" else "touched bytes"
    return Figure(
        name=f"{case.name}, {form} / {what}",
        dtype=str(hf.dtype).removeprefix("torch."),
        ratio=exact_ratio(owned / against),
        better="lower",
        aim=settings.aim(AIM),
    )


def _peers(base: Any, hf: Any, settings: Settings, notes: list[str]) -> list[Figure]:
    """Bytes of a second model made the peers' way over those of our merged one."""
    dtype = str(hf.dtype).removeprefix("torch.")
    nine = _find_nine(hf, settings)
    ours = count_new_bytes(lambda: _load_and_settle(base, nine.adapter, "merged"))[1]
    counts: dict[str, Callable[[], int]] = {
        peer: (lambda peer=peer: count_new_bytes(lambda: _load_peer(peer, hf, settings))[1])
        for peer in PEERS
    }
    return [
        Figure(
            name=f"second model's bytes / merged: {peer}",
            dtype=dtype,
            ratio=exact_ratio(owned / ours),
            better="higher",
        )
        for peer, owned in find_peers(counts, notes).items()
    ]


def _find_nine(hf: Any, settings: Settings) -> Case:
    return next(case for case in make_cases(hf, settings) if case.name == SHOWN[0])


def _load_peer(peer: str, hf: Any, settings: Settings) -> Any:
    if peer == "transformer_lens":
        return load_own_way(hf)
    return load_hugging_face(str(hf.dtype).removeprefix("torch."), settings)


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load a base and run a token; then load a second model and run a token of it."""
    hf = load_hugging_face(dtype, settings)
    base, one = lay_views(hf, load_tokenizer(settings)), draw_ids(hf, 1, 1)
    with torch.inference_mode():
        base(one)
    yield {}
    if side in FORMS:
        second = _load_and_settle(base, _find_nine(hf, settings).adapter, side).tuned
    else:
        second = _load_peer(side, hf, settings)
    with torch.inference_mode():
        second(one)
    yield {}
    del second


if __name__ == "__main__":
    run_alone(measure)
