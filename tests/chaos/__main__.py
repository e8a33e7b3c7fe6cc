"""`python -m tests.chaos --faults 200 --seed 0`: the long chaos run; what it does is printed as it happens."""

from __future__ import annotations

import argparse
import random
import signal
import sys
from functools import partial
from types import FrameType
from typing import NoReturn

from tests.chaos.cluster import Plan
from tests.chaos.run import chaos, random_kinds


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    """An ordinary end, which ends the cluster too; a second signal must not break that off."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signum)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="faults to inject")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order and times")
    parser.add_argument("--trials", type=int, default=0, help="slots of the study; 0: two a fault")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminated)
    rng = random.Random(options.seed)
    plan = Plan(trials=options.trials or 2 * options.faults + 20)
    chaos(plan, random_kinds(options.faults, rng), rng, say=partial(print, flush=True))
