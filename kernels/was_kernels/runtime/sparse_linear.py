"""A linear map that skips the weights of dropped input channels."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from was_kernels.ops.column_bags import cutoffs
from was_kernels.ops.column_weight import MAX_ROWS, SparseMap
from was_kernels.ops.correction import Correction
from was_kernels.ops.gather_gemv import gather_gemv
from was_kernels.ops.gather_step import HALF, MAX_CHANNELS, GatherStep
from was_kernels.ops.reference import kept_channels, score_mask_reference
from was_kernels.runtime.compiled_code import compiled_step
from was_kernels.runtime.compiled_product import CompiledProduct
from was_kernels.runtime.counting import ProjectionCount
from was_kernels.runtime.cpu_product import CpuProduct
from was_kernels.runtime.held_weight import hold
from was_kernels.runtime.positions import DensePrefix
from was_search.checkpoints.structure import Projection, device_of

Vectors = tuple[Tensor, Tensor]
"""A scale and a constant of each output, float32 [out_features]."""

DENSE_ABOVE = 8
"""Rows of a one-token step above which it keeps every channel, unless told otherwise.

Rows keep channels almost independently: at 50 % and 8 rows all but 0.4 % of the weights must be read anyway, so that
little is left to be saved. A Llama-2-7B's step of 8 rows still takes 0.97 of what torch.compile makes of the dense one
(H100, 50 %), which hardly grows with the rows; that of 16 rows took 1.4 times as long as that of 8.
"""


class SparseLinear(nn.Module):
    """Replaces an ``nn.Linear`` or a :class:`was_search.checkpoints.quantised.QuantisedLinear`.

    The weight is laid out column-major, and inputs are masked; a compensation corrects the outputs of masked tokens.

    One-token steps of up to 16 rows use the CUDA sparse GEMV (``workspace``; up to 8 rows if weights are rounded), the
    Triton one (``triton=True``) or bags on a CPU (``cpu=True``), unless they have more than ``dense_above`` rows, which
    makes them dense; everything else masks the input and multiplies densely. For inference: none passes a gradient.

    Args:
        linear: what is replaced; its parameters are shared, and it must not be used until :meth:`restore_layout`.
        norms: float32 [in_features], on the weight's device.
        threshold: the score under which a channel is dropped; zero or less drops nothing.
        prefix: tells which tokens are dense; None masks every token.
        triton: use the Triton kernels.
        dense_prompts: mask one-token steps only.
        workspace: of :func:`was_kernels.ops.gather_launch.new_workspace`, to use the CUDA kernel where it fits; None:
            never.
        cpu: use :class:`was_kernels.runtime.cpu_product.CpuProduct` where it takes the weight.
        dense_above: one-token steps of more rows keep every channel; None: none do.
        compensation: makes ``scale * y + constant`` of a masked token's output y, whatever the threshold; None: nothing
            is corrected.

    Attributes:
        held: the weight.
        scale: that of :attr:`correction`, a buffer; None where nothing is corrected.
        constant: likewise.
        weight: the linear's parameter, or its packed buffer.
        dtype: what the model computes in.
        channel_bytes: bytes of the weight of one input channel, with scales and offsets.
        bags: the products with few rows on a CPU; None where other code makes them.
        workspace: that of the CUDA kernel; None where it does not take this map.
    """

    def __init__(
        self,
        linear: Projection,
        norms: Tensor,
        threshold: float,
        *,
        prefix: DensePrefix | None,
        triton: bool,
        dense_prompts: bool = False,
        workspace: Tensor | None = None,
        cpu: bool = False,
        dense_above: int | None = DENSE_ABOVE,
        compensation: Vectors | None = None,
    ) -> None:
        super().__init__()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.bias = linear.bias
        self.norms: Tensor
        self.register_buffer("norms", norms, persistent=False)
        self.scale: Tensor | None
        self.constant: Tensor | None
        self._correct(linear, compensation)
        self.threshold = threshold
        self.count: ProjectionCount | None = None
        self._prefix = prefix
        self._triton = triton
        self._dense_prompts = dense_prompts
        self._dense_above = sys.maxsize if dense_above is None else dense_above
        self._mask_op = score_mask_reference
        if triton:
            from was_kernels.ops.score_mask import score_mask
            from was_kernels.ops.sparse_gemv import sparse_gemv

            self._mask_op = score_mask
            self._gemv = sparse_gemv
        self.train(linear.training)
        self.held = hold(linear, spaced=cpu and isinstance(linear, nn.Linear) and _compiles(linear.weight))
        self.weight = self.held.tensor
        columns = self.held.columns
        self.dtype = self.held.dtype
        self.channel_bytes = columns.channel_bytes
        self._max_rows = columns.max_rows
        fits = self.out_features % columns.multiple == 0 and self.in_features <= MAX_CHANNELS and self.dtype in HALF
        self.workspace = workspace if fits else None
        self.bags = CpuProduct(self.held) if cpu and CpuProduct.takes(self.held) else None
        self._compiled: CompiledProduct | None = None
        self._cutoffs: tuple[int, Tensor] | None = None

    @property
    def sparse(self) -> SparseMap:
        """The map as the kernels take it."""
        return SparseMap(self.held.columns, self.norms, self.threshold, self.bias, self.correction)

    @property
    def correction(self) -> Correction | None:
        """What masked tokens' outputs are corrected by."""
        scale, constant = self._buffers["scale"], self._buffers["constant"]
        return None if scale is None or constant is None else Correction(scale, constant)

    @property
    def cutoffs(self) -> Tensor:
        """:func:`was_kernels.ops.column_bags.cutoffs` of this map, found when they are first asked for and anew when
        norms were written over."""
        version = self.norms._version
        if self._cutoffs is None or self._cutoffs[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                self._cutoffs = version, cutoffs(self.norms, self.threshold, self.dtype)
        return self._cutoffs[1]

    @property
    def state(self) -> tuple[int | None, ...]:
        """What is another one where the mask, the bias or the correction is."""
        bias, scale = self.bias, self._buffers["scale"]
        return self.norms._version, *(None if each is None else each.data_ptr() for each in (bias, scale))

    def restore_layout(self) -> None:
        """Put the weight back as it was, bit for bit; the replaced linear may be used again."""
        self.held.restore()

    def step_threshold(self, rows: int) -> float:
        """The threshold of a one-token step: zero, which keeps every channel, above ``dense_above`` rows."""
        return 0.0 if rows > self._dense_above else self.threshold

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        rows = x.numel() // self.in_features
        one_token = x.dim() < 3 or x.shape[-2] == 1
        dense = None if self._prefix is None else self._prefix.dense(x)
        threshold = self.step_threshold(rows) if one_token else self.threshold
        if self.count is not None and one_token:
            self.count.add(kept_channels(x.reshape(rows, -1), self.norms, threshold), dense)
        correction = self.correction
        whole = rows > self._dense_above if one_token else self._dense_prompts
        if whole or (threshold <= 0.0 and correction is None):
            if self.bags is not None and one_token and self._on_cpu(x):
                return self._every(self.bags, x.reshape(rows, self.in_features)).view(*x.shape[:-1], -1)
            return self.held.multiply(x, self.bias)
        if one_token:
            y = self._few_rows(x.reshape(rows, self.in_features), dense)
            if y is not None:
                return y.view(*x.shape[:-1], self.out_features)
        kept = self._mask_op(x, self.norms, self.threshold, dense)
        if correction is None:
            return self.held.multiply(kept, self.bias)
        return correction.applied(self.held.multiply(kept, None), self.bias, dense)

    def _few_rows(self, x: Tensor, dense: Tensor | None) -> Tensor | None:
        """The sparse product of x [B, in_features], or None where no kernel takes it."""
        rows = x.shape[0]
        if x.dtype != self.dtype:
            return None
        if self.workspace is not None and rows <= self._max_rows:
            return gather_gemv(GatherStep(x, (self.sparse,), dense=dense), self.workspace, early=True)
        if self._triton and rows <= MAX_ROWS:
            return self._gemv(x, self.sparse, dense)
        if self.bags is not None and rows <= MAX_ROWS and self._on_cpu(x):
            compiled = self._compiled_here()
            if compiled is not None and compiled.is_worth(rows, torch.get_num_threads()):
                return compiled((self,), x, dense)
            correction = self.correction
            if correction is None:
                return self.bags.masked(x, self._keep(x, dense), self.bias)
            y = self.bags.every(x, None) if self.threshold <= 0.0 else self.bags.masked(x, self._keep(x, dense), None)
            return correction.applied(y, self.bias, dense)
        return None

    def _every(self, bags: CpuProduct, x: Tensor) -> Tensor:
        """The product of x [B, in_features] with all channels."""
        compiled = self._compiled_here() if x.shape[0] == 1 else None
        if compiled is not None and compiled.is_worth(1, torch.get_num_threads(), 0.0):
            return compiled((self,), x, x.new_ones(1, dtype=torch.bool))
        return bags.every(x, self.bias)

    def _compiled_here(self) -> CompiledProduct | None:
        """The compiled product, made where it is first asked for: maps of one input have one for all of them."""
        if self._compiled is None:
            self._compiled = CompiledProduct.of([self.held])
        return self._compiled

    def _keep(self, x: Tensor, dense: Tensor | None) -> Tensor:
        keep = x.abs() >= self.cutoffs
        return keep if dense is None else keep | dense[:, None]

    def _correct(self, linear: Projection, compensation: Vectors | None) -> None:
        """Take over a compensation, the bias of ``linear`` folded into it."""
        scale = constant = None
        if compensation is not None:
            given, added = (norms_like(vector, device_of(linear)) for vector in compensation)
            correction = Correction.of(given, added, linear.bias)
            scale, constant = correction.scale, correction.constant
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("constant", constant, persistent=False)

    def _on_cpu(self, x: Tensor) -> bool:
        """Whether bags may be made of x: how many there are is known on the host only, and none passes a gradient."""
        if x.dtype != self.dtype or torch.compiler.is_compiling() or not x.numel():
            return False
        return not (torch.is_grad_enabled() and x.requires_grad)

    def extra_repr(self) -> str:
        here = "reference" if self.bags is None else "cpu"
        kernels = "cuda" if self.workspace is not None else "triton" if self._triton else here
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, threshold={self.threshold:.4g}, {kernels}"
        )


def _compiles(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and compiled_step(weight.dtype) is not None


def norms_like(values: Tensor, device: torch.device) -> Tensor:
    """``values`` as float32 on the device of the weight."""
    return values.to(device=device, dtype=torch.float32).contiguous()
