"""was-search: find how much of each layer's input an LLM can skip while decoding.

The names below are the public ones; every other name may change without notice. Importing the package imports neither
torch nor Ray: a name is fetched when it is first used.

    Settings      what to do: model, data, budget and every option of the command line
    Context       opens what steps need (database, workers, tokens) and closes it
    run           calibrate, seed, search, export and compare, skipping what is cached
    calibrate     score histograms of the dense model
    seed          the seed vectors of a study
    search        create or resume a study
    export        write the plan of a study's best vector
    compensate    learn a compensation for a plan and write the compensated plan
    evaluate      perplexity of the dense model and of a plan
    generate      decode text with a plan, or densely
    Sampling      how generate chooses tokens: temperature, top-k, top-p, penalty, seed
    Plan          an exported plan, with its figures
    sparsify      let a loaded model decode with a plan
    load_sparse   a folder with plan and weights, ready to decode
    WasError      what they all raise for what a user can mend

A step takes a context, and most of them nothing else:

>>> from pathlib import Path
>>> import was_search as was
>>> demo = Path(was.__file__).parent / "demo_data"
>>> settings = was.Settings(
...     model=str(demo / "model"), data=str(demo / "text"), device="cpu", sequence_length=128, test_sequences=8
... )
>>> with was.Context(settings) as context:  # doctest: +ELLIPSIS
...     (dense,) = was.evaluate(context, None)
...     words = was.generate(context, None, "def main(", max_new_tokens=4)
def main(...
>>> dense.protocol.describe()
'text [test] sha256:5b9521c2, 8 x 128 tokens, float32, batch 4, no BOS, first 1 token(s) dense'
>>> words.tokens, words.finish
(4, 'length')

The whole job, on a machine with a GPU, and what comes of it in a model of transformers:

    with was.Context(was.Settings(model="meta-llama/Llama-3.2-1B", data="wikitext2", target=0.6)) as context:
        plan = was.Plan.load(was.run(context).plan)
    handle = was.sparsify(model, plan)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from was_kernels import Sampling, load_sparse, sparsify
    from was_search.errors import WasError
    from was_search.plan import Plan
    from was_search.service.context import Context
    from was_search.service.settings import Settings
    from was_search.service.steps.calibration import calibrate
    from was_search.service.steps.decoding import generate
    from was_search.service.steps.evaluation import evaluate
    from was_search.service.steps.exporting import export
    from was_search.service.steps.main_job import run
    from was_search.service.steps.plan_compensation import compensate
    from was_search.service.steps.seeding import seed
    from was_search.service.steps.study import search

__version__ = "0.1.0"

__all__ = [
    "Context",
    "Plan",
    "Sampling",
    "Settings",
    "WasError",
    "__version__",
    "calibrate",
    "compensate",
    "evaluate",
    "export",
    "generate",
    "load_sparse",
    "run",
    "search",
    "seed",
    "sparsify",
]

_MODULES = {
    "Context": "was_search.service.context",
    "Plan": "was_search.plan",
    "Sampling": "was_kernels",
    "Settings": "was_search.service.settings",
    "WasError": "was_search.errors",
    "calibrate": "was_search.service.steps.calibration",
    "compensate": "was_search.service.steps.plan_compensation",
    "evaluate": "was_search.service.steps.evaluation",
    "export": "was_search.service.steps.exporting",
    "generate": "was_search.service.steps.decoding",
    "load_sparse": "was_kernels",
    "run": "was_search.service.steps.main_job",
    "search": "was_search.service.steps.study",
    "seed": "was_search.service.steps.seeding",
    "sparsify": "was_kernels",
}
"""Where a public name is defined."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
