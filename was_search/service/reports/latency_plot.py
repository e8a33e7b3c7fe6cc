"""The figure of losses against predicted decoding time."""

from __future__ import annotations

import math
from typing import Any

from was_search.decode_time.profile import LatencyProfile
from was_search.studies.fitness import FitnessName
from was_search.studies.origin import OriginKind
from was_search.studies.slots import Slot, SlotState
from was_search.texts.protocol import perplexity

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
    for kind, label in _KINDS.items():
        mine = [slot for slot in shown if slot.source.kind is kind]
        seconds = [profile.seconds(slot.sparsities) for slot in mine if slot.sparsities is not None]
        losses = [slot.loss_nats for slot in mine if slot.loss_nats is not None]
        figure.add_scatter(
            x=[round(1e3 * value, 6) for value in seconds],
            y=[round(perplexity(loss) if fitness == "nll" else loss, 5) for loss in losses],
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
        yaxis_title="perplexity" if fitness == "nll" else "KL to the dense model, nats per token",
        template="plotly_white",
    )
    return figure
