"""The native format's own methods: BitFit, MaskBert and Diff pruning, whose papers have no checkpoint format.

Trainers and conversion scripts make deltas with these and write them with `vbert.checkpoint`; the file itself is
read by `read_native`. Weights are [out, in] as torch.nn.Linear has them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vbert.checkpoint import read_tenant_bytes
from vbert.errors import RefusedCheckpoint
from vbert.formats.transformers_folder import Backbone
from vbert.header import parse_header
from vbert.tenant import Affine, Sparse, TenantModule

__all__ = ["bias_to_affine", "diff_to_sparse", "mask_to_sparse", "read_native"]


def mask_to_sparse(weight: Tensor, mask: Tensor, *, layer: int, site: str) -> Sparse | None:
    """S = -W (1 - M): what the masked weight W * M lacks. None for a mask of ones.

    Source: Zhao et al. 2020, Masking as an efficient alternative to finetuning, arXiv:2004.12406.
    """
    return diff_to_sparse(-weight * (1 - mask.to(weight.dtype)), layer=layer, site=site)


def diff_to_sparse(diff: Tensor, *, layer: int, site: str) -> Sparse | None:
    """A weight difference [out, in], mostly zeros, in compressed rows. None for all zeros.

    Source: Guo et al. 2021, Parameter-efficient transfer learning with diff pruning, arXiv:2012.07463.
    """
    rows, columns = diff.nonzero(as_tuple=True)
    if not len(rows):
        return None
    counts = torch.bincount(rows, minlength=diff.shape[0])
    row_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Sparse(
        layer=layer,
        site=site,
        row_starts=row_starts.to(torch.int32),
        columns=columns.to(torch.int32),
        values=diff[rows, columns].to(torch.float32),
    )


def bias_to_affine(shared_bias: Tensor, tuned_bias: Tensor, *, layer: int, site: str) -> Affine:
    """A tuned bias as a shift after the shared one. Source: Ben Zaken et al. 2022, BitFit, arXiv:2106.10199."""
    return Affine(layer=layer, site=site, shift=(tuned_bias - shared_bias).to(torch.float32))


def read_native(path: Path, backbone: Backbone, task: str | None = None) -> TenantModule:
    """Read a native file made for this backbone. Raises: CorruptFile, WrongBackbone, RefusedCheckpoint."""
    data = path.read_bytes()
    header = parse_header(data)
    header.check(backbone.config, backbone.fingerprint, backbone.skip)
    if task not in (None, header.task):
        raise RefusedCheckpoint(f"the file holds a {header.task} head, not {task}; leave the task out", param="task")
    return read_tenant_bytes(data)
