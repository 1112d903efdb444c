"""What must be refused, in one clear error, with everything on disk as it was."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_run
from training_run import CONFIG, checksums, initial_params

from kreg.training import CheckpointError, adamw, init_state, load_params
from kreg.training.checkpoint import Meta, find_damage, read_meta, read_state, write_checkpoint
from kreg.training.run_directory import RunDirectory, first_difference

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run of eight steps with checkpoints at 4 and 8; tests that change it take a copy."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    training_run.run(directory, steps=8, eval_every=4)
    return directory


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def _refused(directory: Path, error: type[Exception], match: str, **options) -> None:
    """Train must refuse, name the thing, and leave the folder byte for byte."""
    before = checksums(directory)
    with pytest.raises(error, match=match):
        training_run.run(directory, steps=12, **options)
    assert checksums(directory) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 2e-2}, r"field 'rate': expected 0.02, but .*config.json has 0.01"),
        (
            {"model": {"width": 16, "layers": 2}},
            r"field 'model.width': expected 16, but .*config.json has 8",
        ),
        ({"methods": ["softmax"]}, r"field 'methods': expected \['softmax'\], .* \['biweight'\]"),
        ({"more": 1}, r"field 'more': expected 1, but .* has no such field"),
    ],
    ids=["value", "nested", "list", "extra"],
)
def test_another_config_is_refused(saved, change, message):
    _refused(saved, ValueError, message, config=CONFIG | change)


def test_a_config_field_that_is_gone_is_named():
    assert first_difference({}, {"a": 1}) == ("field 'a'", "no such field", "1")
    assert first_difference({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2}]}) is None
    assert first_difference({"a": True}, {"a": 1}) == ("field 'a'", "True", "1")


def test_a_config_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^config: .*JSON"):
        training_run.run(tmp_path / "run", config={"kernel": object()})
    assert not (tmp_path / "run").exists()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, Path.unlink], ids=["truncate", "flip", "lose"]
)
def test_every_damaged_file_is_noticed_and_named(copied, damage):
    checkpoint = copied / "checkpoints" / "step_00000008"
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size > 0]
    assert len(files) >= 8
    for path in files:
        intact = path.read_bytes()
        damage(path)
        found = find_damage(checkpoint)
        assert found is not None, path
        # Damaged sums accuse the line they damage; everything else is named itself.
        assert path.name == "SHA256SUMS" or path.relative_to(checkpoint).as_posix() in found
        path.write_bytes(intact)
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize("name", ["meta.json", "SHA256SUMS", "largest"])
@pytest.mark.parametrize(
    "damage", [_truncate, _flip, Path.unlink], ids=["truncate", "flip", "lose"]
)
def test_a_damaged_checkpoint_is_refused_with_advice(copied, name, damage):
    checkpoint = copied / "checkpoints" / "step_00000008"
    sizes = {path.stat().st_size: path for path in checkpoint.rglob("*") if path.is_file()}
    damage(sizes[max(sizes)] if name == "largest" else checkpoint / name)
    match = "step_00000008.* is damaged: .*Intact: step_00000004.*nothing has been changed"
    _refused(copied, CheckpointError, match)
    with pytest.raises(CheckpointError, match="step_00000008"):
        load_params(copied, "last", initial_params())


def test_with_the_damaged_folder_moved_away_it_goes_on_from_the_older_one(copied, tmp_path):
    checkpoint = copied / "checkpoints" / "step_00000008"
    _truncate(checkpoint / "meta.json")
    checkpoint.rename(checkpoint.with_name("step_00000008.damaged"))
    result = training_run.run(copied, steps=12, eval_every=4)
    whole = training_run.run(tmp_path / "whole", steps=12, eval_every=4)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, whole.state.params)
    assert (checkpoint.with_name("step_00000008.damaged") / "meta.json").exists()


def test_no_intact_checkpoint_is_said(copied):
    for checkpoint in (copied / "checkpoints").iterdir():
        _truncate(checkpoint / "SHA256SUMS")
    _refused(copied, CheckpointError, "No other checkpoint is intact")


def test_a_checkpoint_of_another_model_names_the_array(saved):
    wrong = {**initial_params(), "head": jnp.zeros((8, 5))}
    with pytest.raises(ValueError, match=r"'head': expected float32\[8,5\], found float32\[8,4\]"):
        load_params(saved, "last", wrong)
    more = {**initial_params(), "bias": jnp.zeros(4)}
    with pytest.raises(ValueError, match=r"'bias': expected float32\[4\], found no such array"):
        load_params(saved, "best", more)


def test_load_params_takes_shapes_alone(saved):
    shapes = jax.eval_shape(initial_params)
    loaded, reference = (load_params(saved, "last", x) for x in (shapes, initial_params()))
    jax.tree.map(np.testing.assert_array_equal, loaded, reference)


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_folder_without_checkpoints_is_said(tmp_path, which):
    with pytest.raises(ValueError, match=f"which: expected a run with a {which} checkpoint"):
        load_params(tmp_path / "nothing", which, initial_params())


def test_fewer_steps_than_done_are_refused(saved):
    before = checksums(saved)
    with pytest.raises(ValueError, match="steps: expected at least the 8"):
        training_run.run(saved, steps=5)
    assert checksums(saved) == before


@pytest.mark.parametrize("name", ["steps", "eval_every", "save_every", "log_every", "keep_last"])
def test_counts_below_one_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        training_run.run(tmp_path / "run", **{"steps": 4, name: 0})
    assert not (tmp_path / "run").exists()


def test_a_broken_log_is_refused(copied):
    log = copied / "metrics.jsonl"
    log.write_bytes(b"not json\n" + log.read_bytes())
    _refused(copied, ValueError, "metrics.jsonl, line 1: expected a JSON object")


def test_a_directory_held_by_a_live_run_is_refused(saved):
    # A second opening of the lock file conflicts in the same process, too.
    with RunDirectory(saved).opened(CONFIG):
        _refused(saved, BlockingIOError, "another run is writing to this directory")
    assert training_run.run(saved, steps=8).finished


def test_a_path_below_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("keep me")
    before = checksums(tmp_path)
    with pytest.raises(OSError, match=r"cannot write to the run's directory.*file/run"):
        training_run.run(file / "run")
    assert checksums(tmp_path) == before


def test_a_metric_that_evaluate_does_not_give_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"best: expected one of \['val_loss'\], got 'accuracy'"):
        training_run.run(tmp_path / "run", steps=2, eval_every=1, best=("accuracy", "max"))


LIMITED = """
import resource, sys
from pathlib import Path
import training_run
from training_run import checksums

