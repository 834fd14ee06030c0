"""Blocks, attention, norms, MLPs with the host's hook points and parameter names.

Each computes fused while nobody hooks what fusion hides, and step by step when somebody does. They
are put into a HookedTransformer while it is built; do not call them on their own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.components.attention import Attention
from transformer_lens.components.embed import Embed
from transformer_lens.components.grouped_query_attention import GroupedQueryAttention
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.rms_norm import RMSNorm
from transformer_lens.components.transformer_block import TransformerBlock
from transformer_lens.components.unembed import Unembed
from transformer_lens.utilities.activation_functions import apply_softcap
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
from transformer_lens.utilities.attention import complex_attn_linear

from emlens.models.attention_kernels import attend
from emlens.models.layout import to_matrix
from emlens.models.products import multiply, multiply_together
from emlens.models.rotary import AttentionMask, RotaryTables, SharedTables


def is_hooked(point: nn.Module) -> bool:
    """Whether anything listens at a hook point, forwards or backwards."""
    return bool(
        point._forward_hooks
        or point._backward_hooks
        or point._forward_pre_hooks
        or point._backward_pre_hooks
    )


def tell(module: nn.Module, point: str, x: Tensor) -> Tensor:
    """Pass a tensor through a hook point if anybody listens there: calls cost time.

    Args:
        module: whose hook point.
        point: its name.
        x: what it is told, and may change.
    """
    listener = module._modules[point]
    assert listener is not None
    return listener(x) if is_hooked(listener) else x


SMALL = 1 << 16
"""Values up to which new memory costs less than asking whether old may be overwritten."""


def _is_own(x: Tensor, *told: nn.Module) -> bool:
    """Whether a new result may be overwritten: nobody has seen it, and no backward pass wants it.

    Fresh memory costs a processor more than the arithmetic of most steps between two products.

    Args:
        x: the result.
        told: the modules and hook points that it has passed.
    """
    if x.numel() <= SMALL or torch.is_grad_enabled():
        return False
    return not any(is_hooked(module) for module in told)


def _parameter(module: nn.Module, name: str) -> Tensor:
    """The stored tensor, past properties that would repeat grouped heads."""
    found = module._parameters[name]
    assert found is not None
    return found


class _FusedForward:
    """The attention forward pass over Hugging Face's weight layout; mixed into host modules.

    Keys are cached rotated, so a cache must be filled and read by the same kind of model.
    """

    tables: SharedTables
    rotary: RotaryTables | None = None
    grouped: bool

    def forward(
        self: Any,
        query_input: Float[Tensor, "batch pos ..."],
        key_input: Float[Tensor, "batch pos ..."],
        value_input: Float[Tensor, "batch pos ..."],
        past_kv_cache_entry: Any = None,
        additive_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attend; arguments as in TransformerLens's ``AbstractAttention.forward``.

        Raises:
            ValueError: an additive mask or a position bias, which no supported model has.
        """
        if additive_attention_mask is not None or position_bias is not None:
            raise ValueError("additive_attention_mask and position_bias are not supported here")
        q, k, v = self._project_all(query_input, key_input, value_input)
        entry = past_kv_cache_entry
        offset = 0 if entry is None else entry.past_keys.shape[1]
        if self.rotary is not None:
            rotation = self.tables.rotation(self.rotary, offset=offset, like=q, mask=attention_mask)
            norms = () if self.q_norm is None else (self.q_norm, self.k_norm)
            own_q, own_k = _is_own(q, self.hook_q, *norms), _is_own(k, self.hook_k, *norms)
            q = tell(self, "hook_rot_q", rotation.rotate(q, own=own_q))
            k = tell(self, "hook_rot_k", rotation.rotate(k, own=own_k))
        if entry is not None:
            k, v = entry.append(k, v)
        window = self.cfg.window_size if self.attn_type == "local" else None
        mask = self.tables.mask(
            attention_mask, offset=offset, like=q, n_keys=k.shape[1], window=window
        )
        attend = self._attend_stepwise if self._stepwise() else self._attend_fused
        return self._write(tell(self, "hook_z", attend(q, k, v, mask)))

    def calculate_sin_cos_rotary(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Leave the host's own tables out: the checkpoint's rotary module makes ours."""
        return torch.empty(0), torch.empty(0)

    def _project_all(self: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple:
        if query is key is value and query.ndim == 3:
            q, k, v = self._project_together(query)
        else:
            inputs = (query, key, value)
            pairs = zip(inputs, self._weights_in(), strict=True)
            q, k, v = (self._project(x, *weights) for x, weights in pairs)
        q, k, v = tell(self, "hook_q", q), tell(self, "hook_k", k), tell(self, "hook_v", v)
        if self.q_norm is not None:
            # Flattened to [batch * pos * head, d_head], as the host's hook points see it.
            q = self.q_norm(q.flatten(0, 2)).view(q.shape)
            k = self.k_norm(k.flatten(0, 2)).view(k.shape)
        return q, k, v

    def _weights_in(self: Any) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of queries, keys and values, as they are stored."""
        prefix = "_" if self.grouped else ""
        names = ("W_Q", "b_Q"), (f"{prefix}W_K", f"{prefix}b_K"), (f"{prefix}W_V", f"{prefix}b_V")
        return [(_parameter(self, weight), _parameter(self, bias)) for weight, bias in names]

    def _project_together(self: Any, x: Tensor) -> list[Tensor]:
        weights = self._weights_in()
        matrices = [to_matrix(W, "heads_out") for W, _ in weights]
        found = multiply_together(x, matrices, [b.flatten() for _, b in weights])
        shapes = [(W.shape[0], W.shape[2]) for W, _ in weights]
        return [out.unflatten(-1, shape) for out, shape in zip(found, shapes, strict=True)]

    def _project(self: Any, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        if x.ndim == 4:  # split or per-head inputs, switched on by the user
            return complex_attn_linear(x, W, b)
        out = multiply(x, to_matrix(W, "heads_out"), b.flatten())
        return out.unflatten(-1, (W.shape[0], W.shape[2]))

    def _stepwise(self: Any) -> bool:
        return (
            self.cfg.attn_scores_soft_cap > 0
            or is_hooked(self.hook_attn_scores)
            or is_hooked(self.hook_pattern)
        )

    def _attend_fused(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scale = 1.0 / float(self.attn_scale)
        z = attend(q, k, v=v, mask=mask, scale=scale, kind=q.device.type)
        return z.transpose(1, 2)

    def _attend_stepwise(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        batch, n_heads, length, d_head = q.shape
        n_kv, n_keys = k.shape[1], k.shape[2]
        grouped = q.reshape(batch, n_kv, n_heads // n_kv * length, d_head)
        scores = (grouped @ k.mT).view(batch, n_heads, length, n_keys) / self.attn_scale
        scores = apply_softcap(scores, self.cfg.attn_scores_soft_cap)
        if mask.allowed is not None:
            scores = torch.where(mask.allowed, scores, self.IGNORE.to(scores.dtype))
        scores = self.hook_attn_scores(scores)
        pattern = F.softmax(scores, dim=-1, dtype=_softmax_dtype(scores.dtype))
        pattern = torch.where(torch.isnan(pattern), torch.zeros_like(pattern), pattern)
        pattern = self.hook_pattern(pattern.to(scores.dtype)).to(v.dtype)
        z = pattern.reshape(batch, n_kv, n_heads // n_kv * length, n_keys) @ v
        return z.view(batch, n_heads, length, d_head).transpose(1, 2)

    def _write(self: Any, z: Tensor) -> Tensor:
        W_O, b_O = _parameter(self, "W_O"), _parameter(self, "b_O")
        if self.cfg.use_attn_result:
            result = self.hook_result(torch.einsum("bphd,hdm->bphm", z, W_O))
            return result.sum(dim=2) + b_O
        return multiply(z.flatten(2), to_matrix(W_O, "heads_in"), b_O)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax in float32 at least, as the Hugging Face classes do."""
    return dtype if dtype == torch.float64 else torch.float32


class FusedAttention(_FusedForward, Attention):
    """Multi-head attention, fused unless scores or pattern are hooked."""

    grouped = False


class FusedGroupedAttention(_FusedForward, GroupedQueryAttention):
    """Grouped-query attention over keys and values as they are stored."""

    grouped = True


class _NormForward:
    """A norm in one step unless somebody listens to its parts."""

    def forward(self: Any, x: Float[Tensor, "... length"]) -> Float[Tensor, "... length"]:
        """Normalise the last axis."""
        if is_hooked(self.hook_scale) or is_hooked(self.hook_normalized):
            return self._stepwise(x)
        return self._fused(x)


def _divide_by_rms(x: Tensor, eps: float, *, own: bool) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps), over the last axis; where x is our own, in its place.

    `F.rms_norm` is one kernel on a GPU. On a CPU it has none, and takes about ten times as long
    as this for 1,024 x 576.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, (x.shape[-1],), None, eps)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    scale = torch.rsqrt(square / x.shape[-1] + eps)
    return x.mul_(scale) if own else x * scale


class FusedRMSNorm(_NormForward, RMSNorm):
    """x / rms(x) * w, in float32 at least; ``w`` may be kept in float32 (Gemma)."""

    def _fused(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        own = _is_own(x)
        normalized = _divide_by_rms(wide, self.eps, own=own and wide is not x)
        if self.w.dtype != wide.dtype:
            normalized = normalized.to(x.dtype)
        own = own and self.w.dtype == normalized.dtype
        return (normalized.mul_(self.w) if own else normalized * self.w).to(x.dtype)

    def _stepwise(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(wide / scale)
        if self.w.dtype == wide.dtype:
            return (normalized.to(wide.dtype) * self.w).to(x.dtype)
        return normalized.to(x.dtype) * self.w


class FusedLayerNorm(_NormForward, LayerNorm):
    """(x - mean(x)) / std(x) * w + b."""

    def _fused(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.w, self.b, self.eps)

    def _stepwise(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(wide / scale).to(x.dtype) * self.w + self.b


class FusedGatedMLP(GatedMLP):
    """act(x W_gate) * (x W_in) + b_in, times W_out, plus b_out."""

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Run the gated MLP over Hugging Face's weight layout, each product fused with its bias."""
        gate = tell(self, "hook_pre", multiply(x, self.W_gate.mT))
        linear = tell(self, "hook_pre_linear", multiply(x, self.W_in.mT))
        into = linear if _is_own(linear, self.hook_pre_linear) else None
        product = torch.addcmul(self.b_in, self._activate(gate), linear, out=into)
        post = tell(self, "hook_post", product)
        return multiply(post, self.W_out.mT, self.b_out)

    def _activate(self, gate: Tensor) -> Tensor:
        if self.act_fn is F.silu and _is_own(gate, self.hook_pre):
            return F.silu(gate, inplace=True)
        return self.act_fn(gate)


class FusedBlock(TransformerBlock):
    """A block that runs each norm once, where the host runs the first one three times."""

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        shortformer_pos_embed: Tensor | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run attention and MLP; arguments as in TransformerLens's ``TransformerBlock.forward``."""
        if shortformer_pos_embed is not None or self._shows_inputs():
            return super().forward(
                resid_pre, shortformer_pos_embed, past_kv_cache_entry, attention_mask
            )
        resid_pre = tell(self, "hook_resid_pre", resid_pre)
        x = self.ln1(resid_pre)
        attn_out = self.attn(
            query_input=x,
            key_input=x,
            value_input=x,
            past_kv_cache_entry=past_kv_cache_entry,
            attention_mask=attention_mask,
        )
        last: Any = self.attn
        if self.cfg.use_normalization_before_and_after:
            last = self.ln1_post
            attn_out = last(attn_out)
        attn_out = tell(self, "hook_attn_out", attn_out)
        if self.cfg.parallel_attn_mlp:
            resid = resid_pre + attn_out
            return tell(self, "hook_resid_post", resid + self._run_mlp(self.ln2(resid_pre)))
        own = _is_own(attn_out, self.hook_attn_out, last)
        resid_mid = attn_out.add_(resid_pre) if own else resid_pre + attn_out
        resid_mid = tell(self, "hook_resid_mid", resid_mid)
        mlp_out = self._run_mlp(self.ln2(resid_mid))
        last = self.ln2_post if self.cfg.use_normalization_before_and_after else self.mlp
        own = _is_own(mlp_out, self.hook_mlp_out, last)
        resid_post = mlp_out.add_(resid_mid) if own else resid_mid + mlp_out
        return tell(self, "hook_resid_post", resid_post)

    def _run_mlp(self, x: Tensor) -> Tensor:
        out = self.mlp(x)
        if self.cfg.use_normalization_before_and_after:
            out = self.ln2_post(out)
        return tell(self, "hook_mlp_out", out)

    def _shows_inputs(self) -> bool:
        """Whether the host's own path is needed: inputs told apart, or a norm seen three times."""
        cfg = self.cfg
        return bool(
            cfg.use_attn_in
            or cfg.use_split_qkv_input
            or cfg.use_hook_mlp_in
            or cfg.attn_only
            or cfg.original_architecture in POST_NORM_ARCHITECTURES
            or is_hooked(self.ln1)
            or any(is_hooked(point) for point in self.ln1.children())
        )


class ScaledEmbed(Embed):
    """The embedding times sqrt(d_model), scaled at run time so that W_E stays a view (Gemma)."""

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Look tokens up and scale by a factor rounded as the Hugging Face class rounds it."""
        factor = torch.tensor(self.cfg.d_model**0.5)
        # On no device: a product takes such a number along, where a copy would make it wait.
        return F.embedding(tokens, self.W_E) * factor.to(self.W_E.dtype)


class FusedUnembed(Unembed):
    """x W_U + b_U over Hugging Face's weight layout."""

    def forward(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return logits; a soft cap is the model's own."""
        residual = tell(self, "hook_in", residual)
        # Nothing comes after that would magnify how this is rounded.
        return tell(self, "hook_out", multiply(residual, self.W_U.mT, self.b_U, loose=True))
