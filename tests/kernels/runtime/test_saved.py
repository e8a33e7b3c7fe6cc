"""Plans saved with column-major weights, and models started from them: on CPU, tiny random checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.doubles.random_checkpoint import save_tokenizer
from tests.doubles.tiny_models import tiny_model, tiny_plan
from was_kernels import load_sparse, sparsify
from was_search.checkpoints.column_layout import COLUMNS_NAME, save_columns
from was_search.checkpoints.files import resolve_model
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_model
from was_search.errors import ConfigError, ModelError, PlanError
from was_search.plan import Plan
from was_search.service.cli.plan import load_plan
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.steps.decoding import generate
from was_search.service.steps.demonstration import DEMO_FOLDER
from was_search.service.steps.evaluation import evaluate
from was_search.service.steps.exporting import add_weights
from was_search.service.steps.step_times import bench

TOKENS = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def checkpoint(folder: Path, family: str) -> Path:
    model = tiny_model(family, dtype=torch.float32)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def saved(tmp_path: Path, family: str = "llama", masks: str = "separate", **options) -> tuple[Path, Path, Plan]:
    """A checkpoint, a folder with its plan and weights, and the plan."""
    folder = checkpoint(tmp_path / "checkpoint", family)
    source = resolve_model(str(folder))
    model = load_model(source, dtype="float32")
    plan = tiny_plan(model, masks=masks)
    plan = Plan(**{**vars(plan), "fingerprint": fingerprint(source)})
    return folder, save_columns(model, plan, source, tmp_path / "sparse", **options), plan


@pytest.mark.parametrize(
    ("family", "masks"),
    [("llama", "separate"), ("qwen2", "shared"), ("gemma2", "separate"), ("phi3", "shared"), ("glm4", "shared")],
)
@pytest.mark.parametrize("shard_bytes", [30_000, 1 << 30])
def test_a_saved_model_computes_the_same_and_copies_nothing(tmp_path, family, masks, shard_bytes):
    original, folder, plan = saved(tmp_path, family, masks, shard_bytes=shard_bytes)
    with torch.inference_mode(), sparsify(load_model(str(original), dtype="float32"), plan) as sparse:
        expected = sparse(TOKENS).logits
        generated = sparse.generate(TOKENS[:1], max_new_tokens=6, do_sample=False)
    shutil.rmtree(original)  # the folder needs nothing else
    assert len(list(folder.glob("columns-*.safetensors"))) == (1 if shard_bytes > 1 << 20 else pytest.approx(9, abs=7))
    handle = load_sparse(folder, device="cpu")
    with torch.inference_mode():
        assert torch.equal(handle.model(TOKENS).logits, expected)
        assert torch.equal(handle.model.generate(TOKENS[:1], max_new_tokens=6, do_sample=False), generated)
    mapped = Path("/proc/self/maps")
    if mapped.exists():  # the weights are the files' own memory
        ranges = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in mapped.read_text().splitlines()
            if "columns-" in line
        ]
        for projection in handle.projections:
            at = projection.weight.data_ptr()
            assert any(first <= at < last for first, last in ranges)
    assert all(projection.held.columns.columns.is_contiguous() for projection in handle.projections)
    handle.restore()
    for projection in load_model(str(folder), dtype="float32").model.layers[0].mlp.children():
        if isinstance(projection, torch.nn.Linear):
            assert projection.weight.t().is_contiguous()


def test_the_files_hold_transposed_projections_and_plain_others(tmp_path):
    original, folder, _ = saved(tmp_path)
    model = load_model(str(original), dtype="float32")
    layout = json.loads((folder / COLUMNS_NAME).read_text())
    assert len(layout["columns"]) == 14
    assert layout["dtype"] == "float32"
    stored = {}
    for name in set(layout["files"].values()):
        with safe_open(folder / name, "pt") as file:
            stored.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    assert set(stored) == set(layout["files"]) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name].t() if name in layout["columns"] else stored[name], tensor)
    assert not list(folder.glob("model*.safetensors"))  # no reader of checkpoints takes them for row-major ones
    assert not list(folder.glob(".*"))
    assert Plan.load(folder).fingerprint == layout["fingerprint"] == fingerprint(resolve_model(str(original)))


def test_a_model_that_is_handed_over_decodes_as_its_checkpoint_wishes(tmp_path):
    """The command's own decoding is greedy; a program that loads the folder gets what transformers would give it."""
    _, folder, _ = saved(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7, "eos_token_id": 5}))
    told = load_sparse(folder, device="cpu").model.generation_config
    assert (told.do_sample, told.top_k, told.eos_token_id) == (True, 7, 5)
    (folder / "generation_config.json").write_text(json.dumps({"early_stopping": "whenever"}))
    with pytest.raises(ModelError, match=r"generation_config\.json is not valid"):
        load_sparse(folder, device="cpu")


