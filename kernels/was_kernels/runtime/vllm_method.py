"""Serve a plan by vLLM: the linear maps of a checkpoint that carries one.

Weights are loaded as vLLM loads any; then they are laid out as the runtime reads them. A batch whose requests have one
token each is masked; prompts are dense, whatever the plan says of them.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from was_kernels.ops import nvrtc
from was_kernels.ops.gather_launch import new_workspace
from was_kernels.ops.vllm_linear import vllm_linear
from was_kernels.runtime.plan_files import plan_folder
from was_kernels.runtime.side_by_side import Part, SideBySide
from was_kernels.runtime.sparse_linear import Vectors
from was_kernels.runtime.vllm_rules import PLAN_TENSORS, Batch, batch_of, projections_of, require_served
from was_search.checkpoints.limits import PLAN_METHOD
from was_search.checkpoints.plan_checkpoint import plan_beside
from was_search.errors import PlanError
from was_search.plan import Plan
from was_search.shape import PROJECTIONS
from was_search.weight_format import AS_STORED

_KEY = "was_vllm"
"""Of what is kept in vLLM's forward context: the batch, and before layers' names their maps."""

_ANOTHER = "the plan is for another model: export it with its weights again"


class PlanConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is in an environment of its own
    """The ``quantization_config`` of a checkpoint that carries a plan, and the plan itself."""

    def __init__(self, said: dict[str, Any]) -> None:
        super().__init__()
        self._said = said
        self._folder: Path | None = None
        self._claimed: set[tuple[int, int]] = set()
        self._workspaces: dict[torch.device, Tensor] = {}

    def get_name(self) -> str:
        return PLAN_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PlanConfig:
        return cls(config)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Pass over the plan's own tensors, which vLLM takes for weights, as they lie beside them."""
        return WeightsMapper(orig_to_new_regex={PLAN_TENSORS: None})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the plan beside the weights, and read it once: what is wrong with it is said before anything is loaded.

        Raises:
            PlanError: it is missing, damaged, or another one than the checkpoint's configuration says.
        """
        self._folder = plan_folder(model_name, revision)
        self.plan.require_weights(AS_STORED)

    @cached_property
    def plan(self) -> Plan:
        assert self._folder is not None
        return plan_beside(self._folder, self._said)

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan, which each process of vLLM reads for itself."""
        return {name: value for name, value in vars(self).items() if name != "plan"}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        if not isinstance(layer, LinearBase):
            return None
        require_served(get_current_vllm_config(), self.online_quantization_config)
        found = projections_of(prefix)
        if found is None:
            return UnquantizedLinearMethod()
        block, members = found
        self._claim(prefix, block, members)
        return PlanLinearMethod(self, prefix, block, members)

    def _claim(self, prefix: str, block: int, members: tuple[int, ...]) -> None:
        claimed = {(block, p) for p in members}
        if block >= self.plan.shape.n_blocks or claimed & self._claimed:
            raise PlanError(f"{prefix}: the plan has no such projection, or another layer is it already; {_ANOTHER}")
        self._claimed |= claimed

    def require_all_claimed(self) -> None:
        """Refuse a model that lacks a projection of the plan, which would be served without its mask."""
        every = ((b, p) for b in range(self.plan.shape.n_blocks) for p in range(len(PROJECTIONS)))
        lost = next((pair for pair in every if pair not in self._claimed), None)
        if lost is not None:
            raise PlanError(f"block {lost[0]}: vLLM's model has no {PROJECTIONS[lost[1]]} projection; {_ANOTHER}")

    def parts(self, block: int, members: tuple[int, ...]) -> list[Part]:
        """What the plan says of some projections of a block."""
        plan = self.plan
        return [
            Part(
                plan.shape.out_features[block][p],
                torch.tensor(plan.norms[block][p]),
                float(plan.thresholds[block, p]),
                float(plan.sparsities[block, p]),
                self._vectors(block, p),
            )
            for p in members
        ]

    def _vectors(self, block: int, p: int) -> Vectors | None:
        by = self.plan.compensation
        return None if by is None else (torch.tensor(by.scales[block][p]), torch.tensor(by.constants[block][p]))

    def workspace(self, device: torch.device) -> Tensor | None:
        """The workspace of the CUDA kernel; None where it cannot run."""
        if device.type != "cuda" or not nvrtc.compiles_here()[0]:
            return None
        if device not in self._workspaces:
            self._workspaces[device] = new_workspace(device)
        return self._workspaces[device]


@register_weight_loader_v2_supported_method
class PlanLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """The linear map of some projections of a block."""

    supports_pre_processed_weights = False

    def __init__(self, config: PlanConfig, prefix: str, block: int, members: tuple[int, ...]) -> None:
        super().__init__()
        self._config = config
        self._prefix = prefix
        self._block = block
        self._members = members
        self._layers: dict[str, Any] = get_current_vllm_config().compilation_config.static_forward_context
        self._width = 0

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *args: Any,
        **given: Any,
    ) -> None:
        shape, members = self._config.plan.shape, self._members
        wanted = [(shape.out_features[self._block][p], shape.in_features[self._block][p]) for p in members]
        found = [(width, input_size_per_partition) for width in output_partition_sizes]
        if found != wanted:
            raise PlanError(f"{self._prefix}: plan for weights {wanted}, the model has {found}; {_ANOTHER}")
        self._width = sum(output_partition_sizes)
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, *args, **given)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the weight out by columns, map by map, and let go of vLLM's own."""
        config, weight = self._config, layer.weight
        config.require_all_claimed()
        parts = config.parts(self._block, self._members)
        bias = getattr(layer, "bias", None)
        held = SideBySide(weight.data, parts, workspace=config.workspace(weight.device), bias=bias)
        layer.weight = nn.Parameter(weight.data.new_empty(0), requires_grad=False)
        self._layers[f"{_KEY}:{self._prefix}"] = held, config.plan.dense_prefix

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = vllm_linear(x.reshape(-1, x.shape[-1]), self._prefix, self._width)
        y = y if bias is None else y + bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self._width)


def product(x: Tensor, name: str) -> Tensor:
    """What ``was_vllm::linear`` computes: the product with the map called ``name`` of the model that is running."""
    context = get_forward_context()
    held, prefix = context.no_compile_layers[f"{_KEY}:{name}"]
    batch: Batch | None = context.additional_kwargs.get(_KEY)
    if batch is None:
        piecewise = context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        batch = batch_of(context.attn_metadata, x.shape[0], prefix, piecewise=piecewise)
        context.additional_kwargs[_KEY] = batch
    y: Tensor = held.step(x, batch.dense) if batch.one_token else held.whole(x)
    return y
