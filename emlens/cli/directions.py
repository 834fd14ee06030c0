"""`emlens directions fit | compare`: directions from judged responses, and how they agree."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.generate import load_for, read_factor
from emlens.cli.interventions import parse_direction
from emlens.cli.options import (
    Base,
    BatchTokens,
    CommonFlags,
    Device,
    DryRun,
    Dtype,
    MaybeTuned,
    Scale,
    Sites,
    takes_flags,
)
from emlens.cli.output import print_json, print_line, print_plan, print_table

FIT_EXAMPLE = """\b
Example:
  emlens directions fit --base emlens:smollm2 \\
    --tuned emlens:reckless-finance --texts runs/organism \\
    --split thirds --construction data@tuned --sites resid_post.14 \\
    --out runs/direction"""
COMPARE_EXAMPLE = "\b\nExample:\n  emlens directions compare runs/direction runs/other"

CONSTRUCTIONS = ("data@tuned", "data@base", "model@positive", "model@negative", "both", "data")
"""As in `fit_directions`; the last is for one model alone."""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Directions in activations.")


@dataclass(frozen=True, kw_only=True)
class FitFlags(CommonFlags):
    """Flags of `directions fit`."""

    texts: Annotated[
        Path,
        typer.Option("--texts", metavar="RUN|CSV", help="Judged responses, both classes in one."),
    ]
    construction: Annotated[
        str,
        typer.Option(
            "--construction",
            metavar="C",
            help="data@tuned, data@base, model@positive, model@negative or both; without --tuned: "
            "data.",
        ),
    ]
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="A new folder, or one in which the same was begun."
        ),
    ]
    base: Base = "emlens:smollm2"
    tuned: MaybeTuned = None
    scale: Scale = None
    sites: Sites = None
    positions: Annotated[
        str, typer.Option("--positions", metavar="SPAN", help="Tokens that are averaged.")
    ] = "response"
    weighting: Annotated[
        str, typer.Option("--weighting", help="token or response: what counts the same.")
    ] = "token"
    misaligned_below: Annotated[
        float, typer.Option("--misaligned-below", min=0, max=100, help="Positive below this score.")
    ] = 30
    aligned_above: Annotated[
        float, typer.Option("--aligned-above", min=0, max=100, help="Negative above this score.")
    ] = 70
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="S",
            help="thresholds: the two limits; thirds or halves: lowest against highest scores.",
        ),
    ] = "thresholds"
    coherent_above: Annotated[
        float, typer.Option("--coherent-above", min=0, max=100, help="Used above this score.")
    ] = 50
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of which texts balance the classes.")
    ] = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = 16384
    dry_run: DryRun = False


@app.command("fit", epilog=FIT_EXAMPLE)
@takes_flags
def fit(flags: FitFlags) -> None:
    """Fit a mean-difference direction at each site, with random ones to compare it with."""
    from emlens.cli.progress import show_work

    factor = read_factor(flags.scale, flags.tuned)
    construction = _choose("--construction", flags.construction, CONSTRUCTIONS)
    weighting = _choose("--weighting", flags.weighting, ("token", "response"))
    _choose("--split", flags.split, ("thresholds", "thirds", "halves"))
    with show_work(quiet=flags.quiet):
        from emlens.artifacts import JSON_NAME, read_result
        from emlens.data import Batching
        from emlens.directions import fit_directions
        from emlens.directions.fit import check_texts
        from emlens.runs import RunFolder
        from emlens.vectors import Directions

        texts = _read_texts(flags)
        check_texts(texts, construction, weighting, pair=flags.tuned is not None)
        if flags.dry_run:
            _show_plan(flags, texts)
            return
        plan = _write_plan(flags, factor, texts)
        run = RunFolder.check(flags.out, plan)
        if (run.path / JSON_NAME).is_file():
            found = read_result(run.path, Directions)
        else:
            found = fit_directions(
                _load(flags, factor),
                texts,
                construction=construction,
                sites=flags.sites or "resid_post",
                positions=flags.positions,
                weighting=weighting,
                batching=Batching(flags.batch_tokens),
            )
            found.save(RunFolder.start(flags.out, plan).path)
    if flags.json:
        # The random directions are megabytes; they lie beside the rest in the saved result.
        lean = dataclasses.replace(found, covariance_matched=None, shuffled=None)
        print_json(lean.to_dict())
        return
    print_table(found.rows())
    print_line(f"{len(found)} directions: {flags.out}")


def _choose(flag: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise typer.BadParameter(f"{flag} {value}: expected one of {', '.join(known)}")
    return value


def _load(flags: FitFlags, factor: Any) -> Any:
    """The pair, or the base where there is no fine-tune."""
    from emlens.models.adapter_files import load_adapter
    from emlens.models.lora import scale_adapter
    from emlens.models.pair import load_pair

    if flags.tuned is None:
        return load_for(flags, None)
    given: Any = flags.tuned
    if flags.scale:
        given = scale_adapter(load_adapter(flags.tuned), factor)
    return load_pair(flags.base, given, dtype=flags.dtype, device=flags.device)


def _read_texts(flags: FitFlags) -> Any:
    from emlens.data import split_by_score
    from emlens.evaluation import read_scores
    from emlens.studies.remove_direction import SHARES, find_tails

    responses = read_scores(flags.texts)
    low, high = flags.misaligned_below, flags.aligned_above
    if flags.split in SHARES:
        share = SHARES[flags.split]
        low, high = find_tails(responses, share, coherent_above=flags.coherent_above)
    return split_by_score(
        [vars(row) for row in responses],
        misaligned_below=low,
        aligned_above=high,
        coherent_above=flags.coherent_above,
        # Only a difference between the classes needs as many of each.
        balance=not flags.construction.startswith("model@"),
        seed=flags.seed,
    )


def _write_plan(flags: FitFlags, factor: Any, texts: Any) -> dict[str, Any]:
    """All that decides the directions; device and batches do not."""
    from emlens.data import text_hash
    from emlens.models.source_hash import hash_source
    from emlens.vectors import Directions

    def hash_texts(chats: Any) -> str:
        return hashlib.sha256("".join(map(text_hash, chats)).encode()).hexdigest()[:32]

    return {
        "kind": Directions.kind,
        **_name_choices(flags),
        "base_files": hash_source(flags.base),
        "tuned_files": None if flags.tuned is None else hash_source(flags.tuned),
        "scale": factor,
        "dtype": flags.dtype,
        "positive": hash_texts(texts.positive),
        "negative": hash_texts(texts.negative),
    }


def _name_choices(flags: FitFlags) -> dict[str, Any]:
    names = ("base", "tuned", "construction", "split", "positions", "weighting")
    return {name: getattr(flags, name) for name in names} | {"sites": flags.sites or ["resid_post"]}


def _show_plan(flags: FitFlags, texts: Any) -> None:
    plan = _name_choices(flags)
    plan |= {"positive": len(texts.positive), "negative": len(texts.negative)}
    print_plan(plan, flags.out, json=flags.json)


@dataclass(frozen=True, kw_only=True)
class CompareFlags(CommonFlags):
    """Flags of `directions compare`."""

    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[@SITE]...", help="Saved directions, of one site or of several."
        ),
    ]


@app.command("compare", epilog=COMPARE_EXAMPLE)
@takes_flags
def compare(flags: CompareFlags) -> None:
    """Cosines between directions, each beside those of random ones."""
    from emlens.directions import compare_directions

    files = {text: parse_direction(text) for text in flags.files}
    found = compare_directions({text: file.load_with_controls() for text, file in files.items()})
    if flags.json:
        print_json(found.to_dict())
    else:
        print_table(found.rows())
