"""What a user sees of bad input: one line that says what to do, exit status 1, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from was_search.plan import JSON_NAME, TENSORS_NAME, Plan
from was_search.service.cli import main
from was_search.service.steps.demonstration import DEMO_FOLDER
from was_search.shape import ModelShape
from was_storage.studies.store import StudyStore

MODEL, TEXT = str(DEMO_FOLDER / "model"), str(DEMO_FOLDER / "text")
CPU = ["--device", "cpu", "--ray", "local"]


def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Standard error of a command that must end with status 1 and without a traceback."""
    monkeypatch.setattr(sys, "argv", ["was-search", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    printed = capsys.readouterr().err
    assert end.value.code == 1, printed
    assert "Traceback" not in printed
    return printed


@pytest.fixture
def refused(capsys, monkeypatch):
    return lambda *arguments: fails(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize("target", ["0", "0.95", "1.2", "-0.1", "nan"])
def test_target_outside_its_range(refused, target: str) -> None:
    printed = refused("run", "--model", MODEL, "--data", TEXT, f"--target={target}")
    assert "target: must be" in printed


@pytest.mark.parametrize("option", ["--target=60", "--targets=60,70"])
def test_a_target_in_percent_says_how_to_write_it(refused, option: str) -> None:
    assert "(for 60 % write 0.6)" in refused("run", "--model", MODEL, "--data", TEXT, option)


@pytest.mark.parametrize("speedup", ["1", "0.5", "-2", "nan", "inf"])
def test_speedup_outside_its_range(refused, speedup: str) -> None:
    printed = refused("run", "--model", MODEL, "--data", TEXT, f"--target-speedup={speedup}")
    assert "target_speedup: must be" in printed


@pytest.mark.parametrize("speedups", ["1.5,1", "2,2", "fast", "1.5,nan"])
def test_speedups_that_are_none(refused, speedups: str) -> None:
    assert "target_speedups: " in refused("run", "--model", MODEL, "--data", TEXT, f"--target-speedups={speedups}")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--target", "0.5", "--target-speedup", "1.8"], "target_speedup: cannot be given together with target"),
        (["--target-speedup", "1.8", "--target-speedups", "2,3"], "cannot be given together with target_speedup"),
        (["--max-ppl-increase", "5%", "--target-speedup", "1.8"], "cannot be given together with max_ppl_increase"),
    ],
)
def test_sparsity_and_time_at_once(refused, options: list[str], named: str) -> None:
    assert named in refused("run", "--model", MODEL, "--data", TEXT, *options)


@pytest.fixture
def profile(tmp_path: Path):
    """Writes a made-up profile of the demo's shape, or of other blocks."""
    from tests.doubles.profiles import synthetic_profile
    from was_search.service.context import Context
    from was_search.service.steps.demonstration import demo_settings

    def write(n_blocks: int = 12) -> str:
        with Context(demo_settings()) as context:
            shape = context.model.shape
        shape = ModelShape(shape.in_features[:n_blocks], shape.out_features[:n_blocks])
        return str(synthetic_profile(shape).save(tmp_path / "profile.json"))

    return write


RUN = ["run", "--model", MODEL, "--data", TEXT, *CPU]
SMALL = ["--sequence-length", "64", "--calibration-sequences", "4", "--search-sequences", "4"]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where workers are asked for: nothing may be calibrated before the message."""
    monkeypatch.setattr("was_workers.cluster.connect", lambda *_, **__: pytest.fail("Ray was started"))


@pytest.mark.parametrize("option", [["--target-speedup", "9"], ["--target-speedups", "1.5,9"]])
def test_speedup_out_of_reach_names_the_greatest(refused, profile, option: list[str]) -> None:
    printed = refused(*RUN, *option, "--profile", profile())
    assert "target_speedup: at most 3.0" in printed.replace("\n", " ")
    assert "on made up (synthetic)" in printed.replace("\n", " ")


@pytest.mark.parametrize("budget", [["--target", "0.5"], ["--target-speedup", "1.5"]])
def test_profile_of_another_shape(refused, profile, budget: list[str]) -> None:
    printed = refused(*RUN, *budget, "--profile", profile(3))
    assert "profile: it is of a model with 3 blocks, this one has 12" in printed


def test_profile_that_is_none(refused, tmp_path: Path) -> None:
    assert "is not a file; 'was-search profile" in refused(*RUN, "--profile", str(tmp_path / "none"))
    (tmp_path / "bad").write_text("{")
    assert "is not valid JSON" in refused(*RUN, "--target-speedup", "1.5", "--profile", str(tmp_path / "bad"))


@pytest.mark.parametrize("option", ["trials", "workers", "batch-size"])
def test_zero_of_something(refused, option: str) -> None:
    printed = refused("run", "--model", MODEL, "--data", TEXT, f"--{option}", "0")
    assert f"{option.replace('-', '_')}: must be at least 1, got 0" in printed


def test_unknown_fitness(refused) -> None:
    printed = refused("search", "--model", MODEL, "--data", TEXT, "--fitness", "mse")
    assert "fitness: must be one of nll, kl, got 'mse'" in printed


@pytest.mark.parametrize("command", ["search", "run"])
def test_more_top_tokens_than_the_vocabulary_has(refused, command: str) -> None:
    """Said before anything is opened or loaded."""
    printed = refused(command, "--model", MODEL, "--data", TEXT, "--fitness", "kl", "--kl-top-k", "1025", *CPU)
    assert "kl_top_k: must be at most the vocabulary, 1024 tokens, got 1025" in printed


def test_missing_options_are_named(refused) -> None:
    assert "model: missing; give --model" in refused("run", "--data", TEXT)
    for command in ("calibrate", "run", "evaluate"):
        assert "model, data: missing; give --model and --data or put them into" in refused(command, *CPU[:2])


def test_model_that_is_not_there(refused, tmp_path: Path) -> None:
    assert "does not exist" in refused("calibrate", "--model", str(tmp_path / "no"), "--data", TEXT, *CPU)


def test_model_folder_that_is_mistyped(refused, tmp_path: Path) -> None:
    (tmp_path / "Llama-2" / "7b_hf").mkdir(parents=True)
    printed = refused("calibrate", "--model", str(tmp_path / "Lama-2" / "7b_hf"), "--data", TEXT, *CPU)
    assert f"which does not exist; did you mean '{tmp_path / 'Llama-2' / '7b_hf'}'?" in printed


def test_hub_id_that_is_a_folder_nearby(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a hub's is asked for there first."""
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "checkpoints" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    printed = refused("calibrate", "--model", "checkpoint/tiny", "--data", TEXT, *CPU)
    assert "the hub cannot be reached" in printed
    assert "did you mean 'checkpoints/tiny'?" in printed


@pytest.mark.parametrize(("got", "meant"), [("wikitext", "wikitext2"), ("Alpaca", "alpaca"), ("C4", "c4")])
def test_data_set_that_is_mistyped(refused, got: str, meant: str) -> None:
    printed = refused("run", *RUN[1:3], "--data", got, *CPU)
    assert f"got {got!r}, which does not exist; did you mean {meant!r}?" in printed


def test_data_folder_that_is_mistyped(refused) -> None:
    printed = refused("run", *RUN[1:3], "--data", TEXT.replace("text", "txt"), *CPU)
    assert f"did you mean '{TEXT}'?" in printed


@pytest.mark.parametrize("command", ["run", "calibrate", "evaluate"])
def test_sequences_longer_than_the_model_takes(refused, command: str) -> None:
    given = RUN[1:] if command != "evaluate" else RUN[1:-2]
    printed = refused(command, *given, "--sequence-length", "1025")
    assert (
        "sequence_length: must be at most the model's 1024 positions, got 1025; give --sequence-length 1024" in printed
    )


@pytest.mark.parametrize("command", ["run", "export --interpolate", "export"])
@pytest.mark.postgres
def test_a_plan_that_could_not_be_written_is_said_first(
    refused, database, tmp_path: Path, no_ray: None, command: str
) -> None:
    (tmp_path / "file").write_text("")
    url = database.url
    printed = refused(*command.split(), *RUN[1:], *SMALL, "--plan", f"{tmp_path}/file/plan", "--storage", url)
    assert f"plan: cannot write {tmp_path / 'file' / 'plan'} ({tmp_path / 'file'} is not a folder)" in printed
    assert "choose another folder with --plan" in printed


def test_unknown_config_option(refused, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("trails = 4\n")
    printed = refused("run", "--config", str(file))
    assert "unknown option trails" in printed
    assert "did you mean 'trials'?" in printed


def test_no_gpu(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    printed = refused("calibrate", "--model", MODEL, "--data", TEXT, "--device", "cuda", "--ray", "local")
    assert "--device cuda was asked for and no GPU was found" in printed
    printed = refused("calibrate", "--model", MODEL, "--data", TEXT, "--gpus-per-worker", "0.25", "--ray", "local")
    assert "--gpus-per-worker 0.25 was asked for and no GPU was found" in printed


def test_no_cluster_at_an_address(refused) -> None:
    printed = refused("calibrate", "--model", MODEL, "--data", TEXT, "--ray", "127.0.0.1:1")
    assert "nothing answers at 127.0.0.1:1" in printed
    printed = refused("calibrate", "--model", MODEL, "--data", TEXT, "--ray", "somewhere")
    assert "must be auto, local or HOST:PORT" in printed


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://a/b", "postgresql"),
        ("postgresql://user:secret@127.0.0.1:1/was", "server"),
    ],
)
def test_wrong_database_url(refused, url: str, message: str) -> None:
    printed = refused("studies", "--storage", url)
    assert message in printed.lower()
    assert "secret" not in printed


class TestData:
    @pytest.fixture
    def calibrate(self, refused, database):
        url = database.url
        return lambda data, *more: refused(
            "calibrate", "--model", MODEL, "--data", str(data), *CPU, "--storage", url, *more
        )

    pytestmark = pytest.mark.postgres

    def test_too_short(self, calibrate, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("one line\nanother line\na third line\nand a fourth\n")
        short = calibrate(tmp_path / "short.txt", "--sequence-length", "512")
        assert "has 11 tokens, one sequence needs 512" in short

    def test_empty(self, calibrate, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("")
        assert "is empty" in calibrate(tmp_path / "empty.txt")

    def test_not_text(self, calibrate, tmp_path: Path) -> None:
        (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 8)
        assert "binary" in calibrate(tmp_path / "binary.txt")
        (tmp_path / "latin.txt").write_bytes("Grüße\n".encode("latin-1") * 40)
        assert "UTF-8" in calibrate(tmp_path / "latin.txt")

    def test_missing(self, calibrate, tmp_path: Path) -> None:
        assert "which does not exist" in calibrate(tmp_path / "gone.txt")


class TestModel:
    pytestmark = pytest.mark.postgres

    def test_truncated_weights(self, refused, database, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(MODEL, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1_000_000])
        printed = refused(
            "evaluate", "--model", str(folder), "--data", TEXT, "--device", "cpu", "--sequence-length", "64"
        )
        assert "damaged or truncated" in printed

    def test_folder_without_weights(self, refused, tmp_path: Path) -> None:
        shutil.copy(Path(MODEL) / "config.json", tmp_path / "config.json")
        assert "has no weights" in refused("calibrate", "--model", str(tmp_path), "--data", TEXT, *CPU)

    def test_folder_without_config(self, refused, tmp_path: Path) -> None:
        assert "config.json" in refused("calibrate", "--model", str(tmp_path), "--data", TEXT, *CPU)


class TestPlan:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> Path:
        shape = ModelShape(((8,) * 6 + (16,),) * 2, ((8,) * 4 + (16, 16, 8),) * 2)
        return Plan(
            model="other",
            revision="",
            fingerprint="0" * 64,
            shape=shape,
            score="l2",
            budget=0.5,
            dense_prefix=1,
            sparsities=np.full((2, 7), 0.5),
            thresholds=np.full((2, 7), 0.1, np.float32),
            norms=tuple(tuple(np.ones(w, np.float32) for w in row) for row in shape.in_features),
        ).save(tmp_path / "plan")

    def evaluate(self, refused, plan: Path) -> str:
        return refused(
            "evaluate",
            "--model",
            MODEL,
            "--data",
            TEXT,
            "--plan",
            str(plan),
            "--device",
            "cpu",
            "--sequence-length",
            "64",
        )

    def test_of_another_model(self, refused, plan: Path) -> None:
        printed = self.evaluate(refused, plan)
        assert "belongs to another model" in printed
        assert "0" * 64 in printed

    def test_truncated(self, refused, plan: Path) -> None:
        file = plan / TENSORS_NAME
        file.write_bytes(file.read_bytes()[:-20])
        assert "truncated" in self.evaluate(refused, plan)

    def test_tampered(self, refused, plan: Path) -> None:
        document = json.loads((plan / JSON_NAME).read_text())
        document["budget"] = 0.4
        (plan / JSON_NAME).write_text(json.dumps(document))
        assert "the plan was changed" in self.evaluate(refused, plan)

    def test_missing(self, refused, tmp_path: Path) -> None:
        assert "plan.json" in self.evaluate(refused, tmp_path / "none")

    def test_the_studys_folder_instead_of_its_plans(self, refused, plan: Path, tmp_path: Path) -> None:
        shutil.copytree(plan, tmp_path / "runs" / "study" / "plan")
        printed = self.evaluate(refused, tmp_path / "runs" / "study")
        assert f"did you mean '{tmp_path / 'runs' / 'study' / 'plan'}'?" in printed
        printed = self.evaluate(refused, tmp_path / "runs" / "studi" / "plan")
        assert f"did you mean '{tmp_path / 'runs' / 'study' / 'plan'}'?" in printed


@pytest.mark.postgres
def test_unknown_study(refused, database) -> None:
    url = database.url
    assert "does not exist" in refused("status", "--study", "nothing", "--storage", url)
    store = StudyStore(database)
    store.open_or_create("llama-60", identity={}, config={}, shape={}, n_slots=1)
    for command in (["status"], ["pause"], ["dashboard", "--study"]):
        printed = refused(*command, "lama-60", "--storage", url)
        assert "study 'lama-60' does not exist" in printed
        assert "did you mean 'llama-60'?" in printed


@pytest.mark.postgres
def test_a_dashboards_port_that_is_taken(capsys, monkeypatch, database) -> None:
    url = database.url
    monkeypatch.setattr(sys, "argv", ["was-search", "dashboard", "--storage", url])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sys.argv += ["--port", str(port)]
        with pytest.raises(SystemExit):
            main.main()
    printed = capsys.readouterr()
    assert printed.out == "", "no URL of a server that does not listen"
    assert len(printed.err.splitlines()) == 1
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use); choose another port" in printed.err


@pytest.mark.postgres
@pytest.mark.parametrize("command", ["search", "run", "export", "run --targets 0.4,0.5"])
def test_a_study_of_other_settings_is_said_before_anything_is_calibrated(
    refused, database, no_ray: None, command: str
) -> None:
    name, url = "taken", database.url
    targets = "targets" in command
    StudyStore(database).open_or_create(
        f"{name}-50" if targets else name,
        identity={"seed": 7, "search data": {"sequence_length": 32, "n_sequences": 4}},
        config={}, shape={}, n_slots=1,
    )  # fmt: skip
    first, *more = command.split()
    printed = refused(first, *RUN[1:], *SMALL, "--study", name, "--storage", url, *more)
    assert "exists with other settings; choose another name or the same settings" in printed
    assert "seed: study has 7, asked for 0" in printed
    assert "search data, sequence_length: study has 32, asked for 64" in printed
    assert "search data, n_sequences" not in printed


@pytest.mark.postgres
def test_a_name_that_is_none_is_said_before_anything_is_calibrated(refused, database, no_ray: None) -> None:
    url = database.url
    printed = refused("run", *RUN[1:], *SMALL, "--study", " x", "--storage", url)
    assert "study name: must be printable, without blanks at its ends" in printed


def test_json_mode_reports_errors_as_json(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["was-search", "run", "--json", "--data", TEXT])
    with pytest.raises(SystemExit):
        main.main()
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert event["event"] == "error"
    assert event["kind"] == "ConfigError"


def test_an_interrupt_says_how_to_go_on(capsys, monkeypatch) -> None:
    def interrupted(context) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("was_search.service.steps.calibration.calibrate", interrupted)
    monkeypatch.setattr(sys, "argv", ["was-search", "calibrate", "--model", MODEL, "--data", TEXT])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 130
    assert f"was-search calibrate --model {MODEL} --data {TEXT}" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets", "0.4;0.5"], "targets: must be numbers with commas between, such as 0.4,0.5, got '0.4;0.5'"),
        (["--targets", "0.4,0.96"], "targets: each must be above 0 and below 0.95, got 0.96"),
        (["--targets", "0.7,0.5,0.5"], "targets: each may be given once, got 0.5 more than once"),
        (["--targets", "0.4,0.5", "--target", "0.5"], "targets: cannot be given together with target"),
        (["--max-ppl-increase", "5"], "max_ppl_increase: must be a percentage such as 5% or a fraction in (0, 1)"),
        (["--max-ppl-increase", "five%"], "max_ppl_increase: must be a percentage such as 5%"),
        (["--max-ppl-increase", "-5%"], "max_ppl_increase: must be a percentage such as 5%"),
        (["--max-ppl-increase", "5%", "--target", "0.5"], "max_ppl_increase: cannot be given together with target"),
        (["--max-ppl-increase", "5%", "--targets", "0.4,0.5"], "cannot be given together with targets"),
    ],
)
def test_what_is_asked_of_a_run(refused, flags: list[str], message: str) -> None:
    assert message in refused("run", "--model", MODEL, "--data", TEXT, *flags)


