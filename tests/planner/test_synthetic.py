"""Length distributions made from published moments."""

from pathlib import Path

import numpy as np
import pytest

from planner.errors import UserError
from planner.lobra_files import LobraTask
from planner.synthetic import DatasetStatistics, moments, read_statistics, synthetic_lengths, synthetic_workload

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no published LobRA data beside the repository")

SKEWED = DatasetStatistics(dataset="Skewed-Set", mean=200.0, skewness=5.0, kurtosis=45.0, context_length=2048)
HEADER = "dataset,mean_length,skewness,kurtosis,task_type,batch_size,context_length\n"


def task(name, dataset, context_length=2048):
    return LobraTask(
        name=name,
        dataset=dataset,
        batch_size=16,
        context_length=context_length,
        rank=8,
        alpha=8.0,
        targets=("q",),
        steps=1,
    )


def check_moments(statistics, lengths):
    reached = moments(lengths)
    assert reached.mean == pytest.approx(statistics.mean, rel=0.02)
    assert reached.skewness == pytest.approx(statistics.skewness, rel=0.1)
    assert reached.kurtosis == pytest.approx(statistics.kurtosis, rel=0.1, abs=0.1)
    assert min(lengths) >= 1 and max(lengths) <= statistics.context_length
    assert sum(lengths.values()) == pytest.approx(1, abs=1e-9)


def test_moments_of_a_known_distribution():
    two_points = moments({10: 0.75, 50: 0.25})
    assert two_points.mean == 20
    assert two_points.std == pytest.approx(np.sqrt(300))
    assert two_points.skewness == pytest.approx((1 - 2 * 0.25) / np.sqrt(0.25 * 0.75))
    assert two_points.kurtosis == pytest.approx((1 - 6 * 0.25 * 0.75) / (0.25 * 0.75))
    assert moments({7: 1.0}).skewness == 0


def test_synthetic_lengths_have_the_wanted_moments():
    check_moments(SKEWED, synthetic_lengths(SKEWED, seed=0))


def test_moments_that_do_not_fit_below_the_context_length_keep_mean_and_skewness():
    cramped = DatasetStatistics(dataset="cramped", mean=400.0, skewness=2.0, kurtosis=30.0, context_length=1024)
    reached = moments(synthetic_lengths(cramped, seed=0))

    assert reached.mean == pytest.approx(400, rel=0.02)
    assert reached.skewness == pytest.approx(2.0, rel=0.1)
    assert reached.kurtosis > 0


def test_lengths_are_a_function_of_the_seed():
    first = synthetic_lengths(SKEWED, seed=3)
    assert first == synthetic_lengths(SKEWED, seed=3)
    assert first != synthetic_lengths(SKEWED, seed=4)


def test_workload_finds_data_sets_by_near_names_and_cuts_at_the_task_context():
    statistics = (SKEWED, DatasetStatistics(dataset="other", mean=50.0, skewness=1.0, kurtosis=1.5, context_length=512))
    workload, reached = synthetic_workload(
        [task("a", "skewed_set", 1024), task("b", "skewed", 2048)], statistics, seed=0
    )

    assert [one.name for one in workload.tasks] == ["a", "b"]
    assert max(workload.tasks[0].lengths) <= 1024
    assert [row.wanted.dataset for row in reached] == ["Skewed-Set", "Skewed-Set"]
    assert reached[1].moments == moments(workload.tasks[1].lengths)


def test_unknown_data_set_is_named():
    with pytest.raises(UserError, match=r"dataset_name: 0 rows .*'poems'.*Skewed-Set"):
        synthetic_workload([task("a", "poems")], (SKEWED,), seed=0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("dataset,mean_length\n", r"stats.csv:1: no column skewness"),
        (HEADER, r"stats.csv: no rows"),
        (HEADER + "x,100,1,2,t,8,1000\ny,lots,1,2,t,8,1000\n", r"stats.csv:3: bad row"),
        (HEADER + "x,5000,1,2,t,8,1000\n", r"stats.csv:2: .*mean_length = 5000"),
        (HEADER + "x,100,3,2,t,8,1000\n", r"stats.csv:2: .*kurtosis = 2.0"),
    ],
)
def test_malformed_statistics_name_file_and_line(tmp_path, text, complaint):
    path = tmp_path / "stats.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_statistics(path)


@needs_reference
@pytest.mark.parametrize("dataset", ["databricks-dolly-15k", "CommitPackFt", "XSum", "MeetingBank"])
def test_published_statistics_are_met(dataset):
    statistics = {row.dataset: row for row in read_statistics(REFERENCE / "table4_datasets.csv")}
    check_moments(statistics[dataset], synthetic_lengths(statistics[dataset], seed=1))
