"""The figure of losses against predicted decoding time."""

from __future__ import annotations

import math
from typing import Any

from was_search.decode_time.profile import LatencyProfile
from was_search.service.reports.quantity import Quantity
from was_search.studies.fitness import FitnessName
from was_search.studies.origin import OriginKind
from was_search.studies.slots import Slot, SlotState

_KINDS = {OriginKind.SEED: "seeds", OriginKind.DESCENT: "descents", OriginKind.SAMPLER: "sampled"}


def step_time_figure(slots: list[Slot], profile: LatencyProfile, fitness: FitnessName = "nll") -> Any:
    """Perplexity (or KL) of complete trials against the step that the profile predicts; a plotly Figure.

    Stopped trials are left out: their losses are of fewer sequences.
    """
    import plotly.graph_objects as go

    shown = [
        slot
        for slot in slots
        if slot.state is SlotState.COMPLETE
        and slot.sparsities is not None
        and slot.loss_nats is not None
        and math.isfinite(slot.loss_nats)
    ]
    figure = go.Figure()
    quantity = Quantity.of([slot.loss_nats for slot in shown], fitness)
    for kind, label in _KINDS.items():
        mine = [slot for slot in shown if slot.source.kind is kind]
        seconds = [profile.seconds(slot.sparsities) for slot in mine if slot.sparsities is not None]
        figure.add_scatter(
            x=[round(1e3 * value, 6) for value in seconds],
            y=[quantity.shown(slot.loss_nats) for slot in mine],
            text=[
                f"slot {slot.number}, {slot.origin}, {profile.speedup(value):.3f}x"
                for slot, value in zip(mine, seconds, strict=True)
            ],
            mode="markers",
            name=label,
        )
    figure.update_layout(
        title=f"Loss on the search split against the predicted decoding step<br><sub>{profile.describe()}</sub>",
        xaxis_title="predicted ms a step",
        yaxis_title=quantity.words,
        template="plotly_white",
    )
    return figure
