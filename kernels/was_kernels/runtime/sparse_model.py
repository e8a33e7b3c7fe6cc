"""Apply a plan to a transformers model: swap its projections for sparse ones, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from was_kernels import triton_available
from was_kernels.ops import nvrtc
from was_kernels.ops.gather_launch import new_workspace
from was_kernels.ops.gather_step import HALF
from was_kernels.runtime import cpu_step, decode_model
from was_kernels.runtime.compiled_code import compiles_here
from was_kernels.runtime.compiled_head import compile_head
from was_kernels.runtime.counting import KeptCounts, ProjectionCount
from was_kernels.runtime.decode_block import DecodeBlock, fits
from was_kernels.runtime.decode_model import DecodeModel
from was_kernels.runtime.decoding_loop import GREEDY, DecodingLoop
from was_kernels.runtime.fused_forward import fuse, unfuse
from was_kernels.runtime.positions import DensePrefix
from was_kernels.runtime.sampling import Sampling
from was_kernels.runtime.sparse_linear import DENSE_ABOVE, SparseLinear, Vectors, norms_like
from was_kernels.runtime.step_graphs import StepGraphs, supports
from was_search.checkpoints.ordinary_tensors import ordinary_tensors
from was_search.checkpoints.quantised import QuantisedLinear
from was_search.checkpoints.structure import Projection, Structure, device_of, find_structure
from was_search.errors import ConfigError, ModelError, PlanError, ResourceError
from was_search.masks.corrections import corrections
from was_search.plan import Plan
from was_search.shape import N_PROJECTIONS, ModelShape

Chosen = Literal["cuda", "triton", "cpu", "reference"]
Backend = Literal["auto", Chosen]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class _Swap:
    parent: nn.Module
    name: str
    linear: Projection
    sparse: SparseLinear
    block: int
    members: tuple[int, ...]


class SparseModel:
    """A model running a plan, from :func:`sparsify` until :meth:`restore`; as a context it gives the model.

    Owned by one thread, like the model.

    Attributes:
        model: the model, changed in place.
        plan: what is applied.
        shape: the model's projections.
        backend: ``cuda``, ``triton``, ``cpu`` or ``reference``.
        fused: blocks whose one-token steps run fused.
        eager_because: why the last one-token step did not run from a CUDA graph; None if it did, or there was none.
        uncompiled_because: why torch makes the products on a CPU; None where compiled code does, or another backend.
    """

    def __init__(self, model: nn.Module, plan: Plan, shape: ModelShape, backend: str) -> None:
        self.model = model
        self.plan = plan
        self.shape = shape
        self.backend = backend
        self._swaps: list[_Swap] = []
        self._hooks: list[RemovableHandle] = []
        self._fused: list[nn.Module] = []
        self._fused_decoder: nn.Module | None = None
        self._fused_head: nn.Module | None = None
        self._graphs: StepGraphs | None = None
        self._loop: DecodingLoop | None = None

    @property
    def eager_because(self) -> str | None:
        if self._graphs is not None:
            return self._graphs.refusal
        return "graphs are off" if self._fused_decoder is not None else "its blocks do not run fused"

    @property
    def uncompiled_because(self) -> str | None:
        dtypes = {swap.sparse.dtype for swap in self._swaps if swap.sparse.bags is not None}
        return next((why for good, why in map(compiles_here, dtypes) if not good), None)

    @property
    def fused(self) -> int:
        return len(self._fused) if self._fused_decoder is None else self.shape.n_blocks

    @property
    def projections(self) -> list[SparseLinear]:
        """The swapped linear maps, block by block: projections, or maps that hold several projections."""
        return [swap.sparse for swap in self._swaps]

    @property
    def loop(self) -> DecodingLoop:
        """The decoding loop that :meth:`stream` uses."""
        if self._loop is None:
            self._loop = DecodingLoop(self.model)
        return self._loop

    def stream(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        eos: Collection[int] | None = None,
        mask: Tensor | None = None,
    ) -> Iterator[list[int | None]]:
        """Decode step by step, faster than ``generate``: one token for each row, as they come.

        Arguments and errors are those of :meth:`was_kernels.DecodingLoop.stream`. While kept channels are counted, no
        step is replayed from a graph.

        Raises:
            ConfigError: the plan is no longer applied, or an argument is wrong.
        """
        if not self._swaps:
            raise ConfigError("stream: the plan is no longer applied; call sparsify again")
        counts = any(swap.sparse.count is not None for swap in self._swaps)
        loop = DecodingLoop(self.model, graphs=False) if counts else self.loop
        return loop.stream(ids, max_new_tokens=max_new_tokens, sampling=sampling, eos=eos, mask=mask)

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    @ordinary_tensors()
    def restore(self) -> None:
        """Give the model its own linear maps back, weights bit-identical; a second call does nothing.

        In any mode of torch: the weights may be trained again afterwards.
        """
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._loop = None
        if self._graphs is not None:
            self._graphs.drop()
            unfuse(self.model)
            self._graphs = None
        if self._fused_decoder is not None:
            unfuse(self._fused_decoder)
            self._fused_decoder = None
        if self._fused_head is not None:
            unfuse(self._fused_head)
            self._fused_head = None
        while self._fused:
            unfuse(self._fused.pop())
        while self._swaps:
            swap = self._swaps[-1]
            with torch.no_grad():
                swap.sparse.restore_layout()
            setattr(swap.parent, swap.name, swap.linear)
            self._swaps.pop()

    @contextmanager
    def counting(self) -> Iterator[KeptCounts]:
        """Count kept channels in the one-token steps made inside; the counts may be read during and after.

        It adds a few small operations to each projection: leave it off when timing.
        """
        if not self._swaps:
            raise ConfigError("counting: the plan is no longer applied; call sparsify again")
        counts = [ProjectionCount(swap.sparse.weight.device) for swap in self._swaps]
        for swap, count in zip(self._swaps, counts, strict=True):
            swap.sparse.count = count
        of = {(s.block, p): count for s, count in zip(self._swaps, counts, strict=True) for p in s.members}
        rows = [[of[b, p] for p in range(N_PROJECTIONS)] for b in range(self.shape.n_blocks)]
        try:
            yield KeptCounts(self.shape, rows)
        finally:
            for swap in self._swaps:
                swap.sparse.count = None


@ordinary_tensors()
def sparsify(
    model: nn.Module,
    plan: Plan,
    *,
    backend: Backend = "auto",
    fingerprint: str | None = None,
    dense_above: int | None = DENSE_ABOVE,
    graphs: bool = True,
) -> SparseModel:
    """Swap the seven projections of every block of ``model`` for sparse ones, in place and at once.

    Tokens outside the plan's dense prefix have their inputs masked, those of a prompt unless the plan leaves prompts
    dense; one-token steps skip the dropped channels' weights. A plan's compensation corrects the outputs of masked
    tokens, and of no other. Works with ``generate`` (dynamic and static cache, any
    batch). With the ``cuda`` backend, blocks of Llama, Mistral, Qwen2 and Qwen3 run one-token steps of up to
    ``dense_above`` rows (at most 16, 8 of rounded weights) over a static cache in five launches. Restore before saving
    the model or moving it to other dtypes or devices. Where hooks are on a block's modules (accelerate puts some on a
    model that it spreads over devices), or the cache is offloaded, that block runs unfused.

    Args:
        model: a transformers causal language model, or its decoder.
        plan: thresholds and norms for this model.
        backend: ``auto`` takes the CUDA kernels where all projections are on an NVIDIA GPU in half precision, else
            Triton where their dtype has kernels; ``cpu`` where all are on a CPU in half or single precision; else the
            plain reference. Any other name is taken or refused.
        fingerprint: the checkpoint's, if known; checked against the plan's.
        dense_above: one-token steps of more rows keep every channel, since nearly all weights are read for one row or
            another and masking only costs; None: mask them all the same.

    Returns:
        A handle that undoes the change with ``restore()``, or on leaving it as a context.

    Raises:
        PlanError: the plan belongs to another model or to weights of another format, or the model runs a plan already.
        ModelError: the model lacks the seven projections, or some are not loaded (on the meta device).
        ResourceError: ``cuda`` or ``triton`` was asked for and is not there, or ``cpu`` for a model elsewhere.
        ConfigError: ``backend`` is not one of the five, or cannot take the model's dtype; or ``dense_above`` is
            under 1.
    """
    if dense_above is not None and dense_above < 1:
        raise ConfigError(f"dense_above: must be at least 1, or None, got {dense_above}")
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise PlanError("this model runs a plan already; call restore() on it before sparsify")
    structure = find_structure(model, plan.shape.masks)
    if fingerprint is not None:
        plan.require_model(fingerprint, structure.shape)
    plan.require_weights(structure.weights)
    plan.require_shape(structure.shape)
    _require_own_weights(structure)
    chosen = _choose_backend(backend, structure)
    prefix = DensePrefix(plan.dense_prefix) if plan.dense_prefix > 0 else None
    handle = SparseModel(model, plan, structure.shape, chosen)
    workspaces: dict[torch.device, Tensor] = {}
    if chosen == "cuda":
        devices = {device_of(linear) for linear in _linears(structure)}
        workspaces = {device: new_workspace(device) for device in devices}
    compensation = _vectors(plan, structure)
    try:
        for masked in structure.inputs():
            b, p = masked.block, masked.members[0]
            norms = norms_like(torch.tensor(plan.norms[b][p]), device_of(masked.linears[0]))
            fused = len(masked.linears) < len(masked.members)
            for i, linear in enumerate(masked.linears):
                parent, name = _parent(structure.blocks[b].module, linear)
                with torch.no_grad():
                    sparse = SparseLinear(
                        linear,
                        norms,
                        float(plan.thresholds[b, p]),
                        prefix=prefix,
                        triton=chosen in ("cuda", "triton"),
                        dense_prompts=plan.prefill == "dense",
                        workspace=workspaces.get(device_of(linear)),
                        cpu=chosen == "cpu",
                        dense_above=dense_above,
                        compensation=next(compensation),
                    )
                members = masked.members if fused else masked.members[i : i + 1]
                handle._swaps.append(_Swap(parent, name, linear, sparse, b, members))
                setattr(parent, name, sparse)
        steps: list[DecodeBlock] = []
        if chosen == "cuda":
            steps = _fuse_blocks(handle, structure, prefix, workspaces, dense_above)
        decoder = _decoder(model, structure)
        step: DecodeModel | None = None
        if chosen == "cpu" and cpu_step.fits(decoder):
            step = cpu_step.CpuModel(decoder, prefix, dense_above)
        elif len(steps) == len(structure.blocks) and decode_model.fits(decoder):
            step = DecodeModel(decoder, steps, prefix)
        if chosen == "cpu":
            handle._fused_head = compile_head(model)
        if step is not None:
            fuse(decoder, step)
            handle._fused_decoder = decoder
            if graphs and supports(model):
                handle._graphs = StepGraphs(model, step)
                fuse(model, handle._graphs)
        elif prefix is not None:
            handle._hooks.extend(prefix.attach(decoder))
    except BaseException:
        handle.restore()
        raise
    return handle


def _require_own_weights(structure: Structure) -> None:
    linears = _linears(structure)
    if any(device_of(linear).type == "meta" for linear in linears):
        raise ModelError("some projections are not loaded (meta device): offloaded models cannot run a plan")
    if len({id(_held(linear)) for linear in linears}) < len(linears):
        raise ModelError("some projections share one weight: models with shared blocks cannot run a plan")


def _vectors(plan: Plan, structure: Structure) -> Iterator[Vectors | None]:
    """What the plan's compensation has for each linear map, in the order of the structure's inputs."""
    if plan.compensation is None:
        return repeat(None)
    return ((one.scale, one.constant) for one in corrections(structure, plan.compensation))


def _linears(structure: Structure) -> list[Projection]:
    """The linear maps that a forward calls."""
    return [linear for masked in structure.inputs() for linear in masked.linears]


def _fuse_blocks(
    handle: SparseModel,
    structure: Structure,
    prefix: DensePrefix | None,
    workspaces: dict[torch.device, Tensor],
    dense_above: int | None,
) -> list[DecodeBlock]:
    steps: list[DecodeBlock] = []
    for block in structure.blocks:
        layer: Any = block.module
        if fits(layer) and len({weight.device for weight in layer.parameters()}) == 1:
            workspace = workspaces[layer.self_attn.q_proj.norms.device]
            steps.append(DecodeBlock(layer, prefix, workspace, dense_above=dense_above))
            fuse(layer, steps[-1])
            handle._fused.append(layer)
    return steps


def _choose_backend(backend: str, structure: Structure) -> Chosen:
    if backend not in BACKENDS:
        raise ConfigError(f"backend: must be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, got {backend!r}")
    if backend == "reference":
        return "reference"
    linears = _linears(structure)
    dtypes = {linear.dtype if isinstance(linear, QuantisedLinear) else linear.weight.dtype for linear in linears}
    on_gpu = all(device_of(linear).type == "cuda" for linear in linears)
    compiles, why_not = nvrtc.compiles_here()
    if backend == "cuda" or (backend == "auto" and on_gpu and compiles and dtypes <= set(HALF)):
        if not dtypes <= set(HALF):
            raise ConfigError(f"backend: cuda takes float16 and bfloat16, the model has {dtypes}")
        if not (on_gpu and compiles):
            where = why_not or "the model is not wholly on a GPU"
            raise ResourceError(f"backend cuda: {where}; use backend auto or reference")
        return "cuda"
    on_cpu = all(device_of(linear).type == "cpu" for linear in linears)
    if backend == "cpu" or (backend == "auto" and on_cpu and dtypes <= set(_DTYPES)):
        if not dtypes <= set(_DTYPES):
            raise ConfigError(f"backend: cpu takes float16, bfloat16 and float32, the model has {dtypes}")
        if not on_cpu:
            raise ResourceError("backend cpu: the model is not wholly on a CPU; use backend auto or reference")
        return "cpu"
    good, reason = triton_available()
    if backend == "auto":
        return "triton" if on_gpu and good and dtypes <= set(_DTYPES) else "reference"
    if not dtypes <= set(_DTYPES):
        raise ConfigError(f"backend: triton takes float16, bfloat16 and float32, the model has {dtypes}")
    if not (on_gpu and good) and not _interpreter():
        where = reason if not good else "the model is not wholly on a GPU"
        raise ResourceError(f"backend triton: {where}; use backend auto or reference")
    return "triton"


def _interpreter() -> bool:
    try:
        from was_kernels.ops import score_mask
        from was_kernels.ops.triton_launch import interpreted
    except ImportError:
        return False
    return interpreted(score_mask._score_mask_kernel)


def _decoder(model: nn.Module, structure: Structure) -> nn.Module:
    """The module that holds the list of blocks: ``model.layers.0`` -> ``model``."""
    path = structure.blocks[0].name.split(".")[:-2]
    return model.get_submodule(".".join(path))


def _held(linear: Projection) -> Tensor:
    return linear.packed if isinstance(linear, QuantisedLinear) else linear.weight


def _parent(block: nn.Module, linear: nn.Module) -> tuple[nn.Module, str]:
    path = next(path for path, module in block.named_modules() if module is linear)
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent), name
