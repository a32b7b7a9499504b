"""Reading the original LobRA's formats, from small files made here and, where they are at hand, its own."""

import json
from pathlib import Path

import pytest

from planner.errors import UserError
from planner.lobra_files import is_strategy_file, parse_plan_lists, read_cost_table, read_strategy, read_tasks
from planner.plan import ParallelConfig

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no published LobRA data beside the repository")

TIME_HEADER = "tp,seq_len,mbs,time\n"
MEMORY_HEADER = "tp,pp,sp,max_tokens\n"
SHAPES = [(rows, length) for rows in (1, 2, 4, 8) for length in (128, 512, 2048)]


def layer_ms(tp, rows, length):
    """An exact instance of the cost model, milliseconds of one layer."""
    return (1e-7 * rows * length**2 + 4e-3 * rows * length) / tp + 2.0


def write_profiles(folder, *, memory="1,1,1,2048\n1,2,1,4096\n2,1,1,4096\n2,1,0,2048\n4,1,1,0\n"):
    time_csv, memory_csv = folder / "time.csv", folder / "memory.csv"
    rows = [f"{tp},{s},{b},{layer_ms(tp, b, s)}" for tp in (1, 2) for b, s in SHAPES]
    time_csv.write_text(TIME_HEADER + "\n".join(rows) + "\n")
    memory_csv.write_text(MEMORY_HEADER + memory)
    return time_csv, memory_csv


def trainer_task(**changes):
    task = {
        "rank": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "dense_h_to_4h", "dense_4h_to_h"],
        "global_batch_size": 64,
        "dataset_name": "dolly",
        "context_length": 2048,
        "steps": 5,
    }
    return task | changes


def write_trainer(folder, tasks, **changes):
    path = folder / "trainer.json"
    path.write_text(json.dumps({"variant": "canonical", "train_task_num": len(tasks), "task": tasks} | changes))
    return path


def test_stage_time_is_layer_time_times_layers_over_stages_in_seconds(tmp_path):
    table = read_cost_table(*write_profiles(tmp_path), num_layers=32, model="small")

    assert table.model == "small"
    for tp, pp in ((1, 1), (1, 2), (2, 1)):
        cost = table[ParallelConfig(tp=tp, pp=pp, remat="none")]
        for rows, length in ((1, 128), (3, 700), (8, 2048)):
            expected = layer_ms(tp, rows, length) / 1e3 * 32 / pp
            assert cost.micro_batch_s(rows, length) == pytest.approx(expected, rel=1e-6)
        assert cost.fit_error is not None and cost.fit_error.num_held_out >= 2
        assert cost.fit_error.max < 1e-6


def test_memory_rows_without_sequence_parallelism_or_room_are_left_out(tmp_path):
    table = read_cost_table(*write_profiles(tmp_path), num_layers=4)

    found = {(cost.config.tp, cost.config.pp): cost.capacity_tokens for cost in table.configs}
    assert found == {(1, 1): 2048, (1, 2): 4096, (2, 1): 4096}


def test_extra_columns_and_crlf_are_read(tmp_path):
    time_csv, memory_csv = write_profiles(tmp_path)
    lines = time_csv.read_text().splitlines()
    extended = [lines[0] + ",host", *(line + ",node7" for line in lines[1:])]
    time_csv.write_bytes(("\r\n".join(extended) + "\r\n").encode())

    plain = read_cost_table(*write_profiles(tmp_path), num_layers=4)
    time_csv.write_bytes(("\r\n".join(extended) + "\r\n").encode())
    assert read_cost_table(time_csv, memory_csv, num_layers=4).configs == plain.configs


def test_columns_in_another_order_blanks_and_a_byte_order_mark_are_read(tmp_path):
    plain = read_cost_table(*write_profiles(tmp_path), num_layers=4)
    for path in write_profiles(tmp_path):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        turned = "\r\n".join(" ,".join(f" {cell} " for cell in reversed(row)) for row in rows)
        path.write_bytes(b"\xef\xbb\xbf" + turned.encode() + b"\r\n  \r\n , , , \r\n\r\n")
    again = read_cost_table(tmp_path / "time.csv", tmp_path / "memory.csv", num_layers=4)
    assert again.configs == plain.configs
    (tmp_path / "memory.csv").write_text(MEMORY_HEADER + "1.0,1,1,2048.0\n")
    assert read_cost_table(tmp_path / "time.csv", tmp_path / "memory.csv", num_layers=4).configs[0] == plain.configs[0]
    (tmp_path / "memory.csv").write_text(MEMORY_HEADER + "1,1,1,2048.5\n")
    with pytest.raises(UserError, match=r"memory.csv:2: max_tokens: bad number .*'2048.5'"):
        read_cost_table(tmp_path / "time.csv", tmp_path / "memory.csv", num_layers=4)