@pytest.mark.parametrize("command", ["seed", "search", "export"])
def test_several_targets_in_a_file_are_for_run_only(refused, tmp_path: Path, command: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text('targets = "0.4,0.5"\n')
    printed = refused(command, "--config", str(file), "--model", MODEL, "--data", TEXT, *CPU)
    assert "targets: only 'was-search run' takes it; give --target for one study" in printed


@pytest.mark.postgres
def test_warm_start_from_a_study_that_is_not_there(refused, database) -> None:
    url = database.url
    small = ["--sequence-length", "64", "--calibration-sequences", "4", "--search-sequences", "4"]
    printed = refused(
        "search", "--model", MODEL, "--data", TEXT, *CPU, *small, "--storage", url, "--warm-start", "nothing"
    )
    assert "study 'nothing' does not exist" in printed


@pytest.mark.postgres
def test_interpolating_without_neighbours(refused, database) -> None:
    url = database.url
    small = ["--sequence-length", "64", "--calibration-sequences", "4", "--search-sequences", "4"]
    printed = refused(
        "export", "--model", MODEL, "--data", TEXT, *CPU, *small, "--storage", url, "--target", "0.55", "--interpolate"
    )
    assert "no study of this model, data and score below or above 55 % has a complete trial" in printed
    assert "run 'was-search run' with a --target below or above 55 %" in printed


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_configuration_that_is_no_file(refused, tmp_path: Path, kind: str) -> None:
    """Before, a pipe without a writer was waited for, and /dev/zero filled the memory."""
    path = tmp_path / "run.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    printed = refused("run", "--config", str(path))
    assert printed.startswith(f"error: config: cannot read {path} (not a file)")


def test_a_configuration_from_a_shells_pipe(refused) -> None:
    """``--config <(...)``"""
    ours, theirs = os.pipe()
    os.write(theirs, b"trails = 4\n")
    os.close(theirs)
    assert "unknown option trails" in refused("run", "--config", f"/dev/fd/{ours}")
    os.close(ours)


@pytest.mark.parametrize("name", ["", "file/profile.json", "/proc/here/profile.json"])
def test_a_profile_that_could_not_be_written_is_said_first(refused, monkeypatch, tmp_path: Path, name: str) -> None:
    """Before, after all had been timed, or was found in the database."""
    monkeypatch.setattr("was_search.service.steps.profiling.cached", lambda *made: pytest.fail("it was timed"))
    (tmp_path / "file").touch()
    printed = refused("profile", "--model", MODEL, "--device", "cpu", "--output", str(tmp_path / name))
    assert f"output: cannot write {tmp_path / name} (" in printed and "choose another file" in printed


LONG = "/" + "a" * 5000


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "--model", LONG, "--data", TEXT),
        ("evaluate", "--model", MODEL, "--data", LONG, "--sequence-length", "64"),
        ("evaluate", "--model", MODEL, "--data", TEXT, "--plan", LONG),
        (
            "evaluate",
            "--model",
            MODEL,
            "--data",
            TEXT,
            "--sequence-length",
            "64",
            "--tasks",
            "x",
            "--include-path",
            LONG,
        ),
        ("run", "--model", MODEL, "--data", TEXT, "--sequence-length", "64", "--plan", LONG),
        ("run", "--model", MODEL, "--data", TEXT, "--sequence-length", "64", "--profile", LONG),
        ("run", "--config", LONG),
        ("generate", "--model", LONG, "--prompt", "x"),
        ("serve", "--model", LONG),
        ("profile", "--model", MODEL, "--output", LONG),
        ("compensate", "--plan", LONG, "--model", MODEL),
    ],
)
def test_a_path_that_no_file_system_takes(refused, command: tuple[str, ...]) -> None:
    """Before, a traceback where it was asked whether there is such a file."""
    printed = refused(*command)
    assert "File name too long" in printed
    assert len(printed.splitlines()) == 1


def test_files_that_cannot_be_used_are_one_line_wherever_that_shows(refused, capsys, monkeypatch) -> None:
    """A folder that this user may not enter, a disk that is full: whatever was about to be read or written."""

    def denied(self: Path, **options: bool) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", denied)
    monkeypatch.setattr(Path, "exists", denied)
    assert "error: '/closed/model' cannot be used: Permission denied" in refused(
        "evaluate", "--model", "/closed/model", "--data", TEXT, "--json"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "a file cannot be used: No space left on device"),
        (OSError(28, "No space left on device", "/x"), "'/x' cannot be used: No space left on device"),
        (OSError(36, "File name too long", "/" + "a" * 5000), f"'/{'a' * 295}... cannot be used: File name too long"),
        (OSError(24, "Too many open files"), "a file cannot be used: Too many open files"),
        (OSError(5, "Input/output error", b"/b\xff"), "'/b\\udcff' cannot be used: Input/output error"),
        (ConnectionRefusedError(111, "Connection refused"), None),
        (OSError("something of a library"), None),
    ],
)
def test_what_is_said_of_a_file(error: OSError, words: str | None) -> None:
    assert main.about_file(error) == words
