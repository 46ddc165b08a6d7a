import hashlib
import os
import pathlib
import shutil
import subprocess
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.checkpoints import CheckpointError, Checkpoints, restore_params
from t5x_lite.errors import UsageError


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_state(value: float = 0.0) -> State:
    """Small, but with what real ones have: bf16, int32, a masked optimizer, special floats."""
    rng = np.random.default_rng(0)
    params = {
        "decoder": {
            "kernel": jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32) + value,
            "scale": jnp.asarray(rng.normal(size=(6,)), jnp.bfloat16),
        },
        "embedding": jnp.array([[-0.0, np.inf], [np.nan, 1e-45]], jnp.float32),
    }
    mask = {"decoder": {"kernel": True, "scale": False}, "embedding": True}
    optimizer = optax.chain(
        optax.masked(optax.adamw(0.1), mask), optax.scale_by_schedule(lambda count: 0.1)
    )
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(value, x.dtype), optimizer.init(params))
    return State(jnp.int32(value), params, opt_state)


def abstract_of(tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


ABSTRACT = abstract_of(make_state())


def as_bytes(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_bit_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert as_bytes(actual) == as_bytes(expected)


def save_steps(directory: pathlib.Path, *steps: int, **options: Any) -> None:
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, make_state(step), f"input {step}".encode())
    checkpoints.close()


def files_under(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def names_in(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip_a_bit(path: pathlib.Path) -> bytes:
    """Returns what was there before. A file of no bytes gets one."""
    before = path.read_bytes()
    after = bytearray(before or b"\0")
    after[len(before) // 2] ^= 1
    path.write_bytes(bytes(after))
    return before


def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in files_under(directory)}


def test_restored_state_is_bit_equal(tmp_path):
    state = make_state(3)
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.restore_latest(ABSTRACT) is None
    checkpoints.save(3, state, b"\x00position\xff")
    checkpoints.wait()

    restored = Checkpoints(tmp_path / "run").restore_latest(ABSTRACT)

    assert (restored.step, restored.input_state, restored.skipped) == (3, b"\x00position\xff", ())
    assert type(restored.state) is State
    assert_bit_equal(restored.state, expected)
    assert checkpoints.steps() == [3]
    checkpoints.save(4, state, None)
    assert checkpoints.restore(4, ABSTRACT).input_state is None
    assert checkpoints.restore(3, ABSTRACT).input_state == b"\x00position\xff"


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    state = State(jnp.int32(0), {"w": jnp.arange(2_000_000, dtype=jnp.float32)}, ())
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 4):
        expected = np.array(state.params["w"], copy=True)
        checkpoints.save(step, state, None)
        state = jax.block_until_ready(overwrite(state))
        restored = checkpoints.restore(step, abstract_of(state))
        np.testing.assert_array_equal(restored.state.params["w"], expected)
        state = jax.tree.map(lambda x, s=step: x + s, state)


def test_digests_are_those_of_sha256sum(tmp_path):
    save_steps(tmp_path, 1)
    step_dir = tmp_path / "1"
    listed = (step_dir / "SHA256SUMS").read_text().splitlines()[:-1]
    on_disk = [str(p.relative_to(step_dir)) for p in files_under(step_dir)]
    assert sorted(line.split("  ", 1)[1] for line in listed) == sorted(
        name for name in on_disk if name != "SHA256SUMS"
    )
    for line in listed:
        digest, name = line.split("  ", 1)
        assert digest == hashlib.sha256((step_dir / name).read_bytes()).hexdigest()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=step_dir, check=True)


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip_a_bit, _truncate, pathlib.Path.unlink])
def test_harm_to_any_file_is_noticed(tmp_path, caplog, harm):
    save_steps(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path)
    files = files_under(tmp_path / "2")
    assert {"SHA256SUMS", "_METADATA", "manifest.ocdbt", "process_0_of_1"} <= {
        path.name for path in files
    }
    for path in files:
        before = path.read_bytes()
        if harm is _truncate and not before:
            continue
        harm(path)
        harmed = snapshot(tmp_path)
        caplog.clear()
        restored = checkpoints.restore_latest(ABSTRACT)
        name = str(path.relative_to(tmp_path / "2"))
        assert restored.step == 1, name
        assert_bit_equal(restored.state, make_state(1))
        assert restored.input_state == b"input 1"
        assert len(restored.skipped) == len(caplog.messages) == 1
        for line in (*restored.skipped, *caplog.messages):
            assert "step 2: " in line
            assert name in line
        with pytest.raises(CheckpointError, match="2 is damaged: .*" + path.name):
            checkpoints.restore(2, ABSTRACT)
        assert snapshot(tmp_path) == harmed
        path.write_bytes(before)
    assert checkpoints.restore_latest(ABSTRACT).step == 2


