"""The supported architectures, one table entry each: sizes, weight places, handled fields.

A config field that changes the forward pass and is not handled here is refused by name. Do not
derive anything from a model's name or path.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from emlens.models.layout import Place


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one Hugging Face class maps onto a HookedTransformer."""

    name: str
    """The Hugging Face class, for instance ``LlamaForCausalLM``."""
    places: tuple[Place, ...]
    """The linear modules of a block."""
    norms: Mapping[str, str]
    """TransformerLens norm -> Hugging Face norm, both below the block."""
    read_config: Callable[[Any], dict[str, Any]]
    """Hugging Face config -> keyword arguments of HookedTransformerConfig."""
    handled: frozenset[str]
    """Config fields that ``read_config`` or the loader understands."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Config fields supported at one value only."""
    trunk: str = "model"
    blocks: str = "layers"
    embed: str = "embed_tokens"
    pos_embed: str | None = None
    final_norm: str = "norm"
    unembed: str = "lm_head"
    norm_offset: float = 0.0
    """Added to every norm weight by the Hugging Face class (Gemma: 1)."""
    scales_embedding: bool = False
    """Whether the embedding is multiplied by sqrt(d_model) at run time (Gemma)."""

    @property
    def post_norms(self) -> bool:
        """Whether a norm stands between a module's output and the residual stream."""
        return "ln1_post" in self.norms


def _attention_places() -> tuple[Place, ...]:
    def projection(letter: str, prefix: str) -> Place:
        return Place(
            module=f"self_attn.{letter}_proj",
            parameters=(f"attn.{prefix}W_{letter.upper()}",),
            biases=(f"attn.{prefix}b_{letter.upper()}",),
            kind="heads_out",
            reads="attn",
            writes=(f"attn.hook_{letter}",),
        )

    output = Place(
        module="self_attn.o_proj",
        parameters=("attn.W_O",),
        biases=("attn.b_O",),
        kind="heads_in",
        reads="z",
        writes=("hook_attn_out",),
    )
    return projection("q", ""), projection("k", "_"), projection("v", "_"), output


def _mlp_place(module: str, letter: str, bias: str, reads: Any, write: str) -> Place:
    return Place(
        module=module,
        parameters=(f"mlp.W_{letter}",),
        biases=(bias,),
        kind="plain",
        reads=reads,
        writes=(write,),
    )


_GATED_PLACES = (
    *_attention_places(),
    _mlp_place("mlp.gate_proj", "gate", "mlp.b_gate", "mlp", "mlp.hook_pre"),
    _mlp_place("mlp.up_proj", "in", "mlp.b_in", "mlp", "mlp.hook_pre_linear"),
    _mlp_place("mlp.down_proj", "out", "mlp.b_out", "post", "hook_mlp_out"),
)


def _gpt2_place(module: str, names: tuple[str, ...], kind: Any, reads: Any, writes: Any) -> Place:
    return Place(
        module=module,
        parameters=names,
        biases=tuple(name.replace(".W_", ".b_") for name in names),
        kind=kind,
        reads=reads,
        writes=writes,
        conv1d=True,
    )


_GPT2_PLACES = (
    _gpt2_place(
        "attn.c_attn",
        ("attn.W_Q", "attn.W_K", "attn.W_V"),
        "heads_out",
        "attn",
        ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
    ),
    _gpt2_place("attn.c_proj", ("attn.W_O",), "heads_in", "z", ("hook_attn_out",)),
    _gpt2_place("mlp.c_fc", ("mlp.W_in",), "plain", "mlp", ("mlp.hook_pre",)),
    _gpt2_place("mlp.c_proj", ("mlp.W_out",), "plain", "post", ("hook_mlp_out",)),
)

_NEOX_PLACES = (
    Place(
        module="attention.query_key_value",
        parameters=("attn.W_Q", "attn.W_K", "attn.W_V"),
        biases=("attn.b_Q", "attn.b_K", "attn.b_V"),
        kind="heads_out",
        reads="attn",
        writes=("attn.hook_q", "attn.hook_k", "attn.hook_v"),
        by_head=True,
    ),
    Place(
        module="attention.dense",
        parameters=("attn.W_O",),
        biases=("attn.b_O",),
        kind="heads_in",
        reads="z",
        writes=("hook_attn_out",),
    ),
    _mlp_place("mlp.dense_h_to_4h", "in", "mlp.b_in", "mlp", "mlp.hook_pre"),
    _mlp_place("mlp.dense_4h_to_h", "out", "mlp.b_out", "post", "hook_mlp_out"),
)

_NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
_HEAD_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "ln1": "input_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
_SIZES = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act hidden_activation max_position_embeddings
    rms_norm_eps tie_word_embeddings rope_parameters rope_scaling rope_theta attention_bias
    """.split()  # noqa: SIM905
)


def _gated(config: Any) -> dict[str, Any]:
    """Sizes common to the gated, rotary, RMS-normed architectures."""
    d_head = getattr(config, "head_dim", None)
    d_head = d_head or config.hidden_size // config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "d_vocab": config.vocab_size,
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "final_rms": True,
        "gated_mlp": True,
    } | _windows(config)


def _windows(config: Any) -> dict[str, Any]:
    """Sliding windows by layer: ``layer_types`` where there are any, else Mistral's one window."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if layers is None:
        layers = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(layers) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer_types: {unknown} are not supported, only sliding and full")
    if "sliding_attention" not in layers:
        return {}
    types = ["local" if kind == "sliding_attention" else "global" for kind in layers]
    return {"use_local_attn": True, "window_size": window, "attn_types": types}


def _head_normed(config: Any) -> dict[str, Any]:
    return _gated(config) | {"use_qk_norm": True}


def _gemma(config: Any) -> dict[str, Any]:
    caps = {
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
    }
    scale = {"use_attn_scale": True, "attn_scale": float(config.query_pre_attn_scalar) ** 0.5}
    return _gated(config) | caps | scale | {"use_normalization_before_and_after": True}


def _gemma3(config: Any) -> dict[str, Any]:
    return _gemma(config) | {"use_qk_norm": True}


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "n_heads": config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_layers": config.n_layer,
        "n_ctx": config.n_positions,
        "eps": config.layer_norm_epsilon,
        "d_vocab": config.vocab_size,
        "act_fn": config.activation_function,
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
    }


def _neox(config: Any) -> dict[str, Any]:
    d_head = config.hidden_size // config.num_attention_heads
    share = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.layer_norm_eps,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "rotary_dim": int(d_head * share),
        "parallel_attn_mlp": config.use_parallel_residual,
    }


_SLIDING = frozenset({"sliding_window", "layer_types", "use_sliding_window"})
_GEMMA_FIELDS = (
    _SIZES
    | _SLIDING
    | {
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
)
_GEMMA: dict[str, Any] = {
    "places": _GATED_PLACES,
    "norm_offset": 1.0,
    "scales_embedding": True,
    "required": {"use_bidirectional_attention": False},
}

_GPT2_FIELDS = frozenset(
    """
    vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon
    scale_attn_weights scale_attn_by_inverse_layer_idx tie_word_embeddings
    """.split()  # noqa: SIM905
)

_ENTRIES = (
    Architecture(
        name="LlamaForCausalLM",
        places=_GATED_PLACES,
        norms=_NORMS,
        read_config=_gated,
        handled=_SIZES,
        required={"mlp_bias": False},
    ),
    Architecture(
        name="Qwen2ForCausalLM",
        places=_GATED_PLACES,
        norms=_NORMS,
        read_config=_gated,
        handled=_SIZES | _SLIDING,
    ),
    Architecture(
        name="Qwen3ForCausalLM",
        places=_GATED_PLACES,
        norms=_NORMS | _HEAD_NORMS,
        read_config=_head_normed,
        handled=_SIZES | _SLIDING,
    ),
    Architecture(
        name="MistralForCausalLM",
        places=_GATED_PLACES,
        norms=_NORMS,
        read_config=_gated,
        handled=_SIZES | _SLIDING,
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        norms=_SANDWICH_NORMS,
        read_config=_gemma,
        handled=_GEMMA_FIELDS,
        **_GEMMA,
    ),
    Architecture(
        name="Gemma3ForCausalLM",
        norms=_SANDWICH_NORMS | _HEAD_NORMS,
        read_config=_gemma3,
        handled=_GEMMA_FIELDS,
        **_GEMMA,
    ),
    Architecture(
        name="GPT2LMHeadModel",
        places=_GPT2_PLACES,
        norms={"ln1": "ln_1", "ln2": "ln_2"},
        read_config=_gpt2,
        handled=_GPT2_FIELDS,
        required={"add_cross_attention": False},
        trunk="transformer",
        blocks="h",
        embed="wte",
        pos_embed="wpe",
        final_norm="ln_f",
    ),
    Architecture(
        name="GPTNeoXForCausalLM",
        places=_NEOX_PLACES,
        norms=_NORMS,
        read_config=_neox,
        handled=_SIZES | {"layer_norm_eps", "use_parallel_residual"},
        trunk="gpt_neox",
        embed="embed_in",
        final_norm="final_layer_norm",
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {entry.name: entry for entry in _ENTRIES}
"""Every architecture with a parity test against its Hugging Face forward pass."""


def find_architecture(name: str) -> Architecture:
    """Return the table entry of a Hugging Face class.

    Raises:
        ValueError: the class is not in the table; the nearest three are named.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    near = difflib.get_close_matches(name, ARCHITECTURES, n=3, cutoff=0.0)
    raise ValueError(
        f"architecture {name!r} is not supported; nearest: {', '.join(near)}; "
        f"supported: {', '.join(ARCHITECTURES)}. A multimodal checkpoint's text part must be "
        "saved as its own text-only model first."
    )
