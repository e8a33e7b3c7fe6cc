"""Commands that use a plan (evaluate, generate, bench), and the profile that predicts a step's time."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from was_search.checkpoints.column_layout import COLUMNS_NAME
from was_search.checkpoints.files import read_object
from was_search.checkpoints.plan_checkpoint import KEY, is_plan_config, plan_beside
from was_search.errors import ConfigError, PlanError
from was_search.plan import JSON_NAME, Plan
from was_search.service.cli.command import Commands, Invocation
from was_search.service.options import Group
from was_search.service.settings import Settings
from was_search.service.settings_file import load_settings

commands = Commands("Use a plan")

Gpus = Annotated[int, typer.Option("--gpus", help="GPUs that the model is spread over, whole blocks on each.")]
PlanIn = Annotated[
    Path | None,
    typer.Option(
        "--plan", help="Folder of a plan, alone or with its weights; the settings it was made with are the defaults."
    ),
]


@commands.command(Group.MODEL, Group.TEXT, Group.CALIBRATION, "search_sequences")
def evaluate(
    invocation: Invocation,
    *,
    plan: PlanIn = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on: calibration, search or test.")] = "test",
    tasks: Annotated[str | None, typer.Option(help="Comma-separated lm-eval tasks instead of perplexity.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N items of each task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own lm-eval task files.")] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="Formats to compare, such as none,int8,int4; if not given, the plan's and none. Tasks take one."
        ),
    ] = "",
    against: Annotated[
        Path | None, typer.Option(help="Folder of another plan of the same model: do the two differ on this text?")
    ] = None,
    continuations: Annotated[
        int,
        typer.Option(help="Also continue N of the sequences by greedy decoding, dense and with the plan, and compare."),
    ] = 0,
    gpus: Gpus = 1,
) -> None:
    """Measure a plan beside the dense model: perplexity, flips and total variation, or tasks."""
    from was_search.service.steps import evaluation
    from was_search.texts.protocol import SPLITS

    if split not in SPLITS:
        raise ConfigError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}")
    loaded, base = load_plan(plan)
    other = None if against is None else Plan.load(against)
    if other is not None and (loaded is None or tasks or "," in weights):
        raise ConfigError("against: compares two plans on text; give --plan, no --tasks, and one format of --weights")
    if tasks and continuations:
        raise ConfigError("continuations: are of text; leave out --tasks")
    formats = [form.strip() for form in weights.split(",") if form.strip()]
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise ConfigError("tasks: names none; leave it out for perplexity")
    if limit is not None and tasks is None:
        raise ConfigError("limit: is of tasks; give --tasks")
    if len(formats) == 1:
        invocation.flags.update(weights=formats[0])

    def step(context: Any) -> Any:
        options: dict[str, Any] = {"gpus": gpus, "continuations": continuations}
        if other is not None and loaded is not None:
            return evaluation.evaluate_against(context, loaded, other, split, *formats, **options)
        if not names:
            return evaluation.evaluate(context, loaded, split, formats, **options)
        if len(formats) > 1:
            raise ConfigError(f"weights: tasks take one format, got {weights!r}")
        return evaluation.evaluate_on_tasks(context, loaded, names, limit=limit, include_path=include_path, gpus=gpus)

    invocation.run(step, base)


@commands.command(Group.MODEL)
def generate(
    invocation: Invocation,
    *,
    prompt: Annotated[
        list[str],
        typer.Option(help="Text to continue, - for what standard input holds; several are taken one after another."),
    ],
    plan: PlanIn = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, for the tokenizer's chat template to write.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to decode, at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Draw tokens, the more evenly the higher; 0 takes the likeliest each time.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the likeliest K tokens only; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens that have this probability together; 1: from all.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Make tokens that were there before less likely, if over 1.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed of the draws: the same one gives the same text.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends the text and is left out of it; may be given again.")
    ] = None,
    gpus: Gpus = 1,
) -> None:
    """Decode with a plan's sparse runtime, or densely without a plan, and show the text as it comes."""
    from was_kernels import Sampling
    from was_search.service.steps import decoding

    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, seed)
    loaded, base = load_plan(plan)
    prompts = [read_prompt(given) for given in prompt]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop or ()}
    invocation.run(
        lambda context: decoding.generate_each(context, loaded, prompts, **options, chat=chat, gpus=gpus), base
    )


@commands.command(Group.MODEL)
def serve(
    invocation: Invocation,
    *,
    plan: PlanIn = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is reached from here only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="What clients call the model; if not given, its own name.")] = "",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="WAS_SEARCH_API_KEY", help="Key that clients must send; better in the environment."),
    ] = None,
    most_new: Annotated[int, typer.Option("--max-new-tokens", help="New tokens of one request at most.")] = 1024,
    most_requests: Annotated[
        int, typer.Option("--max-requests", help="Requests at a time, most of them waiting.")
    ] = 16,
    gpus: Gpus = 1,
) -> None:
    """Serve a plan, or a dense model, by OpenAI's protocol: completions and chat, with streaming."""
    from was_search.service.steps import serving

    loaded, base = load_plan(plan)
    if api_key == "" or (api_key is None and os.environ.get("WAS_SEARCH_API_KEY") == ""):  # which click takes for unset
        raise ConfigError("API key: is empty; leave --api-key and WAS_SEARCH_API_KEY out to serve without one")
    options = serving.ServerOptions(host, port, name, api_key or "", most_new, most_requests)
    invocation.run(lambda context: serving.serve(context, loaded, options, gpus=gpus), base)


