"""Self-attention of a packed batch: a sequence attends to itself only. Padding exists in the scores, nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from vbert.batch import AttentionBucket, AttentionPlan

__all__ = ["Attention", "PackedAttention", "RelativeBias", "VarlenAttention"]

Attention = Callable[[Tensor], Tensor]  # [T, 3 H], query, key and value of each row side by side, to context [T, H]


class PackedAttention:
    """The attention of one batch, planned once, used by every layer. Source: Vaswani et al. 2017, arXiv:1706.03762."""

    def __init__(self, plan: AttentionPlan, num_heads: int, relative: RelativeBias | None) -> None:
        self._plan, self._num_heads = plan, num_heads
        self._biases = [_score_bias(bucket, relative) for bucket in plan.buckets]

    def __call__(self, qkv: Tensor) -> Tensor:
        """[T, 3 H], query, key and value of each row side by side, to context [T, H]."""
        plan = self._plan
        rows = qkv if plan.gather is None else qkv.index_select(0, plan.gather)
        contexts = [self._attend(*pair, rows) for pair in zip(plan.buckets, self._biases, strict=True)]
        if plan.scatter is None:
            return contexts[0]
        return torch.cat(contexts).index_select(0, plan.scatter)

    def _attend(self, bucket: AttentionBucket, bias: Tensor | None, rows: Tensor) -> Tensor:
        """The context rows of one bucket, [n L, H], padding included."""
        n, length = bucket.count, bucket.length
        split = rows[bucket.first : bucket.first + n * length].view(n, length, 3, self._num_heads, -1)
        q, k, v = (split[:, :, part].transpose(1, 2) for part in range(3))  # [n, A, L, D]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2).reshape(n * length, -1)  # a view: the kernel writes rows in this order


class VarlenAttention:
    """The same without padding, by FlashAttention on a GPU in 16 bits. Source: Dao 2023, arXiv:2307.08691."""

    def __init__(self, cu_seqlens: Tensor, longest: int, num_heads: int) -> None:
        """cu_seqlens: [B + 1] int32 on the GPU.  longest: at least the length of each sequence."""
        self._cu_seqlens, self._longest, self._num_heads = cu_seqlens, longest, num_heads

    def __call__(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(len(qkv), 3, self._num_heads, -1).unbind(1)  # [T, A, D]
        out = varlen_attn(q, k, v, self._cu_seqlens, self._cu_seqlens, self._longest, self._longest)
        assert isinstance(out, Tensor)
        return out.flatten(1)


class RelativeBias:
    """MPNet's bias of every pair of positions, one table for all layers. Source: Song et al. 2020, arXiv:2004.09297."""

    def __init__(self, table: Tensor) -> None:
        """table: [buckets, A]."""
        self._table = table
        self._by_length: dict[int, Tensor] = {}

    def __call__(self, length: int) -> Tensor:
        """[A, L, L], kept for the next batch with this length."""
        if length not in self._by_length:
            positions = torch.arange(length, device=self._table.device)
            buckets = _relative_buckets(positions[None, :] - positions[:, None], self._table.shape[0])
            self._by_length[length] = F.embedding(buckets, self._table).permute(2, 0, 1).contiguous()
        return self._by_length[length]


def _score_bias(bucket: AttentionBucket, relative: RelativeBias | None) -> Tensor | None:
    """What is added to (float) or kept of (bool) the scores of a bucket, broadcast to [n, A, L, L]."""
    if relative is None:
        return bucket.mask
    bias = relative(bucket.length).unsqueeze(0)
    return bias if bucket.mask is None else bias.masked_fill(~bucket.mask, float("-inf"))


def _relative_buckets(distance: Tensor, num_buckets: int, max_distance: int = 128) -> Tensor:
    """Bucket of key position - query position: half of the buckets for each sign, exact near, logarithmic afar.

    Source: the bucketing of T5, Raffel et al. 2020, arXiv:1910.10683, as MPNet uses it.
    """
    half = num_buckets // 2
    exact = half // 2
    sign = (distance > 0).to(torch.int64) * half
    n = distance.abs()
    scale = (half - exact) / torch.log(torch.tensor(max_distance / exact))
    far = exact + (torch.log(n.clamp(min=1).float() / exact) * scale).to(torch.int64)
    return sign + torch.where(n < exact, n, far.clamp(max=half - 1))
