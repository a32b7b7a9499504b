import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lobra_jax.checkpoint import CheckpointMetadata, Checkpoints
from lobra_jax.lora import LoraSpec
from lobra_jax.optim import TaskState, init_state
from lobra_jax.reduce import AdapterState
from lobra_jax.run_state import state_from_tree, state_to_tree
from planner.errors import UserError

METADATA = CheckpointMetadata(
    model="tiny",
    model_fingerprint="0123456789abcdef",
    tasks={
        "summaries": LoraSpec(rank=4, alpha=8.0, targets=("q", "v"), dropout=0.1),
        "answers": LoraSpec(rank=16, alpha=16.0, rslora=True),
    },
    settings={"training.seed": 0, "tasks.summaries.lr": 1e-3},
    position={"stopped": {"answers": 2}},
)


def mesh(first: int, rows: int, columns: int) -> Mesh:
    devices = np.array(jax.devices()[first : first + rows * columns]).reshape(rows, columns)
    return Mesh(devices, ("replica", "tensor"))


def make_state(seed: int) -> dict[str, Any]:
    """Leaves on unlike devices: one device, a 2x2 submesh, another 1x2 submesh, and the host."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((4, 6), np.float32)
    return {
        "adapters": {
            "0": {
                "q": {
                    "a": jax.device_put(normal, jax.devices()[7]),
                    "b": jax.device_put(normal.T.copy(), NamedSharding(mesh(0, 2, 2), PartitionSpec("replica", None))),
                }
            },
            "1": {"q": {"a": jax.device_put(normal + 1, NamedSharding(mesh(4, 1, 2), PartitionSpec(None, "tensor")))}},
        },
        "optimizer": {"count": jax.device_put(np.array([3, 2], np.int32), jax.devices()[0])},
        "step": np.array(seed),
        "seeds": np.array([1, 2**32 - 1], np.uint32),
        "half": jax.device_put(normal.astype(jax.numpy.bfloat16), jax.devices()[5]),
    }


def abstract(state: Any) -> Any:
    def leaf(x: Any) -> Any:
        if isinstance(x, jax.Array):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        return x

    return jax.tree.map(leaf, state)


def assert_bitwise_equal(actual: Any, expected: Any) -> None:
    def check(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(check, actual, expected)


def test_a_state_on_unlike_devices_comes_back_bitwise_where_it_was(tmp_path: Path) -> None:
    state = make_state(3)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(3, state, METADATA)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        restored, position = checkpoints.restore(3, abstract(make_state(0)), METADATA)
    assert_bitwise_equal(restored, state)
    assert position == METADATA.position
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        if isinstance(before, jax.Array):
            assert after.sharding == before.sharding


def test_a_state_is_restored_onto_other_shardings(tmp_path: Path) -> None:
    state = make_state(1)
    target = abstract(state)
    columns = NamedSharding(mesh(4, 1, 3), PartitionSpec(None, "tensor"))
    target["adapters"]["0"]["q"]["a"] = jax.ShapeDtypeStruct((4, 6), np.float32, sharding=columns)
    single = SingleDeviceSharding(jax.devices()[6])
    target["adapters"]["1"]["q"]["a"] = jax.ShapeDtypeStruct((4, 6), np.float32, sharding=single)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, METADATA)
        restored, _ = checkpoints.restore(1, target, METADATA)
    assert_bitwise_equal(restored, state)
    assert restored["adapters"]["0"]["q"]["a"].sharding == columns
    assert restored["adapters"]["1"]["q"]["a"].sharding == single


def test_arrays_may_stand_for_the_target(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), METADATA)
        restored, _ = checkpoints.restore(1, make_state(2), METADATA)
    assert_bitwise_equal(restored, make_state(1))


def test_the_newest_are_kept_and_a_saved_step_is_not_written_again(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 4, 9):
            checkpoints.save(step, make_state(step), METADATA)
        checkpoints.save(9, make_state(0), METADATA)
        assert checkpoints.steps() == (4, 9)
        assert checkpoints.latest_step() == 9
        restored, _ = checkpoints.restore(9, make_state(0), METADATA)
    assert restored["step"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "9"]


def test_a_process_killed_in_the_middle_of_a_save_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib\n"
        "import numpy as np\n"
        "from lobra_jax.checkpoint import CheckpointMetadata, Checkpoints\n"
        "from lobra_jax.lora import LoraSpec\n"
        "metadata = CheckpointMetadata(\n"
        "    model='tiny', model_fingerprint='f', tasks={'a': LoraSpec(rank=1, alpha=1.0)}, settings={}, position={})\n"
        "checkpoints = Checkpoints(sys.argv[1], keep=3)\n"
        "checkpoints.save(1, {'x': np.ones(3, np.float32)}, metadata)\n"
        "pathlib.Path.rename = os.rename = os.replace = lambda *_: os._exit(9)\n"
        "checkpoints.save(2, {'x': np.zeros(3, np.float32)}, metadata)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    assert len(list(tmp_path.iterdir())) == 2  # the checkpoint, and what the killed save left
    tasks = {"a": LoraSpec(rank=1, alpha=1.0)}
    expected = dataclasses.replace(METADATA, model_fingerprint="f", tasks=tasks, settings={})
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored, _ = checkpoints.restore(1, {"x": np.zeros(3, np.float32)}, expected)
        checkpoints.save(3, restored, expected)
    np.testing.assert_array_equal(restored["x"], np.ones(3, np.float32))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (
            {"model_fingerprint": "f" * 16, "model": "llama2-7b"},
            ["model", "another model", "0123456789abcdef", "f" * 16],
        ),
        (
            {"tasks": {"summaries": METADATA.tasks["summaries"], "code": METADATA.tasks["answers"]}},
            ["tasks", "other tasks", "summaries, answers", "summaries, code"],
        ),
        ({"tasks": dict(reversed(METADATA.tasks.items()))}, ["other tasks"]),
        (
            {"tasks": {**METADATA.tasks, "answers": LoraSpec(rank=8, alpha=16.0, rslora=True)}},
            ["tasks.answers.rank", "got 16", "expected 8"],
        ),
        (
            {"tasks": {**METADATA.tasks, "summaries": LoraSpec(rank=4, alpha=8.0, targets=("q",), dropout=0.1)}},
            ["tasks.summaries.targets", "('q', 'v')"],
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, Any], fragments: list[str]
) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, make_state(5), METADATA)
        with pytest.raises(UserError) as caught:
            checkpoints.restore(5, make_state(5), dataclasses.replace(METADATA, **changes))
    for fragment in [*fragments, str(tmp_path / "5")]:
        assert fragment in str(caught.value)


def test_a_step_without_a_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, make_state(5), METADATA)
        with pytest.raises(UserError, match="no readable checkpoint of step 6"):
            checkpoints.restore(6, make_state(5), METADATA)


@pytest.mark.parametrize("last_good", [False, True])
@pytest.mark.parametrize("averages", [False, True])
def test_a_runs_state_comes_back_from_its_checkpoint_whichever_trees_it_has(tmp_path, last_good, averages):
    rng = np.random.default_rng(1)

    def pairs():
        return {"0": {"q": {name: jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for name in "ab"}}}

    adapters, nothing = pairs(), {"0": {}}
    state = AdapterState(
        tasks=TaskState(
            adapters=adapters,
            last_good=pairs() if last_good else nothing,
            moments={"0": init_state(adapters["0"], 2, ("adamw", "lion"))},
            averages=pairs() if averages else nothing,
        ),
        alive=jnp.array([True, False]),
    )
    like = AdapterState(tasks=jax.tree.map(jnp.zeros_like, state.tasks), alive=jnp.zeros(2, bool))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state_to_tree(state), METADATA)
        tree, _ = checkpoints.restore(3, state_to_tree(like), METADATA)
    back = state_from_tree(tree, like)
    assert jax.tree.structure(back.tasks) == jax.tree.structure(state.tasks)
    for found, expected in zip(*(jax.tree.leaves((one.tasks, one.alive)) for one in (back, state)), strict=True):
        np.testing.assert_array_equal(found, expected)
