"""Make plans known to vLLM: what its entry point ``vllm.general_plugins`` calls in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Register the quantisation method ``was``; a second call changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from was_kernels.ops.vllm_linear import made_by
    from was_kernels.runtime.vllm_method import PlanConfig, product
    from was_search.checkpoints.limits import PLAN_METHOD

    made_by(product)
    register_quantization_config(PLAN_METHOD)(PlanConfig)
