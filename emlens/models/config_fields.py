"""Which fields of a Hugging Face config the loader honours; all others are refused by name.

The architectures themselves are in ``config``.
"""

from typing import Any

from emlens.models.config import Architecture

ROPE_TYPES = frozenset({"default", "linear", "dynamic", "llama3", "yarn"})
"""Rotary variants whose tables depend on positions only, up to the model's context length."""

# Fields that never change an inference forward pass: names, ids, dropout, caching, bookkeeping.
_INERT = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version _name_or_path use_cache
    initializer_range pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id
    attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout classifier_dropout
    summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout task_specific_params id2label label2id num_labels problem_type
    output_attentions output_hidden_states return_dict finetuning_task prefix tokenizer_class
    chunk_size_feed_forward pretraining_tp cache_implementation attn_implementation
    _attn_implementation _attn_implementation_autoset max_window_layers n_ctx
    reorder_and_upcast_attn
    """.split()  # noqa: SIM905
)
# reorder_and_upcast_attn changes only the precision of GPT-2's eager half-precision scores.


def check_config(config: Any, architecture: Architecture) -> None:
    """Refuse a config whose forward pass the loader does not reproduce.

    A field counts if the config class defines it and its value differs from the class's default:
    fields that the class does not know cannot reach the Hugging Face forward pass either.

    Raises:
        ValueError: the field, its value, and what is supported.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{architecture.name}: quantization_config is set; quantised bases are not supported, "
            "load the unquantised checkpoint"
        )
    defaults = type(config)().to_dict()
    values = config.to_dict()
    for name, value in values.items():
        if name in architecture.required and (value or False) != architecture.required[name]:
            raise ValueError(
                f"{architecture.name}: config field {name}={value!r} is not supported, "
                f"only {architecture.required[name]!r}"
            )
        known = name in architecture.handled or name in architecture.required or name in _INERT
        if not known and name in defaults and value != defaults[name]:
            raise ValueError(
                f"{architecture.name}: config field {name}={value!r} (default "
                f"{defaults[name]!r}) changes the forward pass and is not supported"
            )
    for rope in rope_types(config):
        if rope not in ROPE_TYPES:
            raise ValueError(
                f"{architecture.name}: rope_type {rope!r} is not supported; "
                f"supported: {', '.join(sorted(ROPE_TYPES))}"
            )


def rope_types(config: Any) -> tuple[str, ...]:
    """Return the rotary variants a config names, one or one per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    groups = [rope] if "rope_type" in rope else [g for g in rope.values() if isinstance(g, dict)]
    return tuple(str(group.get("rope_type", "default")) for group in groups)