def test_missing_parts_and_empty_steps_are_passed_over(tmp_path, caplog):
    save_steps(tmp_path, 1, 2, 3)
    shutil.rmtree(tmp_path / "2" / "input_position")
    shutil.rmtree(tmp_path / "3" / "optimizer")
    (tmp_path / "40").mkdir()
    (tmp_path / "50.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "60.incomplete").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "70").write_text("a file, not a step")
    before = snapshot(tmp_path)

    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore_latest(ABSTRACT)

    assert restored.step == 1
    assert [line.partition(":")[0] for line in restored.skipped] == [
        "step 60", "step 50", "step 40", "step 3", "step 2",
    ]  # fmt: skip
    assert "empty" in restored.skipped[2]
    assert len(caplog.messages) == 5
    assert checkpoints.steps() == [1, 2, 3]
    assert snapshot(tmp_path) == before


def test_no_intact_step_is_an_error_that_names_all(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        flip_a_bit(tmp_path / str(step) / "SHA256SUMS")
    with pytest.raises(CheckpointError, match=r"step 2: .*SHA256SUMS.*step 1: ") as caught:
        Checkpoints(tmp_path).restore_latest(ABSTRACT)
    assert "\n" not in str(caught.value)


def test_only_an_interrupted_first_save_is_nothing_to_resume(tmp_path, caplog):
    (tmp_path / "10.incomplete.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).restore_latest(ABSTRACT) is None
    assert "step 10: its save was interrupted" in caplog.text


def test_restoring_a_step_that_is_not_there_names_those_that_are(tmp_path):
    save_steps(tmp_path, 10, 20)
    with pytest.raises(UsageError, match="30; steps that are there: 10, 20"):
        Checkpoints(tmp_path).restore(30, ABSTRACT)


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (None, None, [1, 2, 3, 4, 5, 6, 7]),
        (None, 3, [1, 2, 3, 4, 5, 6, 7]),
        (1, None, [7]),
        (3, None, [5, 6, 7]),
        (2, 3, [3, 6, 7]),
        (1, 2, [2, 4, 6, 7]),
    ],
)
def test_retention(tmp_path, keep, keep_every, kept):
    save_steps(tmp_path, *range(1, 8), keep=keep, keep_every=keep_every)
    assert names_in(tmp_path) == [str(step) for step in kept]


def test_a_pinned_step_stays_until_another_is_pinned(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    kept = []
    for step in range(1, 6):
        checkpoints.save(step, make_state(step), None)
        checkpoints.wait()
        if step in (2, 4):
            checkpoints.pin(step)
        kept.append(names_in(tmp_path))
    checkpoints.close()
    assert kept == [["1"], ["2"], ["2", "3"], ["2", "4"], ["4", "5"]]


def test_retention_rejects_numbers_below_one(tmp_path):
    with pytest.raises(UsageError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_retention_counts_and_deletes_intact_steps_only(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, 6)
    flip_a_bit(tmp_path / "2" / "params" / "_METADATA")
    flip_a_bit(tmp_path / "5" / "SHA256SUMS")
    flip_a_bit(tmp_path / "6" / "input_position" / "process_0_of_1")
    (tmp_path / "100").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2)

    assert checkpoints.restore_latest(ABSTRACT).step == 4
    assert names_in(tmp_path) == ["1", "100", "2", "3", "4", "5", "6"]  # nothing saved, none gone
    checkpoints.save(7, make_state(7), b"")
    checkpoints.wait()
    assert names_in(tmp_path) == ["100", "2", "4", "5", "6", "7"]
    checkpoints.save(8, make_state(8), b"")
    checkpoints.wait()
    assert names_in(tmp_path) == ["100", "2", "5", "6", "7", "8"]


def test_retention_deletes_nothing_while_the_newer_save_is_uncommitted(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def fail(directory):
        assert names_in(tmp_path) == ["1", "2.incomplete"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t5x_lite.checkpoints.write_digests", fail)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, make_state(2), b"")
    with pytest.raises(CheckpointError, match=r"saving checkpoint .*2 failed: .*No space left"):
        checkpoints.wait()
    monkeypatch.undo()
    restored = checkpoints.restore_latest(ABSTRACT)
    assert restored.step == 1
    assert restored.skipped == ("step 2: its save was interrupted (2.incomplete)",)
    checkpoints.save(2, make_state(2), b"")
    checkpoints.wait()
    assert names_in(tmp_path) == ["2"]


def test_an_interrupted_deletion_is_finished_by_the_next_retention(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr("etils.epath.gpath.PosixGPath.rmtree", lambda path: 1 / 0)
        checkpoints = Checkpoints(tmp_path, keep=2)
        checkpoints.save(4, make_state(4), b"")
        with pytest.raises(CheckpointError):
            checkpoints.wait()
    assert (tmp_path / "2").exists()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert 2 not in checkpoints.steps()
    with pytest.raises(CheckpointError, match="deletion was interrupted"):
        checkpoints.restore(2, ABSTRACT)
    checkpoints.save(5, make_state(5), b"")
    checkpoints.wait()
    assert names_in(tmp_path) == ["4", "5"]


def test_saving_a_step_again_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), b"first")
    checkpoints.save(1, make_state(2), b"second")  # while the first is being written
    checkpoints.wait()
    checkpoints.save(1, make_state(2), b"third")
    checkpoints.close()
    Checkpoints(tmp_path).save(1, make_state(2), b"by another process")
    assert names_in(tmp_path) == ["1"]
    restored = Checkpoints(tmp_path).restore(1, ABSTRACT)
    assert restored.input_state == b"first"
    assert_bit_equal(restored.state, make_state(1))


def test_damaged_step_is_set_aside_when_saved_again(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    for k in (1, 2):
        flip_a_bit(tmp_path / "2" / "optimizer" / "_METADATA")
        damaged = snapshot(tmp_path / "2")
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.save(2, make_state(2), b"again")
        checkpoints.wait()
        assert snapshot(tmp_path / f"2.damaged-{k}") == damaged
        assert f"set aside as 2.damaged-{k}" in caplog.text
    restored = Checkpoints(tmp_path).restore_latest(ABSTRACT)
    assert (restored.step, restored.input_state, restored.skipped) == (2, b"again", ())
    assert names_in(tmp_path) == ["2", "2.damaged-1", "2.damaged-2"]


def test_damage_after_saving_is_seen_by_the_process_that_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), b"")
    checkpoints.wait()
    flip_a_bit(tmp_path / "2" / "params" / "manifest.ocdbt")
    assert checkpoints.restore_latest(ABSTRACT).step == 1
    checkpoints.save(2, make_state(2), b"again")
    checkpoints.wait()
    assert names_in(tmp_path) == ["1", "2", "2.damaged-1"]
    assert checkpoints.restore_latest(ABSTRACT).input_state == b"again"


def test_a_directory_that_cannot_be_made_is_noticed_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"saving checkpoint .*1 failed: .*Not a directory"):
        Checkpoints(tmp_path / "file" / "run").save(1, make_state(), None)


@pytest.mark.parametrize("method", ["wait", "close", "save", "restore_latest"])
def test_a_save_that_fails_in_the_background_is_raised_once(tmp_path, monkeypatch, method):
    def fail(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t5x_lite.checkpoints.write_digests", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), None)
    arguments = {"save": (2, make_state(), None), "restore_latest": (ABSTRACT,)}.get(method, ())
    with pytest.raises(CheckpointError, match=r"saving checkpoint .*1 failed: .*No space left"):
        getattr(checkpoints, method)(*arguments)
    checkpoints.close()
    assert checkpoints.steps() == []


@pytest.fixture
def no_rename(monkeypatch):
    """Makes every directory look like an object store's, and every rename in Python fail."""
    for module in ("checkpoints", "integrity", "files"):
        monkeypatch.setattr(f"t5x_lite.{module}.is_local", lambda path: False)
    for name in ("rename", "replace", "renames"):
        monkeypatch.setattr(os, name, None)


def test_object_store(tmp_path, no_rename):
    save_steps(tmp_path, 1, 2, 3, keep=2)
    assert names_in(tmp_path) == ["2", "3"]
    flip_a_bit(tmp_path / "3" / "optimizer" / "manifest.ocdbt")
    damaged = snapshot(tmp_path / "3")
    (tmp_path / "4" / "params").mkdir(parents=True)
    (tmp_path / "4" / "params" / "_METADATA").write_text("{}")  # a save that was interrupted

    checkpoints = Checkpoints(tmp_path, keep=2)
    restored = checkpoints.restore_latest(ABSTRACT)
    assert (restored.step, restored.input_state) == (2, b"input 2")
    assert_bit_equal(restored.state, make_state(2))
    assert [line[:7] for line in restored.skipped] == ["step 4:", "step 3:"]
    for step in (3, 4):
        checkpoints.save(step, make_state(step), b"again")
    checkpoints.wait()
    assert names_in(tmp_path) == ["3", "3.damaged-1", "4", "4.damaged-1"]
    assert snapshot(tmp_path / "3.damaged-1") == damaged
    assert snapshot(tmp_path / "4.damaged-1") == {"params/_METADATA": b"{}"}
    assert checkpoints.restore_latest(ABSTRACT).step == 4


def test_object_store_with_only_an_interrupted_first_save(tmp_path, no_rename):
    (tmp_path / "4" / "params").mkdir(parents=True)
    (tmp_path / "4" / "params" / "_METADATA").write_text("{}")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_latest(ABSTRACT) is None
    (tmp_path / "4" / "commit_success.txt").touch()  # Orbax had finished: there is data to lose
    with pytest.raises(CheckpointError, match="step 4: SHA256SUMS is missing"):
        checkpoints.restore_latest(ABSTRACT)


def _with_params(params: Any) -> State:
    return ABSTRACT._replace(params=params)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=ABSTRACT.params["embedding"].sharding)


def test_a_state_of_another_shape_is_refused_by_name(tmp_path):
    save_steps(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    decoder = ABSTRACT.params["decoder"]
    wider = _with_params({"decoder": decoder, "embedding": _array((2, 3))})
    renamed = _with_params({"decoder": decoder, "embeddings": _array((2, 2))})
    halved = _with_params({"decoder": decoder, "embedding": _array((2, 2), jnp.bfloat16)})
    momentum = optax.sgd(0.1, momentum=0.9).init(make_state().params)
    other_optimizer = ABSTRACT._replace(opt_state=abstract_of(momentum))
    for abstract, message in (
        (wider, r"params 'embedding' has shape \(2, 2\), expected \(2, 3\)"),
        (renamed, r"params 'embeddings' is not in the checkpoint \(did you mean 'embedding'"),
        (halved, r"params 'embedding' is float32, expected bfloat16"),
        (other_optimizer, r"optimizer 'opt_state/0/trace/decoder/kernel' is not in the check"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            checkpoints.restore_latest(abstract)
        assert "\n" not in str(caught.value)
    assert checkpoints.restore_latest(ABSTRACT).step == 1


def test_restore_params_alone(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    save_steps(directory, 1, 2, 3)
    params = abstract_of(make_state().params)
    for path, step in (
        (tmp_path / "run", 3),
        (directory, 3),
        (directory / "2", 2),
        (str(directory / "1") + "/", 1),
    ):
        restored = restore_params(path, params)
        assert restored.step == step
        assert_bit_equal(restored.state, make_state(step).params)

    shutil.rmtree(directory / "3" / "optimizer")  # not needed, so no damage here
    assert restore_params(tmp_path / "run", params).step == 3
    for name in ("params/manifest.ocdbt", "_CHECKPOINT_METADATA", "SHA256SUMS"):
        before = flip_a_bit(directory / "3" / name)
        restored = restore_params(tmp_path / "run", params)
        assert restored.step == 2
        assert f"step 3: {name}" in restored.skipped[0]
        with pytest.raises(CheckpointError, match=f"3 is damaged: {name}"):
            restore_params(directory / "3", params)
        (directory / "3" / name).write_bytes(before)

    half = jax.tree.map(lambda x: _array(x.shape, jnp.bfloat16), params)
    cast = restore_params(directory / "2", half).state["decoder"]["kernel"]
    expected = np.asarray(make_state(2).params["decoder"]["kernel"]).astype(jnp.bfloat16)
    assert np.asarray(cast).tobytes() == expected.tobytes()


def test_restore_params_says_what_is_missing(tmp_path):
    params = abstract_of(make_state().params)
    with pytest.raises(UsageError, match="no checkpoint under"):
        restore_params(tmp_path, params)
    save_steps(tmp_path, 5)
    with pytest.raises(UsageError, match="7; steps that are there: 5"):
        restore_params(tmp_path / "7", params)
    with pytest.raises(UsageError, match="params 'embedding' is in the checkpoint only"):
        restore_params(tmp_path, {"decoder": params["decoder"]})
