"""Round weights to 8 or 4 bits in groups, each with a scale and an offset. Training-free, needs no activations."""

from __future__ import annotations

import torch
from torch import Tensor

from was_search.errors import ModelError
from was_search.weight_format import WeightFormat

_CHUNK = 1 << 22
"""Number of weights that are copied to float32 and rounded at a time."""


def round_groups(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row of ``groups`` [..., n], float32, to the nearest of 2**bits steps from its least to its greatest.

    Scale and offset are rounded to float16 before the weights are, so that these are nearest to what is stored.

    Returns:
        q, uint8 [..., n], in [0, 2**bits); scale and offset, float16 [...].
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, offset = ((high - low) / (2**bits - 1)).half(), low.half()
    step = scale.float()
    q = ((groups - offset.float()) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, 2**bits - 1)
    return q.to(torch.uint8), scale[..., 0], offset[..., 0]


def quantise(weight: Tensor, form: WeightFormat) -> tuple[Tensor, Tensor]:
    """Round ``weight`` [out, in] of any float dtype.

    Returns:
        packed, uint8 [in, bytes]: an input channel's outputs one after another, two in a byte at 4 bits, the first in
        its low half; scales, float16 [in, groups, 2]: scale and offset. The last group may be short.

    Raises:
        ModelError: the weight is not finite, or exceeds float16.
    """
    d_out, d_in = weight.shape
    device = weight.device
    packed = torch.empty((d_in, form.packed_bytes(d_out)), dtype=torch.uint8, device=device)
    scales = torch.empty((d_in, form.n_groups(d_out), 2), dtype=torch.float16, device=device)
    rows = max(1, _CHUNK // d_out)
    full = d_out // form.group * form.group
    for start in range(0, d_in, rows):
        part = weight[:, start : start + rows].detach().t().float()  # [rows, out]
        whole = round_groups(part[:, :full].reshape(len(part), -1, form.group), form.bits)
        pieces = [(whole[0].flatten(1), whole[1], whole[2])] if full else []
        if full < d_out:
            q, scale, offset = round_groups(part[:, full:], form.bits)
            pieces.append((q, scale[:, None], offset[:, None]))
        q, scale, offset = (torch.cat(kind, dim=1) for kind in zip(*pieces, strict=True))
        packed[start : start + rows] = pack(q, form.bits)
        scales[start : start + rows] = torch.stack((scale, offset), dim=2)
    if not bool(scales.isfinite().all()):
        raise ModelError("weights: some are not finite or exceed float16, and cannot be rounded; use --weights none")
    return packed, scales


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack uint8 [rows, n] into [rows, bytes]; at 4 bits an odd row ends with an empty half."""
    if bits == 8:
        return q
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The values that :func:`pack` was given, in ``width`` columns."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :width]


def dequantise(packed: Tensor, scales: Tensor, bits: int, group: int, width: int) -> Tensor:
    """The weight that packed values and scales stand for: float32 [in, out] of ``width`` outputs."""
    rows, n_groups = scales.shape[:2]
    q = unpack(packed, bits, width).float()
    if width % group:
        q = torch.nn.functional.pad(q, (0, n_groups * group - width))
    scale, offset = scales.float().unsqueeze(3).unbind(2)  # [in, groups, 1]
    return torch.addcmul(offset, q.view(rows, n_groups, group), scale).flatten(1)[:, :width]
