"""Find the blocks and their seven projections in a transformers model, by structure and not by family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from was_search.checkpoints.quantised import QuantisedLinear
from was_search.errors import ModelError
from was_search.shape import PROJECTIONS, SEPARATE, SHARED, Masks, ModelShape
from was_search.weight_format import AS_STORED

_NAMES: dict[str, tuple[str, ...]] = {name: (f"{name}_proj",) for name in PROJECTIONS}
"""What families call each projection's linear map; messages show the first."""

_SUFFIXES = {suffix: name for name, suffixes in _NAMES.items() for suffix in suffixes}
_FUSED_SUFFIXES = {"qkv_proj": SHARED[0], "gate_up_proj": SHARED[2]}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FUSED = ("c_attn", "query_key_value", "Wqkv", "dense_h_to_4h", "W_pack", "c_fc")


Projection = nn.Linear | QuantisedLinear


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        name: its name in the model.
        module: the layer.
        projections: the seven by name; those in a fused map are stand-ins with its input, their width and no weights.
        fused: fused maps by the projections that they hold.
    """

    name: str
    module: nn.Module
    projections: dict[str, Projection]
    fused: dict[tuple[int, ...], Projection] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskedInput:
    """An input with a mask of its own, the projections that read it, and the maps that a forward calls.

    ``linears`` is one map for each of ``members``, or the fused one of all of them.
    """

    block: int
    members: tuple[int, ...]
    linears: tuple[Projection, ...]


@dataclass(frozen=True)
class Structure:
    """The L blocks of a model, in order of depth, and which of their projections share a mask."""

    blocks: tuple[Block, ...]
    masks: Masks = "separate"

    @property
    def shape(self) -> ModelShape:
        rows = [[block.projections[name] for name in PROJECTIONS] for block in self.blocks]
        return ModelShape(
            tuple(tuple(linear.in_features for linear in row) for row in rows),
            tuple(tuple(linear.out_features for linear in row) for row in rows),
            self.masks,
        )

    @property
    def weights(self) -> str:
        """The format of the projections' weights, ``none`` where they are floats.

        Raises:
            ModelError: they have several.
        """
        linears = [linear for masked in self.inputs() for linear in masked.linears]
        found = {str(linear.form) if isinstance(linear, QuantisedLinear) else AS_STORED for linear in linears}
        if len(found) > 1:
            raise ModelError(f"weights: one format for all projections is needed, got {', '.join(sorted(found))}")
        return found.pop()

    def inputs(self) -> list[MaskedInput]:
        """Every input with a mask of its own, block by block in the order of PROJECTIONS."""
        groups = SHARED if self.masks == "shared" else SEPARATE
        return [
            MaskedInput(
                b,
                members,
                (block.fused[members],)
                if members in block.fused
                else tuple(block.projections[PROJECTIONS[p]] for p in members),
            )
            for b, block in enumerate(self.blocks)
            for members in groups
        ]

    def linears(self) -> list[tuple[int, int, Projection]]:
        """Every projection as (block, projection index, module), block by block in the order of PROJECTIONS."""
        return [
            (b, p, block.projections[name]) for b, block in enumerate(self.blocks) for p, name in enumerate(PROJECTIONS)
        ]


def find_structure(model: nn.Module, masks: Masks = "separate") -> Structure:
    """Blocks of ``model``: the members of a ModuleList that hold each of the seven projections exactly once.

    Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 and OLMo 2 fit; so does any model that names its linear maps q_proj,
    k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. With shared masks q, k and v may be one map ``qkv_proj``,
    and gate and up one ``gate_up_proj``, as in Phi-3, Phi-4 and GLM-4.

    Raises:
        ModelError: no such list, naming what was looked for and what is missing; or a projection that occurs
            more than once in a block, or experts beside it (a mixture of experts); or a quantised projection; or
            fused maps, which have one mask, with separate masks.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            count = _count(module[0])
            if count and (best is None or count > _count(best[1][0])):
                best = (name, module)
    wanted = ", ".join(names[0] for names in _NAMES.values())
    if best is None:
        raise ModelError(
            f"{_kind(model)}: no list of decoder blocks with the linear maps {wanted} was found" + _fused_hint(model)
        )
    blocks = tuple(_block(f"{best[0]}.{i}", child, wanted, _kind(model)) for i, child in enumerate(best[1]))
    if masks == "separate" and (fused := sorted(_leaf(path) for path in _fused_paths(blocks[0]))):
        raise ModelError(
            f"{_kind(model)} has fused maps ({', '.join(fused)}), whose projections have one input and one mask; "
            "give --masks shared"
        )
    return Structure(blocks, masks)


