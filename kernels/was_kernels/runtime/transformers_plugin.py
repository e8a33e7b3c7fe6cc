"""Let transformers load a checkpoint that carries a plan: ``from_pretrained`` gives the model running it.

Registered when ``was_kernels`` is imported (:mod:`was_kernels.plugin`), while transformers itself is imported: what
needs more of it than quantizers is imported in functions. The model may be moved and cast like any other: the plan is
taken off for it and applied again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from was_kernels.runtime.plan_files import plan_folder
from was_search.checkpoints.limits import PLAN_METHOD
from was_search.checkpoints.plan_checkpoint import plan_beside
from was_search.plan import JSON_NAME, Plan

if TYPE_CHECKING:
    from was_kernels.runtime.sparse_model import SparseModel


@register_quantization_config(PLAN_METHOD)
class WasConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint that carries a plan."""

    def __init__(
        self,
        quant_method: str = PLAN_METHOD,
        schema_version: int | None = None,
        plan_sha256: str = "",
        masks: str = "",
        sparsity: float = 0.0,
        **_: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # theirs are an enumeration
        self.schema_version = schema_version
        self.plan_sha256 = plan_sha256
        self.masks = masks
        self.sparsity = sparsity


@register_quantizer(PLAN_METHOD)
class WasQuantizer(HfQuantizer):
    """Applies the plan beside a checkpoint once its weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> None:
        self._plan = self._found(model, given.get("checkpoint_files") or [])

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        movable(model, self._plan)
        return model

    def _found(self, model: Any, files: list[str]) -> Plan:
        """The plan in the folder of the weights; from the hub its two files are fetched."""
        name = str(model.config._name_or_path)
        folder = Path(files[0]).parent if files else Path(name)
        if not (folder / JSON_NAME).is_file():
            folder = plan_folder(name, getattr(model.config, "_commit_hash", None))
        return plan_beside(folder, self.quantization_config.to_dict())

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """No: the folder that the model came from is what would be written."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def movable(model: Any, plan: Plan) -> None:
    """Apply ``plan`` to ``model``, and again whenever its tensors were moved or cast; ``model.was`` is the handle."""
    kind = type(model)

    def _apply(self: Any, change: Any, *args: Any, **given: Any) -> Any:
        handle: SparseModel | None = self.__dict__.pop("was", None)
        if handle is not None:
            handle.restore()
        kind._apply(self, change, *args, **given)
        if handle is not None:
            self.__dict__["was"] = _applied(self, plan)
        return self

    model.__class__ = type(kind.__name__, (kind,), {"_apply": _apply, "__module__": kind.__module__})
    model.__dict__["was"] = _applied(model, plan)


def _applied(model: Any, plan: Plan) -> SparseModel | None:
    """None for a model without weights, as on the meta device."""
    import torch

    from was_kernels.runtime.sparse_model import sparsify

    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return None
    with torch.inference_mode(False):
        return sparsify(model, plan)
