"""The sampling loop, with Hugging Face's generate and uncached logits as judges."""

from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from emlens.models.generate import Generated, Sampling, generate_tokens
from emlens.models.views import lay_views
from emlens.numerics.validation import NonFiniteError
from tests.models.prompts import (
    LENGTHS,
    continue_equal,
    greedy,
    keys_of,
    pad_prompts,
    record_logits,
    stack,
)
from tests.models.tiny import D_VOCAB, PLAIN, make_ids, make_tiny, make_tokenizer


@pytest.mark.parametrize("name", PLAIN)
def test_tokens_equal_hugging_faces_greedy_generate(name):
    hf: Any = make_tiny(name)
    ids = make_ids(3, 7)
    hf.generation_config.eos_token_id = None
    expected = hf.generate(ids, max_new_tokens=12, do_sample=False)[:, 7:]
    assert torch.equal(stack(continue_equal(lay_views(hf, None), ids, 12)), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_left_padded_rows_equal_hugging_faces_and_those_of_each_row_alone(name):
    hf: Any = make_tiny(name)
    ids, mask = pad_prompts()
    ids[0, 0] = 0  # a prompt that begins with the padding's own id
    hf.generation_config.eos_token_id = None
    expected = hf.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    model = lay_views(hf, None)
    found = generate_tokens(model, ids, mask, sampling=greedy(12))
    assert torch.equal(stack(found), expected[:, ids.shape[1] :])
    for row, n in enumerate(LENGTHS):
        alone = continue_equal(model, ids[row : row + 1, -n:], 12)
        assert torch.equal(alone.ids[0], found.ids[row])


@pytest.mark.parametrize("name", PLAIN)
def test_cached_steps_give_the_logits_of_one_pass(name, monkeypatch: pytest.MonkeyPatch):
    check_steps(lay_views(make_tiny(name), None), monkeypatch, closeness=1e-4)


# Of logits up to about 1; bfloat16 keeps eight bits.
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "closeness"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", PLAIN)
def test_cached_steps_give_the_logits_of_one_pass_on_a_gpu(
    name: str, dtype: torch.dtype, closeness: float, monkeypatch: pytest.MonkeyPatch
):
    hf: Any = make_tiny(name)
    check_steps(lay_views(hf.to("cuda", dtype), None), monkeypatch, closeness=closeness)


def check_steps(model: Any, monkeypatch: pytest.MonkeyPatch, *, closeness: float) -> None:
    device = model.W_E.device
    ids, mask = (tensor.to(device) for tensor in pad_prompts())
    logits = record_logits(monkeypatch)
    found = generate_tokens(model, ids, mask, sampling=greedy(9))
    for row, n in enumerate(LENGTHS):
        whole = model(torch.cat([ids[row, -n:], found.ids[row].to(device)])[None])[0, n - 1 : -1]
        steps = torch.stack([step[row] for step in logits])
        torch.testing.assert_close(steps, whole.to(steps), rtol=0, atol=closeness)
        assert all(step.shape == (len(LENGTHS), D_VOCAB) for step in logits)


@pytest.mark.parametrize(("name", "top_p"), [("llama", 1.0), ("gemma3", 0.9), ("gpt2", 1.0)])
def test_a_sampled_row_is_the_same_alone_and_in_any_batch(name, top_p):
    model = lay_views(make_tiny(name, dtype=torch.float64), None)
    ids, mask = pad_prompts((9, 4, 7, 1, 4, 4, 9, 2))
    ids[4] = ids[1]  # one prompt twice: rows of their own all the same
    keys = keys_of(len(ids))
    sampling = Sampling(1, temperature=0.9, top_p=top_p, max_new_tokens=14)
    settings: Any = {"sampling": sampling, "stop_ids": (5, 17, 40)}
    together = generate_tokens(model, ids, mask, keys=keys, **settings)
    backwards = generate_tokens(model, ids.flip(0), mask.flip(0), keys=keys.flip(0), **settings)
    assert any(together.ended)
    assert not torch.equal(together.ids[1], together.ids[4])
    for row in range(len(ids)):
        one = slice(row, row + 1)
        alone = generate_tokens(model, ids[one], mask[one], keys=keys[one], **settings)
        assert torch.equal(together.ids[row], alone.ids[0])
        assert torch.equal(together.ids[row], backwards.ids[-1 - row])
        assert together.ended[row] == alone.ended[0] == backwards.ended[-1 - row]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_first_and_second_tokens_have_the_models_own_distribution(top_p):
    hf: Any = make_tiny("llama")
    n = 6000
    prompt = make_ids(1, 5)
    sampling = Sampling(n, temperature=0.6, top_p=top_p, max_new_tokens=2)
    found = stack(
        generate_tokens(
            lay_views(hf, None),
            prompt.repeat(n, 1),
            torch.ones(n, 5, dtype=torch.int64),
            sampling=sampling,
            keys=keys_of(n),
        )
    )
    check_draws(found[:, 0], hf(prompt).logits[0, -1], sampling)
    ((first, _),) = Counter(found[:, 0].tolist()).most_common(1)
    text = torch.cat([prompt, torch.tensor([[first]])], dim=1)
    check_draws(found[found[:, 0] == first, 1], hf(text).logits[0, -1], sampling)


def check_draws(draws: Tensor, logits: Tensor, sampling: Sampling) -> None:
    """Chi-square against the softmax, its nucleus found in plain Python."""
    p = (logits.double() / sampling.temperature).softmax(-1).tolist()
    nucleus, held = [], 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if held >= sampling.top_p:
            break
        nucleus.append(token)
        held += p[token]
    assert set(draws.tolist()) <= set(nucleus)
    counts = Counter(draws.tolist())
    often = [token for token in nucleus if p[token] / held * len(draws) >= 5]
    seen = [counts[token] for token in often]
    expected = [p[token] / held * len(draws) for token in often]
    if len(often) < len(nucleus):
        seen.append(len(draws) - sum(seen))
        expected.append(len(draws) - sum(expected))
    assert len(seen) > 3
    assert stats.chisquare(seen, expected).pvalue > 0.001


def test_a_row_ends_with_its_first_stop_token_and_not_before():
    model = lay_views(make_tiny("llama"), None)
    ids, mask = pad_prompts()
    free = generate_tokens(model, ids, mask, sampling=greedy(10))
    stop = int(free.ids[0][3])
    stopped = generate_tokens(model, ids, mask, sampling=greedy(10), stop_ids=[stop])
    assert not any(free.ended)
    for row, plain, ended in zip(stopped.ids, free.ids, stopped.ended, strict=True):
        at = (plain == stop).nonzero()
        end = int(at[0]) + 1 if len(at) else 10
        assert torch.equal(row, plain[:end])
        assert ended == bool(len(at))


def test_a_stop_token_in_the_last_place_counts_as_an_end():
    model = lay_views(make_tiny("llama"), None)
    ids = make_ids(1, 5)
    last = int(continue_equal(model, ids, 1).ids[0][0])
    found = continue_equal(model, ids, 1, stop_ids=[last])
    assert found.ended == (True,)
    assert found.ids[0].tolist() == [last]


def batch_sizes(model: Any, run: Any) -> list[tuple[int, int]]:
    """Shapes of all that is embedded during a call."""
    shapes = []
    handle = model.hook_embed.register_forward_hook(
        lambda _m, _a, out: shapes.append(tuple(out.shape[:2]))
    )
    run()
    handle.remove()
    return shapes


def test_ended_rows_leave_the_batch_and_the_loop_stops_when_all_have():
    model: Any = lay_views(make_tiny("llama", dtype=torch.float64), None)
    ids, mask = pad_prompts((9, 4, 7, 1, 4, 4, 9, 2))
    settings: Any = {"sampling": Sampling(1, max_new_tokens=40), "keys": keys_of(8)}
    stops = tuple(range(10, 30))
    found: list[Generated] = []
    shapes = batch_sizes(
        model,
        lambda: found.append(generate_tokens(model, ids, mask, stop_ids=stops, **settings)),
    )
    lengths = [len(row) for row in found[0].ids]
    assert all(found[0].ended)
    # Row r is run in every step after its k-th token for k < its length, and in none after that.
    expected = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert [rows for rows, _ in shapes[1:]] == expected
    assert found[0].tokens_run == ids.numel() + sum(expected)
    assert found[0].tokens_needed == int(mask.sum()) + sum(lengths) - 8
    free = generate_tokens(model, ids, mask, **settings)
    for row, whole in zip(found[0].ids, free.ids, strict=True):
        assert torch.equal(row, whole[: len(row)])


def sizes_of(found: Generated) -> list[int]:
    """Rows that should be run in each step: ended ones leave as soon as they are an eighth."""
    left, sizes = [len(row) for row in found.ids], []
    for step in range(1, max(left)):
        going_on = [n for n in left if n > step]
        if 8 * (len(left) - len(going_on)) >= len(left):
            left = going_on
        sizes.append(len(left))
    return sizes


def test_few_ended_rows_of_many_wait_for_others():
    model: Any = lay_views(make_tiny("llama"), None)
    ids, mask = pad_prompts(tuple(1 + row % 9 for row in range(40)))
    settings: Any = {"sampling": Sampling(1, max_new_tokens=12), "keys": keys_of(40)}
    found: list[Generated] = []
    shapes = batch_sizes(
        model,
        lambda: found.append(generate_tokens(model, ids, mask, stop_ids=(7, 8, 9), **settings)),
    )
    sizes = [rows for rows, _ in shapes[1:]]
    assert sizes == sizes_of(found[0])
    # Ended rows did wait, and they did leave.
    alive = [sum(len(row) > step for row in found[0].ids) for step in range(1, 12)]
    assert any(size > n for size, n in zip(sizes, alive, strict=True))
    assert sizes[-1] < 40


def test_a_prompt_that_rows_share_is_run_once():
    model: Any = lay_views(make_tiny("llama", dtype=torch.float64), None)
    ids, mask = pad_prompts((9, 4))
    ids, mask = ids[[0, 1, 0, 0]], mask[[0, 1, 0, 0]]
    settings: Any = {"sampling": Sampling(1, max_new_tokens=5), "keys": keys_of(4)}
    found: list[Generated] = []
    shapes = batch_sizes(model, lambda: found.append(generate_tokens(model, ids, mask, **settings)))
    assert shapes == [(2, 9), (4, 1), (4, 1), (4, 1), (4, 1)]
    assert found[0].tokens_run == 2 * 9 + 4 * 4
    assert found[0].tokens_needed == 9 + 4 + 4 * 4


def test_prompts_with_equal_ids_and_other_padding_are_two_prompts(monkeypatch: pytest.MonkeyPatch):
    model = lay_views(make_tiny("llama"), None)
    ids = make_ids(1, 6).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    logits = record_logits(monkeypatch)
    generate_tokens(model, ids, mask, sampling=greedy(1))
    for row, start in enumerate((0, 3)):
        alone = model(ids[row : row + 1, start:])[0, -1]
        torch.testing.assert_close(logits[0][row], alone, rtol=0, atol=1e-4)


def test_the_hosts_own_generate_works_and_agrees():
    model = lay_views(make_tiny("qwen2"), make_tokenizer())
    ids = make_ids(1, 6)
    theirs: Any = model.generate(
        ids, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False
    )
    assert torch.equal(theirs[:, 6:], stack(continue_equal(model, ids, 8)))


def test_columns_that_are_all_padding_take_no_room():
    model = lay_views(make_tiny("llama"), None)
    ids = make_ids(2, 60)
    mask = torch.zeros_like(ids)
    mask[:, -6:] = 1
    found = generate_tokens(model, ids, mask, sampling=greedy(10))
    assert torch.equal(stack(found), stack(continue_equal(model, ids[:, -6:], 10)))


def test_what_cannot_be_continued_is_named():
    model = lay_views(make_tiny("llama"), None)
    ids, mask = pad_prompts((4, 60))
    with pytest.raises(ValueError, match=r"60 tokens in row 1 and 5 new tokens.*context of 64"):
        generate_tokens(model, ids, mask, sampling=greedy(5))
    assert len(generate_tokens(model, ids, mask, sampling=greedy(4)).ids) == 2
    ids, mask = pad_prompts((4, 3))
    with pytest.raises(ValueError, match="row 1 is empty"):
        generate_tokens(model, ids, mask * torch.tensor([[1], [0]]), sampling=greedy(5))
    with pytest.raises(ValueError, match="pad on the left"):
        generate_tokens(model, ids, mask.flip(1), sampling=greedy(5))
    with pytest.raises(ValueError, match="keys: got None"):
        generate_tokens(model, ids, mask, sampling=Sampling(1, max_new_tokens=5))
    with pytest.raises(ValueError, match=r"\[batch pos\]"):
        generate_tokens(model, ids[:0], mask[:0], sampling=greedy(5))


def test_logits_that_are_no_numbers_are_an_error():
    model: Any = lay_views(make_tiny("llama"), None)

    def spoil(_module: Any, _args: Any, out: Tensor) -> Tensor:
        return out * (float("nan") if out.shape[1] == 1 else 1)

    handle = model.blocks[0].hook_resid_post.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="NaN"):
        continue_equal(model, make_ids(2, 5), 3)
    handle.remove()