@pytest.mark.parametrize(
    ("which", "text", "complaint"),
    [
        ("time", "tp,seq_len,time\n1,128,3.0\n", r"time.csv:1: no column mbs"),
        ("time", TIME_HEADER, r"time.csv: no rows"),
        ("time", TIME_HEADER + "1,128,1,3.0\n1,128,2\n", r"time.csv:3: wrong number of columns"),
        ("time", TIME_HEADER + "1,128,1,3.0\n1,x,2,3.0\n", r"time.csv:3: seq_len: bad number .*'x'"),
        ("time", TIME_HEADER + "1,128,1,-3.0\n", r"time.csv:2: time: bad time .*'-3.0'"),
        ("time", TIME_HEADER + "1,128,1,nan\n", r"time.csv:2: time: bad time"),
        ("memory", "tp,pp,max_tokens\n1,1,2048\n", r"memory.csv:1: no column sp"),
        ("memory", MEMORY_HEADER + "1,1,1,2048\n8,1,1,2048\n", r"memory.csv:3: no time was measured for tp=8"),
        ("memory", MEMORY_HEADER + "1,64,1,2048\n", r"memory.csv:2: pp: more stages than layers"),
        ("memory", MEMORY_HEADER + "1,1,1,2048\n1,1,1,4096\n", r"memory.csv: .*names \(tp1,pp1,none\) twice"),
        ("memory", MEMORY_HEADER + "1,1,0,2048\n", r"memory.csv: no config with sp=1"),
    ],
)
def test_malformed_profiles_name_file_and_line(tmp_path, which, text, complaint):
    paths = dict(zip(("time", "memory"), write_profiles(tmp_path), strict=True))
    paths[which].write_text(text)

    with pytest.raises(UserError, match=complaint) as error:
        read_cost_table(paths["time"], paths["memory"], num_layers=32)
    assert "\n" not in str(error.value)


def test_missing_profile_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.csv: cannot read"):
        read_cost_table(tmp_path / "nowhere.csv", tmp_path / "memory.csv", num_layers=32)


def test_trainer_tasks_keep_their_numbers_and_get_our_target_names(tmp_path):
    tasks = read_tasks(
        write_trainer(tmp_path, [trainer_task(), trainer_task(rank=4), trainer_task()], train_task_num=2)
    )

    assert [task.name for task in tasks] == ["dolly", "dolly-2"]
    assert [task.rank for task in tasks] == [8, 4]
    assert tasks[0].targets == ("q", "gate", "up", "down")
    assert (tasks[0].batch_size, tasks[0].context_length, tasks[0].alpha, tasks[0].steps) == (64, 2048, 16.0, 5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": [trainer_task(rank=0)]}, r"trainer.json: task\[0\].rank: bad value \(got 0\)"),
        (
            {"task": [trainer_task(target_modules=["w_proj"])]},
            r"target_modules: unknown target module \(got 'w_proj'\)",
        ),
        ({"task": [trainer_task(dataset_name=None)]}, r"task\[0\].dataset_name"),
        ({"task": []}, r"trainer.json: task: missing"),
        ({"train_task_num": 3}, r"train_task_num: bad value \(got 3\); expected 1 to 1"),
    ],
)
def test_bad_trainer_config_names_the_key(tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        read_tasks(write_trainer(tmp_path, [trainer_task()], **changes))


def test_trainer_config_that_is_not_json_names_the_line(tmp_path):
    path = tmp_path / "trainer.json"
    path.write_text('{\n "task": [\n  oops\n]}')
    with pytest.raises(UserError, match=r"trainer.json:3: not JSON"):
        read_tasks(path)


STRATEGY = """strategy_config:
  -
    dp: 6
    tp: 1
    pp: 1
    max_tokens: 2048
  -
    dp: 1
    tp: 8
    pp: 2
    max_tokens: 16384
"""


def test_strategy_file_and_comma_lists_give_the_same_replicas(tmp_path):
    path = tmp_path / "strategy.yaml"
    path.write_text(STRATEGY)

    groups = read_strategy(path)
    assert is_strategy_file(path)
    assert groups == parse_plan_lists("2048,16384", "6,1", "1,8", "1,2")
    assert [str(group) for group in groups] == ["6x(tp1,pp1,none)", "1x(tp8,pp2,none)"]
    assert [group.capacity_tokens for group in groups] == [2048, 16384]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (STRATEGY.replace("tp: 8", "tp: eight"), r"strategy_config\[1\].tp: bad value \(got 'eight'\)"),
        (STRATEGY.replace("    dp: 1\n", ""), r"strategy_config\[1\].dp: bad value"),
        ("strategy_config: []\n", r"strategy_config: missing"),
        ("a: [1\n", r"strategy.yaml:2: not YAML"),
    ],
)
def test_malformed_strategy_names_the_place(tmp_path, text, complaint):
    path = tmp_path / "strategy.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_strategy(path)


@pytest.mark.parametrize(
    ("lists", "complaint"),
    [
        (("2048,4096", "6", "1,2", "1,1"), r"--lobra-plan: lists of unlike length"),
        (("2048", "0", "1", "1"), r"--lobra-plan dp: bad list"),
        (("2048", "1", "one", "1"), r"--lobra-plan tp: bad list"),
    ],
)
def test_malformed_comma_lists_name_the_list(lists, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_plan_lists(*lists)


@needs_reference
def test_published_profile_fits_within_a_few_percent():
    table = read_cost_table(
        REFERENCE / "lobra_time_llama_7b_a100_40g.csv",
        REFERENCE / "lobra_memory_llama_7b_a100_40g_6tasks.csv",
        num_layers=32,
    )

    assert len(table.configs) == 14
    assert table.max_capacity_tokens == 16384
    for cost in table.configs:
        assert min(cost.coefficients) >= 0
        assert cost.fit_error is not None and cost.fit_error.mean < 0.05


@needs_reference
def test_published_trainer_configs_are_read():
    assert [len(read_tasks(REFERENCE / f"exp_task{n}.json")) for n in (6, 12)] == [6, 12]
    assert read_tasks(REFERENCE / "exp_task6.json")[4].name == "meetingbank"
