"""Interventions on named tokens: padded, cached, paired, or refused where nothing names them."""

import pytest
import torch

from emlens.data import Chat, Message, PositionsError
from emlens.diffing.compare import compare_logits
from emlens.interventions import (
    Ablate,
    Add,
    Cap,
    Intervention,
    Replace,
    generate_responses,
    intervene,
)
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.generate import Sampling
from emlens.models.hooks import HookNeverFiredError, watch_sites
from emlens.models.kv_cache import KeyValueCache
from emlens.models.loading import load_base
from emlens.models.pair import ModelPair
from emlens.models.paired import forward_many
from emlens.models.tokens_in_flight import (
    count_positions,
    frame_batch,
    frame_prompts,
    publish_tokens,
)
from emlens.models.views import share_model
from emlens.numerics.validation import WidthError
from emlens.sites import parse_site
from tests.interventions.vectors import (
    D_MODEL,
    close,
    draw,
    enter_and_leave,
    load_tiny,
    make_batch,
    run_hooked,
)
from tests.models.adapters import make_peft
from tests.models.tiny import make_ids

V = draw(D_MODEL)


def shift(x):
    return x + 4 * V.float()


def cut(x):
    unit = (V / V.norm()).float()
    return x - torch.relu(x @ unit + 1)[..., None] * unit


CHANGES = [(Add(4 * V), shift), (Cap(3 * V, -1.0, "above"), cut)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["response", "response[:2]", "prompt", "last_prompt"])
@pytest.mark.parametrize(("operator", "by_hand"), CHANGES)
def test_padding_does_not_move_named_positions(side, positions, operator, by_hand):
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2), (5, 3), side=side)
    acting = [Intervention("resid_post.0", operator, positions)]
    with intervene(model, acting), publish_tokens(model, frame_batch(batch, chats)):
        together = model(batch.ids, attention_mask=batch.mask)
    everywhere = []
    for row, chat in enumerate(chats):
        mask = acting[0].where.mask(chat)

        def change(x, hook, mask=mask):
            return torch.where(mask[:, None], by_hand(x), x)

        alone = run_hooked(model, chat.ids[None], {"resid_post.0": change})[0]
        assert close(together[row][batch.mask[row].bool()], alone, 1e-4)
        hooks = {"resid_post.0": lambda x, hook: by_hand(x)}
        everywhere.append(close(run_hooked(model, chat.ids[None], hooks)[0], alone, 1e-3))
    assert not all(everywhere)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["all", "response[:2]", "prompt"])
def test_a_cached_padded_decode_acts_on_the_tokens_of_the_whole_text(name, positions):
    model, v = load_tiny(name), V
    chats, batch = make_batch((3, 4), (1, 4))
    prompts = [chat.prompt_end for chat in chats]
    width = max(prompts)
    ids, mask = batch.ids[:, : width + 4], batch.mask[:, : width + 4]
    changes = [
        Intervention("resid_post.0", Add(4 * v), positions),
        Intervention("mlp_out.1", Ablate(v), positions),
        Intervention("resid_mid.1", Cap(draw(D_MODEL, seed=1), -1.0, "above"), positions),
    ]
    frame = frame_prompts(mask[:, :width])
    with intervene(model, changes):
        cache = KeyValueCache(model, batch=2, capacity=width + 4)
        with publish_tokens(model, frame):
            steps = [model(ids[:, :width], attention_mask=mask[:, :width], past_kv_cache=cache)]
        for column in range(width, width + 4):
            new = count_positions(mask)[:, column : column + 1]
            with publish_tokens(model, frame.at(new)):
                steps.append(model(ids[:, column : column + 1], past_kv_cache=cache))
        cached = torch.cat(steps, dim=1)
        for row, prompt in enumerate(prompts):
            text = chats[row].ids[None, : prompt + 4]
            open_text = frame_prompts(torch.ones(1, prompt, dtype=torch.int64))
            with publish_tokens(model, open_text.at(torch.arange(prompt + 4)[None])):
                alone = model(text)[0]
            assert close(cached[row][mask[row].bool()], alone, 1e-4)


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_in_a_paired_forward_both_models_meet_the_intervention_on_the_same_tokens(layers):
    settings = {} if layers is None else {"layers_to_transform": layers}
    peft_model = make_peft("llama", **settings)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    base.tokenizer = load_tiny().tokenizer
    chats, batch = make_batch((3, 4), (1, 2))
    frame, v = frame_batch(batch, chats), draw(D_MODEL)
    changes = [
        Intervention("mlp_out.1", Ablate(v), "response"),
        Intervention("resid_post.0", Add(3 * v), "response[1:]"),
    ]
    with intervene(base, changes), publish_tokens(base, frame):
        paired = forward_many(
            base, [adapter], batch.ids, batch.mask, sites=[], visit=lambda *_: None
        )
    assert paired.method == "paired"
    for index, model in enumerate((base, attach_adapter(base, adapter))):
        with intervene(model, changes), publish_tokens(model, frame):
            alone = model(batch.ids, attention_mask=batch.mask, stop_at_layer=model.cfg.n_layers)
        real = batch.mask.bool()
        assert close(paired.resid[index][real], alone[real])