def device_of(linear: Projection) -> torch.device:
    """Where a projection's weight is."""
    return linear.device if isinstance(linear, QuantisedLinear) else linear.weight.device


def weight_of(linear: Projection) -> torch.Tensor:
    """A projection's weight [out_features, in_features]; a rounded one is written out."""
    return linear.dense_weight() if isinstance(linear, QuantisedLinear) else linear.weight


def token_rows(model: nn.Module) -> int:
    """Token ids that ``model`` has rows for: those of its embedding, or of its head where these are fewer."""
    inner: Any = model
    maps = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return min(int(each.weight.shape[0]) for each in maps if each is not None)


def _fused_paths(block: Block) -> Iterator[str]:
    own = {id(linear) for linear in block.fused.values()}
    return (path for path, module in block.module.named_modules() if id(module) in own)


def _block(name: str, module: nn.Module, wanted: str, kind: str) -> Block:
    found: dict[str, Projection] = {}
    fused: dict[tuple[int, ...], Projection] = {}
    for path, child in module.named_modules():
        if "experts" in path.split("."):
            raise ModelError(
                f"{kind}: {name}.{path}: a mixture of experts; only models with the seven projections {wanted} once in "
                "each block are supported"
            )
        leaf = _leaf(path)
        projection, members = _SUFFIXES.get(leaf), _FUSED_SUFFIXES.get(leaf)
        if projection is None and members is None:
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
        if members is not None and members not in fused:
            fused[members] = child
            continue
        if projection is None or projection in found:
            raise ModelError(
                f"{name}: {leaf} occurs more than once (a mixture of experts?); only models with the seven "
                f"projections {wanted} once in each block are supported"
            )
        found[projection] = child
    for members, linear in fused.items():
        found.update(_parts(name, members, linear, found))
    missing = [names[0] for p, names in _NAMES.items() if p not in found]
    if missing:
        raise ModelError(
            f"{kind}: {name}: looked for the linear maps {wanted}; missing: {', '.join(missing)}" + _fused_hint(module)
        )
    return Block(name, module, found, fused)


def _parts(
    name: str, members: tuple[int, ...], fused: Projection, beside: dict[str, Projection]
) -> dict[str, nn.Linear]:
    """Stand-ins for the projections of a fused map.

    Which rows of the weight belong to which projection depends on the family. It does not matter here, as they share
    one mask.
    """
    rows = fused.out_features
    widths: tuple[int, ...]
    if members == SHARED[0]:
        queries = beside["o"].in_features if "o" in beside else 0
        widths = (queries, (rows - queries) // 2, (rows - queries) // 2)
    else:
        widths = (rows // 2, rows // 2)
    names = [PROJECTIONS[p] for p in members]
    if sum(widths) != rows or min(widths) < 1 or any(part in beside for part in names):
        raise ModelError(f"{name}: a fused map of {rows} outputs cannot be told apart into {', '.join(names)}")
    return {part: _stand_in(fused, width) for part, width in zip(names, widths, strict=True)}


def _stand_in(fused: Projection, width: int) -> nn.Linear:
    # On the meta device: a view of the weight would keep it alive while the runtime lays it out anew.
    bias = fused.bias is not None
    dtype = fused.dtype if isinstance(fused, QuantisedLinear) else fused.weight.dtype
    return nn.Linear(fused.in_features, width, bias=bias, device="meta", dtype=dtype)


def _is_plain(linear: nn.Linear) -> bool:
    shape = (linear.out_features, linear.in_features)
    return linear.weight.dtype in _FLOATS and tuple(linear.weight.shape) == shape


def _kind(model: nn.Module) -> str:
    """The model's class and, where it has one, the type by which transformers knows it."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model_type {model_type})" if isinstance(model_type, str) else "")


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _leaf_names(module: nn.Module) -> list[str]:
    return [_leaf(path) for path, _ in module.named_modules()]


def _count(block: nn.Module) -> int:
    return sum(leaf in _SUFFIXES or leaf in _FUSED_SUFFIXES for leaf in _leaf_names(block))


def _fused_hint(module: nn.Module) -> str:
    fused = sorted({leaf for leaf in _leaf_names(module) if leaf in _FUSED or re.search(r"qkv", leaf, re.I)})
    return f"; it has other maps ({', '.join(fused)}), which are not supported" if fused else ""
