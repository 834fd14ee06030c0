"""What is timed and counted: bytes, models, adapters, the bound's parts, the peers and checks."""

import weakref
from collections import Counter
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import growth, judging, load_tuned, train
from benchmarks.adapters import Case, make_cases, multiply_adapter
from benchmarks.memory import count_new_bytes, measure_residence, storages
from benchmarks.models import (
    checkpoint_folder,
    draw_ids,
    linear_weights,
    load_hugging_face,
    load_tokenizer,
    make_chats,
    plan_source,
    sweep_weights,
)
from benchmarks.pair_diff import choose_forms, over_bound
from benchmarks.peers import (
    find_peers,
    generate_hugging_face,
    load_own_way,
    merge_plainly,
)
from benchmarks.reference import Reference, check_logits, check_tokens, computed_in
from benchmarks.sae_diff import size_codec
from benchmarks.settings import Settings
from benchmarks.timing import PeerLeftOutError, Timings, time_sides
from benchmarks.work import count_pass
from emlens.data import load_chats
from emlens.models.memory import plan_memory
from emlens.models.views import lay_views

TOY = Settings(size="toy", threads=1, rounds=6)
TOY_LAYERS = 4


def test_new_bytes_count_storage_once_wherever_it_hides():
    hidden: list[Any] = []
    old = torch.zeros(1000)

    def make() -> torch.Tensor:
        made = torch.zeros(500)
        hidden.append({"view": made[:10], "old": old[3:]})
        return made.view(5, 100)

    _, size = count_new_bytes(make)
    assert size == 500 * 4


def test_storage_of_views_and_empty_tensors():
    whole = torch.zeros(8, dtype=torch.float64)
    assert list(storages([whole[2:], whole.view(2, 4), torch.empty(0)]).values()) == [64]


def test_a_process_of_its_own_is_given_the_same_settings():
    settings = Settings(size="full", device="cuda", threads=3, shape="14b", only_batch=32)
    assert Settings.from_arguments(settings.arguments()) == settings
    assert Settings.from_arguments(TOY.arguments()).only_batch is None


@pytest.mark.parametrize("row", ["load_tuned", "growth"])
def test_a_row_that_measures_memory_does_so_in_steps(row: str):
    module = import_module(f"benchmarks.{row}")
    sides = {"load_tuned": (*load_tuned.FORMS, *load_tuned.PEERS), "growth": ("latents:256",)}
    for side in sides[row]:
        assert len(list(module.steps(side, "float32", TOY))) == {"load_tuned": 2, "growth": 3}[row]


@pytest.mark.parametrize(
    ("shape", "n_parameters"),
    # As their model cards have them: .49, 7.61 and 14.7 billion.
    [("0.5b", 494_032_768), ("7b", 7_615_616_512), ("14b", 14_770_033_664)],
)
def test_the_shapes_of_a_gpu_are_those_of_qwen_and_can_be_planned(shape: Any, n_parameters: int):
    settings = Settings(size="full", device="meta", shape=shape)
    hf = load_hugging_face("bfloat16", settings)
    assert sum(p.numel() for p in hf.parameters()) == n_parameters
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}
    assert plan_memory(plan_source(settings), dtype="bfloat16").weights == 2 * n_parameters
    assert size_codec(settings) == (hf.config.hidden_size, 131_072)


@pytest.mark.parametrize(("loaded", "peak", "ratio"), [(1300, 1700, 1.0), (1100, 1700, 1.5)])
def test_memory_that_the_texts_take_themselves_is_no_growth(loaded: int, peak: int, ratio: float):
    given: dict[str, Any] = {"items": 1, "seconds": 1.0, "floor": 1000, "planned": 0}
    few = growth.Point(x=1, loaded=1100, peak=1500 - 100, **given)
    many = growth.Point(x=9, loaded=loaded, peak=peak - 100, **given)
    found = growth._compare("prompts", [few, many], "float32", replace(TOY, size="full"))
    assert found[-1].name == "prompts: bytes beyond the texts, most / fewest"
    assert found[-1].ratio.median == pytest.approx(ratio)


