"""Find the blocks and their seven projections in a transformers model, by structure and not by family."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from was_search.errors import ModelError
from was_search.quantised import QuantisedLinear
from was_search.shape import PROJECTIONS, ModelShape
from was_search.weight_format import AS_STORED

_SUFFIXES = {f"{name}_proj": name for name in PROJECTIONS}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FUSED = ("qkv_proj", "gate_up_proj", "c_attn", "query_key_value", "Wqkv", "dense_h_to_4h", "W_pack", "c_fc")


Projection = nn.Linear | QuantisedLinear


@dataclass(frozen=True)
class Block:
    """One decoder layer: its module, its name in the model, and its projections by name."""

    name: str
    module: nn.Module
    projections: dict[str, Projection]


@dataclass(frozen=True)
class Structure:
    """The L blocks of a model, in order of depth."""

    blocks: tuple[Block, ...]

    @property
    def shape(self) -> ModelShape:
        rows = [[block.projections[name] for name in PROJECTIONS] for block in self.blocks]
        return ModelShape(
            tuple(tuple(linear.in_features for linear in row) for row in rows),
            tuple(tuple(linear.out_features for linear in row) for row in rows),
        )

    @property
    def weights(self) -> str:
        """The format of the projections' weights, ``none`` where they are floats.

        Raises:
            ModelError: they have several.
        """
        found = {
            str(linear.form) if isinstance(linear, QuantisedLinear) else AS_STORED for _, _, linear in self.linears()
        }
        if len(found) > 1:
            raise ModelError(f"weights: one format for all projections is needed, got {', '.join(sorted(found))}")
        return found.pop()

    def linears(self) -> list[tuple[int, int, Projection]]:
        """Every projection as (block, projection index, module), block by block in the order of PROJECTIONS."""
        return [
            (b, p, block.projections[name]) for b, block in enumerate(self.blocks) for p, name in enumerate(PROJECTIONS)
        ]


def find_structure(model: nn.Module) -> Structure:
    """Blocks of ``model``: the members of a ModuleList that hold each of the seven projections exactly once.

    Llama, Mistral, Qwen2 and Qwen3 fit; so does any model that names its linear maps q_proj, k_proj, v_proj,
    o_proj, gate_proj, up_proj and down_proj.

    Raises:
        ModelError: no such list, naming what was looked for and what is missing; or a projection that occurs
            more than once in a block, or experts beside it (a mixture of experts); or a quantised projection.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            count = sum(leaf in _SUFFIXES for leaf in _leaf_names(module[0]))
            if count and (best is None or count > sum(leaf in _SUFFIXES for leaf in _leaf_names(best[1][0]))):
                best = (name, module)
    wanted = ", ".join(_SUFFIXES)
    if best is None:
        raise ModelError(
            f"{type(model).__name__}: no list of decoder blocks with the linear maps {wanted} was found"
            + _fused_hint(model)
        )
    blocks = tuple(_block(f"{best[0]}.{i}", child, wanted) for i, child in enumerate(best[1]))
    return Structure(blocks)


def device_of(linear: Projection) -> torch.device:
    """Where a projection's weight is."""
    return linear.device if isinstance(linear, QuantisedLinear) else linear.weight.device


def _block(name: str, module: nn.Module, wanted: str) -> Block:
    found: dict[str, Projection] = {}
    for path, child in module.named_modules():
        if "experts" in path.split("."):
            raise ModelError(
                f"{name}.{path}: a mixture of experts; only models with the seven projections {wanted} once in "
                "each block are supported"
            )
        leaf = path.rsplit(".", 1)[-1]
        projection = _SUFFIXES.get(leaf)
        if projection is None:
            continue
        # Other libraries' quantised layers may derive from Linear, with packed weights that norms would misread.
        if not isinstance(child, QuantisedLinear) and not (isinstance(child, nn.Linear) and _is_plain(child)):
            weight = getattr(child, "weight", None)
            dtype = f" of {weight.dtype}" if isinstance(weight, torch.Tensor) else ""
            raise ModelError(
                f"{name}.{path}: a {type(child).__name__}{dtype} where a torch.nn.Linear in bf16, fp16 or fp32 is "
                "needed; projections that others have quantised or converted are not supported: load the checkpoint "
                "unquantised, and round its weights with --weights int8 or int4"
            )
        if projection in found:
            raise ModelError(
                f"{name}: {leaf} occurs more than once (a mixture of experts?); only models with the seven "
                f"projections {wanted} once in each block are supported"
            )
        found[projection] = child
    missing = [f"{p}_proj" for p in PROJECTIONS if p not in found]
    if missing:
        raise ModelError(
            f"{name}: looked for the linear maps {wanted}; missing: {', '.join(missing)}" + _fused_hint(module)
        )
    return Block(name, module, found)


def _is_plain(linear: nn.Linear) -> bool:
    shape = (linear.out_features, linear.in_features)
    return linear.weight.dtype in _FLOATS and tuple(linear.weight.shape) == shape


def _leaf_names(module: nn.Module) -> list[str]:
    return [path.rsplit(".", 1)[-1] for path, _ in module.named_modules()]


def _fused_hint(module: nn.Module) -> str:
    fused = sorted({leaf for leaf in _leaf_names(module) if leaf in _FUSED or re.search(r"qkv", leaf, re.I)})
    return f"; it has fused maps ({', '.join(fused)}), which are not supported" if fused else ""
