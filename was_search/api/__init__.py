"""The steps as plain functions of a Context: the composition root.

with Context(Settings(model="meta-llama/Llama-3.2-1B", data="wikitext2"), RichReporter()) as context:
    result = run(context)
"""

from was_search.api.calibration import calibrate, operating_point
from was_search.api.comparison import run
from was_search.api.context import Context
from was_search.api.control import ask, change
from was_search.api.decoding import generate
from was_search.api.demonstration import demo, demo_settings
from was_search.api.evaluation import evaluate, evaluate_on_tasks
from was_search.api.exporting import add_weights, export
from was_search.api.interpolation import interpolate, may_interpolate
from was_search.api.machine_checks import doctor
from was_search.api.max_increase import run_max_increase
from was_search.api.profiling import profile
from was_search.api.seeding import seed, sensitivity
from was_search.api.step_times import bench
from was_search.api.study import search
from was_search.api.study_list import dashboard, delete, studies
from was_search.api.study_status import status, watch
from was_search.api.targets import run_targets

__all__ = [
    "Context",
    "add_weights",
    "ask",
    "bench",
    "calibrate",
    "change",
    "dashboard",
    "delete",
    "demo",
    "demo_settings",
    "doctor",
    "evaluate",
    "evaluate_on_tasks",
    "export",
    "generate",
    "interpolate",
    "may_interpolate",
    "operating_point",
    "profile",
    "run",
    "run_max_increase",
    "run_targets",
    "search",
    "seed",
    "sensitivity",
    "status",
    "studies",
    "watch",
]