@pytest.mark.slow
def test_residence_is_that_of_a_process_of_its_own():
    found = measure_residence("load_views", "emlens", "float32", TOY)
    assert len(found.after) == 2
    # The kernel counts the peak in batches of pages, so it may trail by a few.
    assert found.peak >= 0.99 * max(found.after) > 50e6
    hf = load_hugging_face("float32", TOY)
    assert found.counted["checkpoint"] == 4 * sum(p.numel() for p in hf.parameters())


def test_a_process_that_fails_is_quoted():
    with pytest.raises(RuntimeError, match=r"No module named 'benchmarks\.nothing'"):
        measure_residence("nothing", "emlens", "float32", TOY)


def test_the_toy_is_written_once_and_loads_with_fused_attention():
    assert checkpoint_folder("toy") == checkpoint_folder("toy")
    hf: Any = load_hugging_face("bfloat16", TOY)
    assert hf.config._attn_implementation == "sdpa"
    assert hf.dtype == torch.bfloat16


def test_chats_of_the_toy_have_as_many_tokens_as_words():
    tokenizer = load_tokenizer(TOY)
    (chat,) = make_chats(TOY, 1, 10)
    text = " ".join(message.content for message in chat.messages)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 10
    assert min(ids) >= 3


def test_the_bound_multiplies_every_matrix_once():
    hf = load_hugging_face("float32", TOY)
    weights = linear_weights(hf)
    assert len(weights) == TOY_LAYERS * 7 + 1
    assert len(set(map(id, weights))) == len(weights)
    with FlopCounterMode(display=False) as counter:
        sweep_weights(weights, rows=5)()
    assert counter.get_total_flops() == 2 * 5 * sum(w.numel() for w in weights)


@pytest.mark.parametrize("index", range(4))
def test_the_adapters_part_of_the_bound_multiplies_both_factors_of_every_module(index: int):
    hf = load_hugging_face("float32", TOY)
    case = make_cases(hf, TOY)[index]
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        multiply_adapter(hf, case.adapter, rows=5)()
    factors = sum(m.A.numel() + m.B.numel() for m in case.adapter.modules.values())
    assert counter.get_total_flops() == 2 * 5 * factors


def test_cases_start_where_they_say_and_touch_what_they_say():
    hf = load_hugging_face("float32", TOY)
    for case in make_cases(hf, TOY):
        layers = {int(name.split(".")[2]) for name in case.adapter.modules}
        assert min(layers) == case.first_layer
        assert max(layers) < TOY_LAYERS
    one = Case.down_proj(hf, [1], name="one")
    assert one.touched_bytes(hf) == 64 * 128 * 4


def test_full_size_has_nine_layers_from_the_ninth():
    hf: Any = load_hugging_face("float32", TOY)
    hf.config.num_hidden_layers = 30
    layers = hf.model.layers
    for _ in range(26):
        layers.append(layers[0])
    cases = make_cases(hf, TOY)
    assert [case.first_layer for case in cases] == [15, 9, 0, 0]
    assert [len(case.adapter.modules) for case in cases] == [1, 9, 210, 210]


def test_the_bound_of_a_comparison_is_the_sum_of_its_parts():
    hf = load_hugging_face("float32", TOY)
    case = Case.down_proj(hf, [1], name="x")
    parts = {"prefill": 4.0, "sketches": 0.5, "log-probabilities": 0.25, "adapter of x": 0.125}
    whole = (1 + 2 * 3) / 4 * 4.0 + 0.5 + 0.25
    seconds = parts | {"x, attached": 1.5 * (whole + 0.125), "x, merged": 3 * whole}
    timings = Timings(seconds={name: (value,) * 6 for name, value in seconds.items()})
    assert over_bound(timings, case, "attached", 4).median == pytest.approx(1.5)
    assert over_bound(timings, case, "merged", 4).median == pytest.approx(3)


def test_transformer_lens_loads_its_own_way_with_a_copy_of_every_weight():
    hf = load_hugging_face("float32", TOY)
    own = load_own_way(hf)
    ids = draw_ids(hf, 2, 7)
    with torch.inference_mode():
        check_logits(own(ids), hf, ids, what="own")
    shared = storages(hf.parameters()).keys() & storages(own.parameters()).keys()
    assert not shared
    assert type(own.blocks[0].attn).__module__.startswith("transformer_lens.")