directory = Path(sys.argv[1])
log = directory / "old" / "metrics.jsonl"
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)


def limit(number):
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, hard))


def ends_after_the_start(number):
    # The probe of the start has passed; the save, or the log, hits the limit.
    def evaluate(params):
        limit(number)
        return {"val_loss": 0.0}

    return {"eval_every": 3, "evaluate": evaluate}


before = checksums(directory)
for run, options, number in (
    ("old", ends_after_the_start(log.stat().st_size + 250), hard),
    ("old", ends_after_the_start(100), hard),
    ("old", {}, 100),
    ("fresh", {}, 100),
):
    limit(number)
    try:
        training_run.run(directory / run, steps=12, **options)
    except OSError as error:
        limit(hard)
        print(error)
    assert checksums(directory) == before
print(training_run.run(directory / "old", steps=12).step)
"""


def test_no_space_left_leaves_everything_as_it_was(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "old")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # One error a failure: no traceback of a thread, no log of a library.
    assert done.stderr == ""
    *errors, finished = done.stdout.splitlines()
    expected = (
        ("cannot save the checkpoint: File too large", "old/checkpoints/step_00000009"),
        ("cannot append to the log: File too large", "old/metrics.jsonl"),
        ("no space for a checkpoint: File too large", "old"),
        ("no space for a checkpoint: File too large", "fresh"),
    )
    for error, (what, where) in zip(errors, expected, strict=True):
        assert what in error and str(tmp_path / where) in error
    assert finished == "12"


def test_a_disk_too_small_is_noticed_before_the_first_step(saved, monkeypatch):
    usage = shutil.disk_usage(saved)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _refused(saved, OSError, "no space for a checkpoint of .* 1,000 are free")


def test_a_checkpoint_holds_every_kind_of_leaf(tmp_path):
    params = {
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(5), 2),
        "list": [jnp.int8(3), jnp.array([True, False])],
    }
    tx = adamw(1e-3, accumulate=2, clip=1.0)
    state = init_state({"half": params["half"]}, tx, jax.random.key(7, impl="rbg"))
    state = replace(state, params=params)
    path = tmp_path / "step_00000003"
    write_checkpoint(path, state, Meta(step=3, data={"next_index": 9}))
    loaded = read_state(path, state)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        assert ours.dtype == theirs.dtype
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)
    assert read_meta(path).data == {"next_index": 9}
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_a_relative_directory_is_as_good_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = training_run.run(Path("run"), steps=4, eval_every=2)
    loaded = load_params(Path("run"), "last", initial_params())
    jax.tree.map(np.testing.assert_array_equal, loaded, result.state.params)