def test_values_of_another_run_are_put_where_their_tokens_are():
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2), (5, 3), side="right")
    site = parse_site("resid_post.1")
    values = draw(3, batch.ids.shape[1], D_MODEL)  # right-padded: column = index in the text
    patch = [Intervention(site, Replace(values), "response")]
    whole = frame_batch(batch, chats)
    with intervene(model, patch), publish_tokens(model, whole):
        expected = model(batch.ids, attention_mask=batch.mask)
    # The same rows left-padded, in another order, one of them gone.
    left = make_batch((3, 4), (1, 2), (5, 3))[1]
    kept = [2, 0]
    frame = frame_batch(left, chats).keep(kept)
    seen = []
    with (
        intervene(model, patch),
        publish_tokens(model, frame),
        watch_sites(model, [site], lambda _, x: seen.append(x.double())),
    ):
        got = model(left.ids[kept], attention_mask=left.mask[kept])
    for place, row in enumerate(kept):
        real, columns = left.mask[row].bool(), batch.mask[row].bool()
        assert close(got[place][real], expected[row][columns], 1e-4)
        response = patch[0].where.mask(chats[row])
        held = seen[0][place][real][response]
        assert close(held, values[row][columns][response], 1e-6)


def test_a_patch_that_does_not_reach_its_tokens_is_refused():
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2))
    short = [Intervention("resid_post.1", Replace(draw(2, 6, D_MODEL)), "response")]

    def published():
        with publish_tokens(model, frame_batch(batch, chats)):
            model(batch.ids, attention_mask=batch.mask)

    with pytest.raises(WidthError, match="do not reach every token"):
        enter_and_leave(model, short, published)
    bare = [Intervention("embed", Replace(draw(2, 6, D_MODEL)))]
    with pytest.raises(WidthError, match="under a bare model"):
        enter_and_leave(model, bare, lambda: model(batch.ids))


def test_positions_that_select_nothing_in_any_pass_are_an_error():
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2))
    chosen = [Intervention("resid_post.0", Ablate(draw(D_MODEL)), "response[7:]")]

    def run():
        with publish_tokens(model, frame_batch(batch, chats)):
            model(batch.ids, attention_mask=batch.mask)

    with pytest.raises(HookNeverFiredError, match=r"response\[7:\] met no such token"):
        enter_and_leave(model, chosen, run)


def test_having_acted_in_an_earlier_pass_is_enough():
    model = load_tiny()
    chosen = [Intervention("resid_post.0", Ablate(draw(D_MODEL)), "prompt")]
    frame = frame_prompts(torch.ones(1, 5, dtype=torch.int64))

    def run():
        with publish_tokens(model, frame):
            model(make_ids(1, 5))
        with publish_tokens(model, frame.at(torch.tensor([[5]]))):
            model(make_ids(1, 1))

    enter_and_leave(model, chosen, run)


def test_named_positions_of_a_bare_run_are_refused_with_the_way_out():
    model = load_tiny()
    chosen = [Intervention("resid_post.0", Ablate(draw(D_MODEL)), "response")]
    with pytest.raises(PositionsError, match="publish_tokens"):
        enter_and_leave(model, chosen, lambda: model(make_ids(1, 5)))


def test_named_tokens_after_the_last_block_of_generated_text_are_refused_with_the_way_out():
    model = load_tiny()
    sampling = Sampling(n=1, temperature=0.0, max_new_tokens=3)
    for site in ("ln_final_normalized", "ln_final_scale"):
        width = parse_site(site).width(model.cfg)
        acting = [Intervention(site, Add(draw(width)), "response")]
        with pytest.raises(PositionsError, match=r"cannot be told at ln_final.*resid_post\.2"):
            generate_responses(model, ["w5 w6"], sampling=sampling, interventions=acting)
    everywhere = [Intervention("ln_final_normalized", Add(40 * V))]
    plain = generate_responses(model, ["w5 w6"], sampling=sampling).responses[0].ids
    found = generate_responses(model, ["w5 w6"], sampling=sampling, interventions=everywhere)
    assert found.responses[0].ids != plain


def test_tokens_of_another_batch_are_refused():
    model = load_tiny()
    chats, batch = make_batch((3, 4), (1, 2))
    chosen = [Intervention("resid_post.0", Ablate(draw(D_MODEL)), "response")]

    def run():
        with publish_tokens(model, frame_batch(batch, chats)):
            model(batch.ids[:1])

    with pytest.raises(WidthError, match="tokens published"):
        enter_and_leave(model, chosen, run)


def test_comparing_two_models_says_which_tokens_are_in_flight():
    model = load_tiny()
    pair = ModelPair(base=model, tuned=share_model(model), adapter=None, proof=None)
    chats = [Chat((Message("user", "w5 w6"), Message("assistant", "w40 w41 w42 w43")))]
    steer = [Intervention("resid_post.0", Add(8 * draw(D_MODEL)), "response[2:]")]
    with intervene(pair.tuned, steer):
        prompt = compare_logits(pair, chats, positions="response[:1]")
        later = compare_logits(pair, chats, positions="response[3:]")
    assert prompt.kl_base_tuned == 0
    assert later.kl_base_tuned > 1e-3