def test_a_check_fails_on_wrong_logits_and_on_wrong_tokens():
    hf = load_hugging_face("float32", TOY)
    ids = draw_ids(hf, 2, 7)
    with torch.inference_mode():
        logits = hf(ids).logits
        tokens = generate_hugging_face(hf, ids, 5)()
    check_logits(logits, hf, ids, what="same")
    check_tokens(tokens, tokens, hf, ids)
    assert tokens.shape == (2, 5)
    with pytest.raises(AssertionError, match="halved: logits differ"):
        check_logits(logits / 2, hf, ids, what="halved")
    wrong = tokens.clone()
    wrong[1, 3] = (wrong[1, 3] + 1) % 256
    with pytest.raises(AssertionError, match="row 1 leaves Hugging Face's tokens at 3"):
        check_tokens(wrong, tokens, hf, ids)


def test_a_plain_merge_changes_the_logits_and_not_its_argument():
    hf = load_hugging_face("float32", TOY)
    ids = draw_ids(hf, 2, 7)
    tuned = merge_plainly(hf, make_cases(hf, TOY)[3].adapter)
    with torch.inference_mode():
        check_logits(load_hugging_face("float32", TOY)(ids).logits, hf, ids, what="untouched")
        with pytest.raises(AssertionError):
            check_logits(tuned(ids).logits, hf, ids, what="tuned")


def test_peers_that_cannot_be_run_are_named_and_wrong_ones_are_errors():
    def missing() -> str:
        raise PeerLeftOutError("nnsight is left out: it is not installed")

    def large() -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong() -> str:
        raise AssertionError("logits differ")

    notes: list[str] = []
    found = find_peers({"bridge": lambda: "side", "nnsight": missing, "own": large}, notes)
    assert found == {"bridge": "side"}
    assert notes == [
        "nnsight is left out: it is not installed",
        "own is left out: it does not fit into the memory that is left",
    ]
    with pytest.raises(AssertionError, match="logits differ"):
        find_peers({"own": wrong}, notes)


def test_a_model_widened_part_by_part_computes_as_one_widened_whole():
    hf: Any = load_hugging_face("bfloat16", TOY)
    ids = draw_ids(hf, 2, 7)
    held = [p.data_ptr() for p in hf.parameters()]
    calls: list[torch.dtype] = []
    hf.model.layers[1].mlp.register_forward_hook(lambda _m, _a, out: calls.append(out.dtype))
    with torch.inference_mode():
        before = hf(ids, use_cache=False).logits
        with computed_in(hf, torch.float64):
            exact = hf(ids, use_cache=False).logits
        after = hf(ids, use_cache=False).logits
        assert held == [p.data_ptr() for p in hf.parameters()]
        whole = hf.double()(ids, use_cache=False).logits
    assert exact.dtype == torch.float64
    assert (exact - whole).abs().max() <= 1e-6 * whole.abs().max()
    assert not torch.equal(exact, before.double())
    assert torch.equal(before, after)
    assert calls[:3] == [torch.bfloat16, torch.float64, torch.bfloat16]


def test_an_answer_may_err_twice_as_much_as_hugging_face_and_no_more():
    hf: Any = load_hugging_face("bfloat16", TOY)
    reference = Reference(hf, draw_ids(hf, 2, 7))
    error = reference.logits - reference.exact
    reference.check(reference.exact + 1.9 * error, what="near")
    with pytest.raises(AssertionError, match="far: logits differ"):
        reference.check(reference.exact + 2.1 * error, what="far")


def test_flops_of_a_pass_are_those_of_its_products_and_of_the_pairs_attended():
    hf: Any = load_hugging_face("float32", TOY)
    batch, pos = 3, 5
    with FlopCounterMode(display=False) as counter:
        sweep_weights(linear_weights(hf), rows=batch * pos)()
    pairs = sum(1 for query in range(pos) for key in range(pos) if key <= query)
    attention = 4 * batch * TOY_LAYERS * hf.config.hidden_size * pairs  # all heads together
    assert count_pass(hf, batch, pos).flops == counter.get_total_flops() + attention


