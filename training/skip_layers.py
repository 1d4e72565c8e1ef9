"""Transformer layers of the teacher and of students, as autograd modules: they differ in what sees what."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vbert.activations import activate
from vbert.config import LINEAR_SITES, EncoderConfig

__all__ = ["Block", "FullLayer", "LocalLayer", "SinkBlock", "WindowLayer", "attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """[B, A, n, D] each to context [B, n, A D]. On a CPU in float32 whatever autocast says: backwards, the attention of
    torch 2.13 takes eight times as long in bfloat16 there."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    with torch.autocast("cpu", enabled=False):
        context = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias)
    return context.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """The weights of one transformer layer. What attends to what is for those that derive from it."""

    def __init__(self, config: EncoderConfig, weights: dict[str, Tensor], layer: int) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v, self.attn_out, self.ffn_up, self.ffn_down = (
            nn.Linear(config.site_in(site), config.site_out(site)) for site in LINEAR_SITES
        )
        self.attn_norm, self.ffn_norm = (nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(2))
        self.load_state_dict({name: weights[f"layers.{layer}.{name}"] for name in self.state_dict()})

    def heads(self, rows: Tensor) -> Tensor:
        """[..., n, H] to [..., A, n, D]."""
        return rows.view(*rows.shape[:-1], self.config.num_heads, self.config.head_size).transpose(-3, -2)

    def close(self, entered: Tensor, context: Tensor) -> Tensor:
        """The rest of the layer after attention, [..., H]."""
        hidden = self.attn_norm(entered + self.attn_out(context))
        wide = activate(self.ffn_up(hidden), self.config.activation)
        closed: Tensor = self.ffn_norm(hidden + self.ffn_down(wide))
        return closed


class FullLayer(Block):
    """Every token sees the whole text."""

    def forward(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """hidden: [B, n, H]; bias: as `_attention_bias` makes it."""
        q, k, v = (self.heads(site(hidden)) for site in (self.q, self.k, self.v))
        return self.close(hidden, attend(q, k, v, bias))

    def scores(self, hidden: Tensor) -> Tensor:
        """[B, A, n, n] before the mask and the softmax."""
        q, k = self.heads(self.q(hidden)), self.heads(self.k(hidden))
        return q @ k.transpose(-1, -2) / math.sqrt(self.config.head_size)


class SinkBlock(Block):
    """With constant keys and values ("sinks") that stand for the rest of a text: without them few tokens would get all
    of the attention that the teacher gives to far ones."""

    def __init__(self, config: EncoderConfig, weights: dict[str, Tensor], layer: int, sinks: Tensor) -> None:
        """sinks: [S, H], states whose keys and values the constants begin with."""
        super().__init__(config, weights, layer)
        with torch.no_grad():
            self.sink_keys, self.sink_values = (nn.Parameter(site(sinks)) for site in (self.k, self.v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> Tensor:
        """q: [m, s, H]; k, v: [m, t, H]; present: [m, t] bool. To context [m, s, H]."""
        m = len(k)
        k, v = (
            torch.cat([s.to(k.dtype).expand(m, -1, -1), x], 1) for s, x in ((self.sink_keys, k), (self.sink_values, v))
        )
        allowed = torch.cat([present.new_ones(m, len(self.sink_keys)), present], 1)[:, None, None]
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(self.config.head_size)
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class LocalLayer(SinkBlock):
    """The slots of an n-gram see each other."""

    def forward(self, hidden: Tensor, present: Tensor) -> Tensor:
        """hidden: [m, s, H]; present: [m, s] bool."""
        context = self.attend(self.q(hidden), self.k(hidden), self.v(hidden), present)
        return self.close(hidden, context)


class WindowLayer(SinkBlock):
    """The centre of a window sees its tokens, whose keys and values come from the token and its distance alone."""

    def __init__(
        self, config: EncoderConfig, weights: dict[str, Tensor], layer: int, sinks: Tensor, window: int
    ) -> None:
        super().__init__(config, weights, layer, sinks)
        self.far_keys, self.far_values = (nn.Parameter(torch.zeros(window, config.hidden_size)) for _ in range(2))

    def forward(self, rows: Tensor, inverse: Tensor, mask: Tensor) -> Tensor:
        """rows: [m, H] of distinct tokens; inverse: [B, n], which of them each token is. To [T, H], without padding."""
        n, reach = inverse.shape[1], len(self.far_keys) // 2
        offsets = torch.arange(-reach, reach + 1, device=inverse.device)
        places = torch.arange(n, device=inverse.device)[:, None] + offsets  # [n, w]
        inside = (places >= 0) & (places < n)
        places = places.clamp(0, n - 1)
        which, present = inverse[:, places][mask], (mask[:, places] & inside)[mask]  # [T, w]
        q, k, v = self.q(rows)[inverse[mask]], self.k(rows)[which], self.v(rows)[which]
        context = self.attend(q[:, None], k + self.far_keys.to(k.dtype), v + self.far_values.to(v.dtype), present)
        return self.close(rows[inverse[mask]], context[:, 0])
