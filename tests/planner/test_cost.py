"""Cost tables and histograms with values that cannot be are refused in one line that names file, key and value."""

import copy
import json
from pathlib import Path

import pytest

from planner.cost import CostTable
from planner.errors import UserError
from planner.workload import Workload

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TABLE = json.loads((CONFIGS / "costs" / "llama2_7b_a100_40g.json").read_text(encoding="utf-8"))
LENGTHS = json.loads((CONFIGS / "lengths" / "lobra_six_tasks.json").read_text(encoding="utf-8"))


def written(folder, raw):
    path = folder / "file.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def refusal(load, path):
    with pytest.raises(UserError) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fixed_s", -0.01),
        ("fixed_s", float("nan")),
        ("fixed_s", float("inf")),
        ("capacity_tokens", 3059.5),
        ("capacity_tokens", "3059"),
        ("capacity_tokens", 0),
        ("coefficients", [0.0, 0.0, float("nan"), 0.0, 0.0, 0.0]),
        ("coefficients", [0.0] * 5),
    ],
)
def test_a_config_with_an_impossible_value_is_refused_by_name(tmp_path, key, value):
    raw = copy.deepcopy(TABLE)
    raw["configs"][0][key] = value
    text = refusal(CostTable.load, written(tmp_path, raw))
    assert key in text and f"(tp{raw['configs'][0]['tp']},pp{raw['configs'][0]['pp']}," in text


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_an_impossible_step_overhead_is_refused(tmp_path, value):
    assert "step_overhead_s" in refusal(CostTable.load, written(tmp_path, TABLE | {"step_overhead_s": value}))


@pytest.mark.parametrize("load", [CostTable.load, Workload.load])
def test_a_list_is_no_table(tmp_path, load):
    assert "not a mapping" in refusal(load, written(tmp_path, [1, 2]))


@pytest.mark.parametrize("value", [2.5, "4", 0])
def test_a_batch_size_that_is_no_number_of_sequences_is_refused(tmp_path, value):
    raw = copy.deepcopy(LENGTHS)
    raw["tasks"][0]["batch_size"] = value
    text = refusal(Workload.load, written(tmp_path, raw))
    assert "batch_size" in text and repr(value) in text


def test_keys_that_the_format_does_not_have_are_let_be(tmp_path):
    """Tables are written by programs, some by newer ones."""
    raw = copy.deepcopy(TABLE) | {"remark": "of mine"}
    raw["configs"][0]["remark"] = 1
    assert CostTable.load(written(tmp_path, raw)) == CostTable.from_dict(TABLE)