def test_tied_embeddings_are_stored_once(tmp_path):
    source = resolve_model(str(DEMO_FOLDER / "model"))
    model = load_model(source, dtype="bfloat16")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plan = Plan(**{**vars(tiny_plan(model)), "fingerprint": fingerprint(source)})
    save_columns(model, plan, source, tmp_path / "sparse")
    layout = json.loads((tmp_path / "sparse" / COLUMNS_NAME).read_text())
    assert "lm_head.weight" not in layout["files"]
    assert layout["dtype"] == "bfloat16"
    handle = load_sparse(tmp_path / "sparse", device="cpu")
    assert handle.model.lm_head.weight is handle.model.model.embed_tokens.weight
    assert handle.model.dtype == torch.bfloat16
    with torch.inference_mode(), sparsify(model, plan) as sparse:
        assert torch.equal(handle.model(TOKENS).logits, sparse(TOKENS).logits)


def test_another_dtype_keeps_the_layout(tmp_path):
    _, folder, _ = saved(tmp_path)
    handle = load_sparse(folder, device="cpu", dtype="bfloat16")
    assert handle.projections[0].weight.dtype == torch.bfloat16
    assert all(projection.held.columns.columns.is_contiguous() for projection in handle.projections)


def test_saving_again_leaves_no_old_shards(tmp_path):
    original, folder, plan = saved(tmp_path, shard_bytes=30_000)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(victim)
    save_columns(load_model(str(original), dtype="float32"), plan, resolve_model(str(original)), folder)
    assert [path.name for path in folder.glob("columns-*")] == ["columns-00001-of-00001.safetensors"]
    assert victim.read_text() == "mine"
    load_sparse(folder, device="cpu")