@commands.command(Group.MODEL, "data", "test_sequences")
def bench(
    invocation: Invocation,
    *,
    plan: PlanIn = None,
    batch: Annotated[str, typer.Option(help="Rows that decode together; several: 1,2,4,8.")] = "1",
    kv_length: Annotated[str, typer.Option(help="Positions in the cache; several: 256,4096,16384.")] = "256",
    steps: Annotated[int, typer.Option(help="Steps timed, and tokens decoded, for each row of the table.")] = 50,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile's dense steps too.")] = False,
    profile: Annotated[
        str | None, typer.Option(help="File of 'was-search profile': print what it predicts too.")
    ] = None,
) -> None:
    """Time decoding, dense and with a plan: a step and what it reads, tokens a second of our loop and of generate."""
    from was_search.service.steps import step_times

    batches, kv_lengths = whole_numbers("batch", batch), whole_numbers("kv_length", kv_length)
    loaded, base = load_plan(plan)
    invocation.flags.update(profile=profile)
    invocation.run(
        lambda context: step_times.bench(
            context, loaded, batches=batches, kv_lengths=kv_lengths, steps=steps, compiled=compiled
        ),
        base,
    )


@commands.command(Group.MODEL, Group.STORAGE)
def profile(
    invocation: Invocation,
    *,
    rows: Annotated[int, typer.Option(help="Rows that decode together, at most 8.")] = 1,
    kv_length: Annotated[int, typer.Option(help="Positions in the cache.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps timed for each point.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds over all points; a point's time is their median.")] = 3,
    check: Annotated[
        int, typer.Option(help="Number of random vectors to time and to compare with their predictions.")
    ] = 0,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Time torch.compile's dense step too; on a GPU it is the default."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write the profile to, for --profile.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even if the database has a profile.")] = False,
) -> None:
    """Measure how a decode step's time depends on sparsity on this device, to predict it for any vector."""
    from was_search.service.steps import profiling

    invocation.run(
        lambda context: profiling.profile(
            context,
            rows=rows,
            kv_length=kv_length,
            steps=steps,
            rounds=rounds,
            check_vectors=check,
            compiled=compiled,
            output=output,
            again=again,
        )
    )


def whole_numbers(name: str, given: str) -> list[int]:
    """Numbers separated by commas.

    Raises:
        ConfigError: one of them is none.
    """
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name}: must be whole numbers separated by commas, got {given!r}") from error


def read_prompt(given: str) -> str:
    """A prompt as it was given; for ``-`` all of standard input, without the end of its last line.

    Raises:
        ConfigError: standard input is no text in UTF-8.
    """
    if given != "-":
        return given
    try:
        text = b"" if sys.stdin is None else sys.stdin.buffer.read()
        return text.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt: standard input is no text in UTF-8 (byte {error.start}); convert it") from error


def load_plan(folder: Path | None, also: tuple[str, ...] = ()) -> tuple[Plan | None, Settings | None]:
    """A plan and the settings that it was made with, ``also`` among them."""
    if folder is None:
        return None, None
    if folder == Path() and not (folder / JSON_NAME).is_file():  # "." and "" are one path
        raise ConfigError("plan: is empty; give a plan's folder")
    plan = Plan.load(folder)
    recorded = plan.provenance.get("settings")
    made_with = (
        {name: recorded[name] for name in (*_OF_A_PLAN, *also) if name in recorded}
        if isinstance(recorded, dict)
        else {}
    )
    try:
        load_settings(None, made_with)
    except ConfigError as error:
        raise PlanError(f"{folder / JSON_NAME}: the settings that it was made with are damaged: {error}") from error
    if (folder / COLUMNS_NAME).is_file():
        made_with |= {"model": str(folder), "dtype": "auto"}
        return plan, load_settings(None, made_with)
    if (config := _config_of(folder)) is not None:
        plan_beside(folder, config)
        return plan, load_settings(None, made_with | {"model": str(folder), "weights": plan.weights})
    return plan, load_settings(None, {**made_with, "revision": plan.revision, "weights": plan.weights})


def _config_of(folder: Path) -> dict[str, Any] | None:
    """What the configuration in a plan's folder says of the plan; None where no checkpoint lies there."""
    if not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json")
    found: dict[str, Any] | None = config[KEY] if is_plan_config(config) else None
    return found


_OF_A_PLAN = (
    *("model", "data", "device", "dtype", "score", "masks", "seed", "sequence_length", "stride", "batch_size"),
    *("dense_prefix", "calibration_sequences", "search_sequences", "test_sequences"),
)
"""Settings that a plan may bring along: as it comes from anywhere, none that names a database, address or file."""

OF_A_COMPENSATION = ("compensation_steps", "compensation_tokens", "slope_sequences", "kl_top_k")
"""Further settings of a plan that say how its compensation was learned."""
