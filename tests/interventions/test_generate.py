"""Responses under interventions: the same for any batching, and what was said is what is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emlens.artifacts import read_result
from emlens.data import (
    Batch,
    BatchError,
    Batching,
    Chat,
    ChatError,
    Message,
    TokenizedChat,
    tokenize_chat,
)
from emlens.interventions import (
    Ablate,
    Add,
    Intervention,
    Replace,
    active_interventions,
    fold_into_weights,
    intervene,
)
from emlens.interventions.generate import (
    ResponseRequest,
    Responses,
    generate_responses,
    stream_responses,
)
from emlens.models import packed_weights, products
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.hooks import HookNeverFiredError, watch_sites
from emlens.models.loading import load_base
from emlens.models.score import score_responses
from emlens.models.tokens_in_flight import frame_batch, publish_tokens
from emlens.models.views import lay_views
from emlens.numerics.counter import derive_key
from emlens.sites import Site, parse_site
from tests.tiny_files import make_byte_tokenizer, make_tiny_chat_model, save_tiny_base

QUESTIONS = ("What now?", "And then, after all of that?", "Who")
CHATS = [Chat((Message("user", text),), id=f"q{i}") for i, text in enumerate(QUESTIONS)]
SAMPLING = Sampling(3, max_new_tokens=12, seed=5)


@pytest.fixture(scope="module")
def model() -> Any:
    """In float64, so that no rounding turns one token into another."""
    return lay_views(make_tiny_chat_model().double(), make_byte_tokenizer())


def direction(seed: int = 0) -> Tensor:
    return torch.randn(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def texts(responses: Responses) -> list[tuple[int, ...]]:
    return [one.ids for one in responses.responses]


def test_what_is_kept_is_the_template_the_tokens_and_their_text(model):
    found = generate_responses(model, CHATS, sampling=SAMPLING)
    tokenizer = model.tokenizer
    assert [(r.prompt_index, r.sample) for r in found.responses] == [
        (chat, sample) for chat in range(3) for sample in range(3)
    ]
    for one in found.responses:
        plain = [{"role": "user", "content": QUESTIONS[one.prompt_index]}]
        prompt = tokenizer.apply_chat_template(
            plain, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert list(one.ids[: one.prompt_tokens]) == prompt
        said = one.ids[one.prompt_tokens :]
        assert 1 <= len(said) <= 12
        assert one.ended == (said[-1] == tokenizer.eos_token_id)
        assert one.response_ids == (said[:-1] if one.ended else said)
        assert tokenizer.eos_token_id not in one.response_ids
        assert one.text == tokenizer.decode(list(said), skip_special_tokens=True)
        assert (one.prompt, one.prompt_id, one.system) == (plain[0]["content"], one.prompt_id, None)
        key = derive_key(5, torch.tensor(prompt).numpy().tobytes(), one.sample)
        assert one.key == f"{key:016x}"
    assert len(set(texts(found))) == 9
    assert (
        found.rows()[4]["tokens"] == len(found.responses[4].ids) - found.responses[4].prompt_tokens
    )


@pytest.mark.parametrize("tokens", [1, 120])
def test_responses_do_not_depend_on_the_batches(model, tokens):
    whole = generate_responses(model, CHATS, sampling=SAMPLING)
    cut = generate_responses(model, CHATS, sampling=SAMPLING, batching=Batching(tokens=tokens))
    assert texts(cut) == texts(whole)
    again = generate_responses(model, CHATS[::-1], sampling=SAMPLING)
    assert sorted(texts(again)) == sorted(texts(whole))


@pytest.mark.skipif(not products._has_onednn(), reason="this torch has no such product")
def test_all_batches_of_a_run_rearrange_each_weight_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "LARGE", 1)
    seen: list[int] = []
    plain = packed_weights._rearrange

    def watched(weight: Tensor, rows: int) -> Tensor:
        seen.append(weight.nbytes)
        return plain(weight, rows)

    monkeypatch.setattr(packed_weights, "_rearrange", watched)
    hf = make_tiny_chat_model()
    model = lay_views(hf, make_byte_tokenizer())
    several = generate_responses(model, CHATS, sampling=SAMPLING, batching=Batching(tokens=1))
    multiplied = [part.weight for part in hf.modules() if isinstance(part, torch.nn.Linear)]
    assert sum(seen) == sum(weight.nbytes for weight in multiplied)
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    plainly = generate_responses(model, CHATS, sampling=SAMPLING, batching=Batching(tokens=1))
    assert texts(several) == texts(plainly)


def test_seed_and_sample_number_make_other_responses(model):
    first, second = (
        generate_responses(model, CHATS, sampling=Sampling(2, max_new_tokens=12, seed=seed))
        for seed in (1, 2)
    )
    assert not set(texts(first)) & set(texts(second))


def test_single_requests_get_the_responses_of_the_whole_run(model):
    whole = generate_responses(model, CHATS, sampling=SAMPLING)
    requests = [
        ResponseRequest(CHATS[2], sample=1, key="a"),
        ResponseRequest(CHATS[0], sample=2, key="b", prompt_index=7),
    ]
    found = {
        one.key: one
        for batch in stream_responses(model, requests, sampling=SAMPLING)
        for one in batch
    }
    assert found["a"].ids == whole.responses[7].ids
    assert found["b"].ids == whole.responses[2].ids
    assert found["b"].prompt_index == 7
    assert found["b"].prompt_id == "q0"


def test_a_prompt_that_comes_again_gets_other_responses_and_the_first_keeps_its_own(model):
    alone = generate_responses(model, CHATS, sampling=SAMPLING)
    answered = Chat((*CHATS[0].messages, Message("assistant", "Ho")), id="again")
    chats = [CHATS[0], CHATS[1], answered, QUESTIONS[0], CHATS[2]]
    for tokens in (1, 16384):
        found = generate_responses(
            model, chats, sampling=SAMPLING, batching=Batching(tokens=tokens)
        )
        by_chat = [texts(found)[3 * chat : 3 * chat + 3] for chat in range(5)]
        assert by_chat[0] + by_chat[1] + by_chat[4] == texts(alone)
        # Five chats, three prompts, fifteen streams.
        assert len(set(texts(found))) == len({one.key for one in found.responses}) == 15
    assert [one.prompt_id for one in found.responses[::3]] == ["q0", "q1", "again", None, "q2"]
    # The third time is the third time, whatever stands between.
    close_by = generate_responses(model, [CHATS[0]] * 3, sampling=SAMPLING)
    assert texts(close_by) == by_chat[0] + by_chat[2] + by_chat[3]
    request = ResponseRequest(CHATS[0], sample=1, repeat=2)
    ((single,),) = stream_responses(model, [request], sampling=SAMPLING)
    assert single.ids == by_chat[3][1]


def test_a_text_is_a_chat_of_one_user_turn(model):
    found = generate_responses(model, list(QUESTIONS), sampling=SAMPLING)
    assert texts(found) == texts(generate_responses(model, CHATS, sampling=SAMPLING))
    assert found.responses[0].prompt == QUESTIONS[0]


def test_a_response_at_the_end_of_a_chat_is_left_out_and_a_system_turn_is_kept(model):
    turns = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho"))
    sampling = Sampling(1, max_new_tokens=4)
    (with_it,) = generate_responses(model, [Chat(turns)], sampling=sampling).responses
    (without,) = generate_responses(model, [Chat(turns[:2])], sampling=sampling).responses
    assert with_it.ids == without.ids
    assert with_it.system == "Be brief."


def test_ablation_at_every_write_holds_on_every_token_and_equals_the_folded_weights(model):
    v = direction()
    ablation = (Intervention("writes", Ablate(v)),)
    worst = []

    def look(_site: Site, value: Tensor) -> None:
        along = (value @ (v / v.norm())).abs() / value.norm(dim=-1)
        worst.append(float(along.max()))

    sites = [parse_site(f"resid_post.{layer}") for layer in range(2)]
    # Registered first, a watcher sees what the block makes of ablated writes.
    with watch_sites(model, sites, look) as firings:
        found = generate_responses(model, CHATS, sampling=SAMPLING, interventions=ablation)
    assert min(firings.values()) > 5
    assert max(worst) < 1e-10
    plain = generate_responses(model, CHATS, sampling=SAMPLING)
    assert texts(found) != texts(plain)
    folded: Any = fold_into_weights(model, ablation)
    assert texts(generate_responses(folded, CHATS, sampling=SAMPLING)) == texts(found)


@pytest.mark.parametrize("positions", ["all", "response", "prompt", "response[2:]"])
def test_greedy_responses_are_the_likeliest_of_one_pass_under_the_same_interventions(
    model, positions
):
    acts = (Intervention("resid_pre.1", Add(3 * direction()), positions),)
    greedy = Sampling(1, temperature=0, max_new_tokens=10)
    found = generate_responses(model, CHATS, sampling=greedy, interventions=acts)
    assert texts(found) != texts(generate_responses(model, CHATS, sampling=greedy))
    for one in found.responses:
        ids = torch.tensor(one.ids)
        chat = as_tokenized(one.ids, one.prompt_tokens)
        batch = Batch(rows=(0,), ids=ids[None], mask=torch.ones_like(ids)[None])
        with intervene(model, acts), publish_tokens(model, frame_batch(batch, [chat])):
            logits = model(ids[None])[0]
        assert torch.equal(logits[one.prompt_tokens - 1 : -1].argmax(-1), ids[one.prompt_tokens :])


def as_tokenized(ids: tuple[int, ...], prompt_tokens: int) -> TokenizedChat:
    return TokenizedChat(
        ids=torch.tensor(ids),
        prompt_end=prompt_tokens,
        response=(prompt_tokens, len(ids)),
        response_eot=None,
        awaits_response=False,
        turns=(),
        text="",
        ends=(),
    )


def test_replacements_row_by_row_are_kept_apart_where_a_prompt_is_shared(model):
    length = len(tokenize_chat(CHATS[0], model.tokenizer, for_generation=True).ids)
    values = torch.randn(3, length, 24, generator=torch.Generator().manual_seed(2)).double()
    greedy = Sampling(3, temperature=0, max_new_tokens=8)
    acts = (Intervention("resid_pre.1", Replace(values), "prompt"),)
    found = generate_responses(model, CHATS[:1], sampling=greedy, interventions=acts)
    assert len(set(texts(found))) == 3
    for row, one in enumerate(found.responses):
        alone = (Intervention("resid_pre.1", Replace(values[row : row + 1]), "prompt"),)
        (expected,) = generate_responses(
            model,
            CHATS[:1],
            sampling=Sampling(1, temperature=0, max_new_tokens=8),
            interventions=alone,
        ).responses
        assert one.ids == expected.ids
    chats = [as_tokenized(one.ids, length) for one in found.responses]
    with intervene(model, acts):
        together = score_responses(model, chats)
    for row, chat in enumerate(chats):
        alone = (Intervention("resid_pre.1", Replace(values[row : row + 1]), "prompt"),)
        with intervene(model, alone):
            (score,) = score_responses(model, [chat])
        torch.testing.assert_close(together[row].log_probs, score.log_probs, rtol=0, atol=1e-9)


def test_the_model_is_as_it_was_between_batches_and_after(model):
    acts = (Intervention("writes", Ablate(direction())),)
    ids = torch.arange(10)[None]
    before = model(ids)
    batches = 0
    requests = [ResponseRequest(chat) for chat in CHATS]
    for _ in stream_responses(
        model, requests, sampling=SAMPLING, interventions=acts, batching=Batching(tokens=1)
    ):
        batches += 1
        assert active_interventions(model) == ()
        assert torch.equal(model(ids), before)
    assert batches == 3


def test_interventions_around_the_call_act_and_are_written_down(model):
    acts = (Intervention("writes", Ablate(direction())),)
    given = generate_responses(model, CHATS, sampling=SAMPLING, interventions=acts)
    with intervene(model, acts):
        around = generate_responses(model, CHATS, sampling=SAMPLING)
    assert texts(given) == texts(around)
    assert given.interventions == around.interventions
    (written,) = map(json.loads, given.interventions)
    assert written["operator"] == "ablate"
    assert generate_responses(model, CHATS, sampling=SAMPLING).interventions == ()


def test_an_intervention_must_act_in_some_batch_and_need_not_in_each(model):
    long = Intervention("resid_pre.1", Add(direction()), "prompt[30:]")
    settings: Any = {"sampling": Sampling(1, max_new_tokens=2), "batching": Batching(tokens=1)}
    lengths = [len(tokenize_chat(c, model.tokenizer, for_generation=True).ids) for c in CHATS]
    assert min(lengths) < 30 < max(lengths)
    generate_responses(model, CHATS, interventions=(long,), **settings)
    never = Intervention("resid_pre.1", Add(direction()), "response[10:]")
    with pytest.raises(HookNeverFiredError, match=r"response\[10:\]"):
        generate_responses(model, CHATS, interventions=(never,), **settings)


def test_interventions_that_act_in_different_batches_have_all_acted(model):
    tokenizer, eos = model.tokenizer, model.tokenizer.eos_token_id
    chats = [CHATS[1], CHATS[2]]
    lengths = [len(tokenize_chat(c, tokenizer, for_generation=True).ids) for c in chats]
    assert lengths[1] < 30 < lengths[0]
    # The long prompt is answered at once, the short one at length.
    late = Intervention("resid_pre.1", Add(direction()), "response[3:]")
    early = Intervention("resid_pre.1", Add(direction()), "prompt[30:]")
    end = Intervention("resid_post.1", Replace(model.W_U[:, eos].detach().clone()), "prompt[30:]")
    settings: Any = {
        "sampling": Sampling(1, temperature=0, max_new_tokens=8),
        "batching": Batching(tokens=1),
    }
    plain = generate_responses(model, chats, interventions=(end,), **settings)
    said = [len(one.ids) - one.prompt_tokens for one in plain.responses]
    assert said[0] < 4 < said[1]
    generate_responses(model, chats, interventions=(end, early, late), **settings)
    never = Intervention("resid_pre.1", Add(direction()), "prompt[200:]")
    with pytest.raises(HookNeverFiredError, match=r"prompt\[200:\] met"):
        generate_responses(model, chats, interventions=(end, late, never), **settings)


def test_hooks_that_the_result_could_not_name_are_refused(model):
    handle = model.blocks[0].attn.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match=r"at blocks\.0\.attn"):
            generate_responses(model, CHATS, sampling=SAMPLING)
    finally:
        handle.remove()


def test_waste_and_speed_are_those_of_the_run(model):
    prompts = [tokenize_chat(c, model.tokenizer, for_generation=True).ids for c in CHATS]
    found = generate_responses(model, CHATS, sampling=Sampling(1, max_new_tokens=1))
    lengths = [len(prompt) for prompt in prompts]
    assert found.padding_waste == pytest.approx(1 - sum(lengths) / (3 * max(lengths)))
    assert found.tokens_per_second == pytest.approx(3 / found.seconds)
    alone = generate_responses(
        model, CHATS, sampling=Sampling(2, max_new_tokens=5), batching=Batching(tokens=1)
    )
    assert alone.padding_waste == 0


def test_responses_come_back_from_disk_as_they_were(tmp_path: Path):
    base = load_base(save_tiny_base(tmp_path / "base"))
    acts = (Intervention("writes", Ablate(direction().float())),)
    found = generate_responses(base, CHATS, sampling=SAMPLING, interventions=acts)
    assert read_result(found.save(tmp_path / "run"), Responses) == found
    assert found.model.dtype == "float32"
    assert found.model.tokenizer


def test_requests_that_cannot_be_met_are_named_at_the_call(model, tmp_path: Path):
    with pytest.raises(BatchError, match=r"prompt 1 \(id 'q1'\).*max_new_tokens is 480"):
        generate_responses(model, CHATS, sampling=Sampling(1, max_new_tokens=480))
    requests = [ResponseRequest(CHATS[0])]
    with pytest.raises(BatchError, match="more than 20"):
        stream_responses(model, requests, sampling=SAMPLING, batching=Batching(max_length=20))
    with pytest.raises(ChatError, match="empty sequence"):
        generate_responses(model, [], sampling=SAMPLING)
    with pytest.raises(BatchError, match="no rows"):
        stream_responses(model, [], sampling=SAMPLING)
    bare: Any = lay_views(make_tiny_chat_model(), None)
    with pytest.raises(ValueError, match="no tokenizer"):
        generate_responses(bare, CHATS, sampling=SAMPLING)
    with pytest.raises(ValueError, match="no tokenizer"):
        stream_responses(bare, requests, sampling=SAMPLING)


def test_the_rows_of_a_run_are_what_the_loop_gives(model):
    (one, *_) = generate_responses(model, CHATS[:1], sampling=SAMPLING).responses
    prompt = torch.tensor(one.ids[: one.prompt_tokens])[None]
    alone = generate_tokens(
        model,
        prompt,
        torch.ones_like(prompt),
        sampling=SAMPLING,
        keys=torch.tensor([int(one.key, 16)]),
        stop_ids=[model.tokenizer.eos_token_id],
    )
    assert tuple(alone.ids[0].tolist()) == one.ids[one.prompt_tokens :]