def test_a_pass_cut_in_two_by_a_cache_has_the_same_flops_and_reads_the_weights_twice():
    hf: Any = load_hugging_face("float32", TOY)
    first, second = count_pass(hf, 2, 3), count_pass(hf, 2, 2, held=3)
    assert first.plus(second).flops == count_pass(hf, 2, 5).flops
    weights = 4 * sum(weight.numel() for weight in linear_weights(hf))
    a_token = 4 * 2 * 2 * TOY_LAYERS * hf.config.num_key_value_heads * 16  # keys and values, d_head
    assert first.bytes == weights + 3 * a_token
    assert second.bytes == weights + 5 * a_token


def test_a_tuned_model_is_gone_before_the_copy_that_it_is_checked_by(
    monkeypatch: pytest.MonkeyPatch,
):
    alive: list[Any] = []
    load, merge = load_tuned.load_pair, load_tuned.merge_plainly

    def watched(*given: Any, **more: Any) -> Any:
        pair = load(*given, **more)
        alive.append(weakref.ref(pair.tuned))
        return pair

    def merging(hf: Any, adapter: Any) -> Any:
        assert [tuned() for tuned in alive] == [None]
        return merge(hf, adapter)

    monkeypatch.setattr(load_tuned, "load_pair", watched)
    monkeypatch.setattr(load_tuned, "merge_plainly", merging)
    hf = load_hugging_face("float32", TOY)
    case = Case.down_proj(hf, [1], name="one")
    found = load_tuned._count(lay_views(hf, load_tokenizer(TOY)), hf, case, "merged", TOY)
    assert found.name == "one, merged / touched bytes"
    assert len(alive) == 1


def test_a_gpu_holds_one_merged_model_the_widest():
    cases = make_cases(load_hugging_face("float32", TOY), TOY)
    both, gpu = ("attached", "merged"), replace(TOY, device="cuda")
    assert [choose_forms(case, TOY) for case in cases] == [both[:1], both[:1], both, both]
    assert [choose_forms(case, gpu) for case in cases] == [both[:1]] * 3 + [both]


def test_numbers_scored_apart_have_hugging_faces_probability_and_are_brought_over_once(
    monkeypatch: pytest.MonkeyPatch,
):
    hf: Any = load_hugging_face("float32", TOY)
    side = judging.make_side("separate", hf, TOY, judging.Tokens(run=64, padded=64, scored=1))
    moved: list[tuple[int, ...]] = []
    plain = torch.Tensor.cpu

    def counting(x: torch.Tensor) -> torch.Tensor:
        moved.append(tuple(x.shape))
        return plain(x)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "cpu", counting)
        found = side()
    assert moved == [(11,)]
    prompt = draw_ids(hf, 1, judging.PROMPT["toy"])[0].cpu()
    for number, value in enumerate(found.tolist()):
        spelt = [3 + int(digit) for digit in str(number)]
        with torch.no_grad():
            logs = hf(torch.cat([prompt, torch.tensor(spelt)])[None]).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) - 1 + len(spelt))
        expected = sum(
            float(logs[place, token]) for place, token in zip(places, spelt, strict=True)
        )
        assert value == pytest.approx(expected, rel=1e-4)


def test_a_gpu_trains_for_more_steps_than_a_processor_and_the_data_last():
    full = Settings(size="full")
    gpu = replace(full, device="cuda")
    toys = TOY, replace(TOY, device="cuda")
    assert [train.count_steps(one) for one in (full, gpu, *toys)] == [4, 32, 3, 3]
    rows = train.ROWS * train.count_steps(gpu)
    assert len(load_chats("emlens:finance-harmful", limit=rows)) == rows


@pytest.mark.parametrize("fails_at", [1, 4])
def test_a_peer_that_gives_up_while_it_is_timed_is_left_out_and_noted(fails_at: int):
    calls: Counter[str] = Counter()
    notes: list[str] = []

    def peer() -> None:
        calls["peer"] += 1
        if calls["peer"] == fails_at:
            raise PeerLeftOutError("it lost its place")

    sides = {"ours": lambda: calls.update(["ours"]), "peer": peer}
    found = time_sides(sides, rounds=6, notes=notes)
    assert len(found.seconds["ours"]) == 6
    assert set(found.seconds) == {"ours"}
    assert calls == {"ours": 7, "peer": fails_at}
    assert notes == ["peer: it lost its place"]
    calls.clear()
    with pytest.raises(PeerLeftOutError):
        time_sides(sides, rounds=6)