def test_a_broken_off_save_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    original, folder, plan = saved(tmp_path)
    monkeypatch.setattr(Plan, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(PlanError, match=r"cannot write .* \(No space left on device"):
        save_columns(load_model(str(original), dtype="float32"), plan, resolve_model(str(original)), folder)
    with pytest.raises(ModelError, match="has no weights"):
        load_sparse(folder, device="cpu")


def test_the_checkpoints_own_folder_and_other_models_are_refused(tmp_path):
    original, folder, plan = saved(tmp_path)
    model, source = load_model(str(original), dtype="float32"), resolve_model(str(original))
    with pytest.raises(ConfigError, match="is the checkpoint's own folder"):
        save_columns(model, plan, source, original)
    with pytest.raises(PlanError, match="the model has"):
        save_columns(tiny_model("qwen3"), plan, source, tmp_path / "other")
    with pytest.raises(ModelError, match="weights of dtype float32, bfloat16, float16 can be stored, got float64"):
        save_columns(model.double(), plan, source, tmp_path / "other")
    with pytest.raises(ModelError, match="holds no plan with its weights; write both with"):
        load_sparse(original)
    Plan(**{**vars(plan), "fingerprint": "e" * 64}).save(folder)
    with pytest.raises(PlanError, match="belongs to another model"):
        load_sparse(folder, device="cpu")


def test_decoding_steps_take_the_folder_and_a_search_does_not(tmp_path):
    original, folder, plan = saved(tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    for split in ("calibration", "search", "test"):  # without spaces: the tokenizer has more ids than the model
        (text / f"{split}.txt").write_text(f"{split}-the-quick-brown-fox-jumps-over-the-lazy-dog." * 60)
    shutil.rmtree(original)
    loaded, base = load_plan(folder)
    assert (base.model, base.dtype, base.revision) == (str(folder), "auto", "")
    options = {"device": "cpu", "data": str(text), "sequence_length": 32, "test_sequences": 4, "batch_size": 2}
    with Context(Settings(model=base.model, **options)) as context:
        assert context.placement_here.dtype == "float32"  # the stored one
        found = generate(context, loaded, "The", max_new_tokens=4)
        assert found.tokens == 4 and found.achieved > 0.3
        assert evaluate(context, loaded)[-1].achieved > 0.3
        rows = bench(context, loaded, kv_lengths=[32], steps=2)
        assert [row.name for row in rows] == ["dense", "plan"]
        with pytest.raises(ModelError, match="weights laid out for decoding; give the checkpoint itself"):
            _ = context.model.fingerprint
    other = Plan(**{**vars(plan), "fingerprint": "e" * 64})
    with Context(Settings(model=base.model, **options)) as context, pytest.raises(PlanError, match="another model"):
        generate(context, other, "The", max_new_tokens=4)


def test_weights_are_added_to_an_exported_plan(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint", "llama")
    source = resolve_model(str(folder))
    plan = tiny_plan(load_model(source, dtype="float32"))
    exported = Plan(**{**vars(plan), "fingerprint": fingerprint(source)}).save(tmp_path / "plan")
    with Context(Settings(model=str(folder), device="cpu")) as context:
        assert add_weights(context, exported, "columns") == exported
    assert load_sparse(exported, device="cpu").model.dtype == torch.float32  # the checkpoint's
    with Context(Settings(model=str(folder), device="cpu", dtype="bfloat16")) as context:
        add_weights(context, exported, "columns")
    assert load_sparse(exported, device="cpu").model.dtype == torch.bfloat16
    with Context(Settings(model=str(folder), device="cpu")) as context:
        add_weights(context, exported)
    assert not (exported / COLUMNS_NAME).exists() and not list(exported.glob("columns-*"))
    assert load_sparse(exported, device="cpu").model.dtype == torch.float32
    plan.save(exported)
    for layout in ("checkpoint", "columns"):
        with Context(Settings(model=str(folder))) as context, pytest.raises(PlanError, match="another model"):
            add_weights(context, exported, layout)


def change(folder: Path, **values) -> None:
    path = folder / COLUMNS_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"schema_version": 2}, "schema_version must be 1"),
        ({"files": []}, "files must name the file of every tensor"),
        ({"files": {}}, "files must name the file of every tensor"),
        ({"columns": {"a": 1}}, "columns must be names of tensors in files"),
        ({"columns": ["no.such"]}, "columns must be names of tensors in files"),
        ({"columns": [["x"]]}, "columns must be names of tensors in files"),
        ({"fingerprint": "short"}, "fingerprint must be 64 hexadecimal digits"),
        ({"fingerprint": None}, "fingerprint must be 64 hexadecimal digits"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"dtype": ["float32"]}, "dtype must be one of"),
        *(
            ({"files": {"lm_head.weight": name}}, "only its own columns-.* are read")
            for name in (
                *("../outside.safetensors", "/etc/passwd", "model.safetensors", "pytorch_model.bin", "", 7, None),
                *("columns-00001-of-00001.safetensors\n", "x/columns-00001-of-00001.safetensors", "https://evil/c"),
            )
        ),
    ],
)
def test_a_hostile_index_is_refused(tmp_path, values, why):
    _, folder, _ = saved(tmp_path)
    change(folder, **values)
    with pytest.raises(ModelError, match=why):
        load_sparse(folder, device="cpu")


def test_files_that_do_not_hold_what_the_index_says_are_refused(tmp_path):
    _, folder, _ = saved(tmp_path)
    layout = json.loads((folder / COLUMNS_NAME).read_text())
    files, columns = layout["files"], layout["columns"]
    (shard,) = set(files.values())
    change(folder, files={**files, "evil": shard})
    with pytest.raises(ModelError, match="does not hold 'evil'"):
        load_sparse(folder, device="cpu")
    change(folder, files=files, columns=[*columns, "model.norm.weight"])
    with pytest.raises(ModelError, match=r"'model.norm.weight' must be a matrix"):
        load_sparse(folder, device="cpu")
    change(folder, columns=columns[1:])  # a matrix the wrong way round
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_sparse(folder, device="cpu")
    change(folder, files={name: file for name, file in files.items() if "layers.1" not in name}, columns=columns[:7])
    with pytest.raises(ModelError, match=r"lacks \d+ weights"):
        load_sparse(folder, device="cpu")
    change(folder, files=files, columns=columns)
    load_sparse(folder, device="cpu")
    os.truncate(folder / shard, (folder / shard).stat().st_size - 10)
    with pytest.raises(ModelError, match="damaged or truncated"):
        load_sparse(folder, device="cpu")
    (folder / shard).unlink()
    os.mkfifo(folder / shard)
    with pytest.raises(ModelError, match=f"is missing, though {COLUMNS_NAME} names it"):
        load_sparse(folder, device="cpu")


def test_a_configuration_of_more_weights_than_are_stored_takes_no_memory(tmp_path):
    _, folder, _ = saved(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 10**9}))
    with pytest.raises(ModelError, match=r"describes .* weights, the files hold"):
        load_sparse(folder, device="cpu")
    (folder / COLUMNS_NAME).write_text("[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read"):
        load_sparse(folder, device="cpu")
