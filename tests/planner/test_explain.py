"""The explanation of a plan, as numbers, text and HTML."""

import dataclasses
import html
import html.parser
import io
import itertools

import pytest
from rich.console import Console

from planner import one_kind, other_plans, task_fused
from planner.config_cost import ConfigCost, ShapeTime
from planner.cost import CostTable
from planner.errors import UserError
from planner.explain import explain, in_seconds
from planner.explain_html import html as page
from planner.explain_text import DOUBTS, POLICIES, WAITS_NOTE, alternatives_table, length_ranges, render, verdict
from planner.other_plans import BEST, MOST_LEFT_OUT, ONE_KIND, Alternative
from planner.plan import REMATS, ParallelConfig, Plan, Prediction, ReplicaGroup
from planner.problem import build_problem
from planner.workload import TaskLengths, Workload

NARROW, WIDE = ParallelConfig(tp=1, pp=1, remat="none"), ParallelConfig(tp=2, pp=1, remat="none")
PIPELINE = ParallelConfig(tp=1, pp=2, remat="none")


def cost(config, capacity, per_token):
    return ConfigCost(
        config=config, capacity_tokens=capacity, coefficients=(0.0, 0.0, per_token, 0.0, 0.0, 2e-3), fixed_s=1e-2
    )


COSTS = CostTable(
    model="m",
    model_fingerprint="f",
    hardware={},
    configs=(cost(NARROW, 64, 1e-3), cost(WIDE, 256, 8e-4), cost(PIPELINE, 256, 9e-4)),
    step_overhead_s=0.25,
)
WORKLOAD = Workload(
    tasks=(
        TaskLengths(name="short", batch_size=12, lengths={16: 1.0}),
        TaskLengths(name="long", batch_size=6, lengths={250: 1.0}),
    )
)


def plan(*groups, num_devices=4, predicted=None):
    replicas = tuple(
        ReplicaGroup(count=count, config=config, capacity_tokens=256 if config != NARROW else 64)
        for count, config in groups
    )
    return Plan(model="m", num_devices=num_devices, replicas=replicas, buckets=(16, 64, 256), predicted=predicted)


UNBALANCED = plan((1, WIDE), (2, NARROW))


def text(explanation, width=200):
    console = Console(file=io.StringIO(), width=width)
    console.print(render(explanation))
    return console.file.getvalue()


class Checker(html.parser.HTMLParser):
    """Collects text and checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        assert not any(name in ("src", "href") for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_replica_times_are_the_cost_models_and_split_by_bucket():
    explanation = explain(UNBALANCED, COSTS, WORKLOAD, compare=False)

    wide = explanation.replicas[0]
    one_long_s = 8e-4 * 256 + 2e-3
    assert wide.by_bucket[256] == pytest.approx(6 * one_long_s)
    assert explanation.counts == {16: 12, 256: 6}
    for replica in explanation.replicas:
        assert replica.seconds == pytest.approx(sum(replica.by_bucket.values()) + replica.filling_s + replica.fixed_s)
    assert sum(sum(replica.sequences.values()) for replica in explanation.replicas) == 18
    assert explanation.step_s == pytest.approx(wide.seconds + 0.25)
    assert explanation.bound_s is None and explanation.alternatives == ()


def test_sequences_that_fit_nowhere_else_are_named_as_the_limit():
    limits = " ".join(explain(UNBALANCED, COSTS, WORKLOAD, compare=False).limits)

    assert "not in balance" in limits
    assert "replica 0 (tp2,pp1,none)" in limits
    assert "sequences over 64 tokens, which no other kind of replica here can hold" in limits
    assert "summing gradients" in limits


def test_balance_pipeline_filling_and_idle_devices_are_said():
    balanced = " ".join(explain(plan((2, WIDE), num_devices=5), COSTS, WORKLOAD, compare=False).limits)
    assert "The work is in balance" in balanced
    assert "1 of 5 devices hold no replica" in balanced

    piped = explain(plan((1, PIPELINE)), COSTS, WORKLOAD, compare=False)
    assert piped.replicas[0].filling_s == pytest.approx(9e-4 * 256 + 2e-3)
    assert "Filling and draining the pipeline of replica 0 (tp1,pp2,none)" in " ".join(piped.limits)
    assert "does all the work" in " ".join(piped.limits)


def test_replica_without_work_is_said():
    few = Workload(tasks=(TaskLengths(name="t", batch_size=1, lengths={250: 1.0}),))
    limits = " ".join(explain(plan((2, WIDE)), COSTS, few, compare=False).limits)
    assert "No sequence of this batch goes to replica" in limits


def test_comparison_gives_bound_gap_and_runner_ups_in_order():
    progress = []
    explanation = explain(UNBALANCED, COSTS, WORKLOAD, time_limit_s=5, on_progress=progress.append)

    changes = [other.change for other in explanation.alternatives]
    assert set(changes) == set(progress)
    without = ["planned without (tp2,pp1,none)", "planned without (tp1,pp1,none)"]
    for expected in (BEST, ONE_KIND, "planner minlp", *without):
        assert expected in changes
    assert changes[-2:] == ["one more device (5)", "memory for 25% more tokens (the costs tell no bytes)"]
    # With 320 tokens a slot would hold no more rows of 256, so the smaller capacity may be kept.
    assert {group.capacity_tokens for group in explanation.alternatives[-1].plan.replicas} <= {80, 256, 320}
    assert explanation.alternatives[-1].step_s <= min(other.step_s for other in explanation.alternatives[:-2])
    times = [other.step_s for other in explanation.alternatives[:-2]]
    assert times == sorted(times)
    assert explanation.bound_s <= min(times) * (1 + 1e-9)
    assert explanation.gap == pytest.approx(1 - explanation.bound_s / explanation.step_s)
    assert 0 < explanation.gap < 1
    assert "another plan could save" in verdict(explanation)


def test_config_that_alone_holds_the_longest_bucket_cannot_be_left_out():
    only = dataclasses.replace(COSTS, configs=COSTS.configs[:2])
    explanation = explain(UNBALANCED, only, WORKLOAD, time_limit_s=5)

    without = next(other for other in explanation.alternatives if other.change == "planned without (tp2,pp1,none)")
    assert without.plan is None and without.step_s is None
    assert "256 tokens" in without.note
    assert "none: no other config holds 256 tokens" in text(explanation)


def test_text_names_replicas_limits_and_what_a_replica_is():
    predicted = Prediction(step_s=2.0, bound_s=1.5, gap=0.25, gpu_seconds=8.0, solve_s=0.1)
    explained = dataclasses.replace(UNBALANCED, predicted=predicted, planner="prune")
    shown = text(explain(explained, COSTS, WORKLOAD, compare=False))

    for expected in (
        "1x(tp2,pp1,none) 2x(tp1,pp1,none)",
        "replica 2 (tp1,pp1,none)",
        "The 4 devices hold 3 copies (replicas) of m",
        "Planner prune expected 2.00 s a step",
        "A step of the expected batch (18 sequences) takes",
        "--robust",
        "What limits the step",
        "to 64",
        "to 256",
    ):
        assert expected in shown


def test_numbers_of_the_plan_that_contradict_each_other_or_the_costs_are_said():
    step_s = explain(UNBALANCED, COSTS, WORKLOAD, compare=False).step_s
    honest = Prediction(step_s=step_s, bound_s=step_s, gap=0.0, gpu_seconds=4 * step_s, solve_s=0.1)
    told = explain(dataclasses.replace(UNBALANCED, predicted=honest), COSTS, WORKLOAD, compare=False)
    assert told.doubts == () and DOUBTS not in text(told) and DOUBTS not in page(told)
    wrong = dataclasses.replace(honest, step_s=0.9 * step_s)
    doubted = explain(dataclasses.replace(UNBALANCED, predicted=wrong), COSTS, WORKLOAD, compare=False)
    assert len(doubted.doubts) == 4  # bound, gap, GPU-seconds, and the costs
    for sentence in doubted.doubts:
        assert sentence in text(doubted) and sentence in html.unescape(page(doubted))


def test_seconds_have_alike_decimals_and_fit_eighty_columns():
    explanation = explain(plan((1, PIPELINE), (2, NARROW)), COSTS, WORKLOAD, compare=False)
    console = Console(file=io.StringIO(), width=80)
    console.print(render(explanation))
    shown = console.file.getvalue()
    assert "…" not in shown and "start up: what a step costs" in shown
    (row,) = [line for line in shown.splitlines() if line.strip().startswith("replica 0 (tp1,pp2")]
    assert {len(cell.split(".")[1]) for cell in row.split() if cell.replace(".", "").isdigit() and "." in cell} == {2}


def test_other_plans_are_broken_between_replicas_on_eighty_columns():
    mixed = ParallelConfig(tp=16, pp=1, remat="none+dots+attention")
    wide = ReplicaGroup(count=128, config=mixed, capacity_tokens=256, smaller_capacities=(64, 128))
    other = dataclasses.replace(UNBALANCED, num_devices=4096, replicas=(wide, *UNBALANCED.replicas))
    change = "planned without (tp16,pp1,none+dots+attention)"
    explanation = explain(UNBALANCED, COSTS, WORKLOAD, compare=False)
    explanation = dataclasses.replace(explanation, alternatives=(Alternative(change=change, plan=other, step_s=1.0),))
    console = Console(file=io.StringIO(), width=80)
    console.print(alternatives_table(explanation))
    shown = console.file.getvalue()
    assert "…" not in shown and "128x(tp16,pp1,none+dots+attention)" in shown
    assert change.replace(" ", "") in "".join(line[2:25].strip() for line in shown.splitlines()[2:]).replace(" ", "")


def one_kind_case():
    """(costs, workload): one long sequence and many short: equal shares do not keep these off its replica."""
    configs = (cost(NARROW, 1000, 1e-2), cost(WIDE, 1000, 6e-3))
    tasks = (
        TaskLengths(name="long", batch_size=1, lengths={1000: 1.0}),
        TaskLengths(name="short", batch_size=36, lengths={100: 1.0}),
    )
    return dataclasses.replace(COSTS, configs=configs), Workload(tasks=tasks)


def test_one_kind_of_replica_is_the_best_at_the_share_out_that_the_table_times():
    costs, workload = one_kind_case()
    narrow = ReplicaGroup(count=4, config=NARROW, capacity_tokens=1000)
    chosen = Plan(model="m", num_devices=4, replicas=(narrow,), buckets=(112, 1000))
    explanation = explain(chosen, costs, workload, time_limit_s=4)

    problem = build_problem(workload, costs, 4, buckets=chosen.buckets)
    assert task_fused.solve(problem).replicas != chosen.replicas  # equal shares would name the other
    best = one_kind.solve(problem)
    assert best.replicas == chosen.replicas and best.predicted.step_s == pytest.approx(explanation.step_s)
    alone = next(other for other in explanation.alternatives if other.change == ONE_KIND)
    assert alone.plan.replicas == chosen.replicas
    assert alone.step_s == pytest.approx(explanation.step_s)


def test_other_plans_have_one_time_limit_together_and_say_where_it_ended_them(monkeypatch):
    clock, given = itertools.count(), []
    monkeypatch.setattr(other_plans.time, "perf_counter", lambda: float(next(clock)))  # each look at it is a second
    solved = other_plans.solver("exact")(build_problem(WORKLOAD, COSTS, 4, buckets=UNBALANCED.buckets))
    late = dataclasses.replace(solved, predicted=dataclasses.replace(solved.predicted, status="time limit"))

    def solve(problem):
        given.append(problem.time_limit_s)
        return late

    monkeypatch.setattr(other_plans, "solver", lambda _: solve)
    explanation = explain(UNBALANCED, COSTS, WORKLOAD, time_limit_s=20)
    searches = len(explanation.alternatives)
    assert sum(given[1:]) < 20 and given[0] <= 10 and searches > 5
    shown = text(explanation)
    assert "planner minlp, cut short" in shown and "cut short: its time was up" in shown
    assert "cut short: its time was up" in page(explanation)
    assert "one kind of replica only, cut short" not in shown


def test_what_another_search_found_serves_where_it_would_do_too(monkeypatch):
    """A search that was cut short does not make one more device, or leaving a kind out, look worse than they are."""
    real = other_plans.solver("exact")
    poor = plan((1, WIDE), num_devices=4)

    def solve(problem):
        return dataclasses.replace(real(problem), replicas=poor.replicas)

    monkeypatch.setattr(other_plans, "solver", lambda _: solve)
    found = explain(UNBALANCED, COSTS, WORKLOAD, time_limit_s=5)
    steps = {other.change: other.step_s for other in found.alternatives}
    assert steps["planner minlp"] > found.step_s  # it is what it found
    assert steps[BEST] <= found.step_s and steps["one more device (5)"] <= found.step_s
    without = next(other for other in found.alternatives if other.change == "planned without (tp2,pp1,none)")
    assert without.step_s > found.step_s or WIDE not in {group.config for group in without.plan.replicas}


def test_only_the_kinds_with_most_devices_are_left_out_in_turn():
    configs = tuple(cost(ParallelConfig(tp=tp, pp=1, remat="none"), 256, 1e-3 / tp) for tp in range(1, 7))
    costs = dataclasses.replace(COSTS, configs=configs)
    groups = tuple(ReplicaGroup(count=1, config=c.config, capacity_tokens=256) for c in configs)
    many = Plan(model="m", num_devices=21, replicas=groups, buckets=(16, 64, 256))
    explanation = explain(many, costs, WORKLOAD, time_limit_s=1)
    without = [o.change for o in explanation.alternatives if o.change.startswith("planned without")]
    assert sorted(without) == [f"planned without (tp{tp},pp1,none)" for tp in (3, 4, 5, 6)]
    assert len(without) == MOST_LEFT_OUT and "2 kinds of replica with fewer devices were not left out" in text(
        explanation
    )


def test_what_sharing_out_could_save_is_no_more_than_the_gap_to_the_proven_bound():
    balanced = plan((2, WIDE))
    alone = explain(balanced, COSTS, WORKLOAD, compare=False)
    predicted = Prediction(step_s=alone.step_s, bound_s=alone.step_s, gap=0.0, gpu_seconds=4 * alone.step_s, solve_s=0)
    proven = explain(dataclasses.replace(balanced, predicted=predicted), COSTS, WORKLOAD, compare=False)
    assert proven.doubts == () and "could save 0.0% of that at the most (proven)" in proven.limits[0]

    def gain(said):
        return float(said.limits[0].split("could save ")[1].split("%")[0]) / 100

    compared = explain(balanced, COSTS, WORKLOAD, time_limit_s=5)
    least_s = compared.bound_s - COSTS.step_overhead_s
    assert gain(compared) <= 1 - least_s / compared.slowest_s + 5e-4
    other = dataclasses.replace(predicted, step_s=2 * alone.step_s, bound_s=2 * alone.step_s)
    doubted = explain(dataclasses.replace(balanced, predicted=other), COSTS, WORKLOAD, compare=False)
    assert doubted.doubts and gain(doubted) == pytest.approx(gain(alone))  # proven of other costs or lengths


def test_another_replica_for_the_longest_is_advised_only_where_there_is_one_and_it_limits_the_step():
    longest = "which no other kind of replica here can hold"
    advice = "A second replica that holds them"
    limited = explain(UNBALANCED, COSTS, WORKLOAD, compare=False).limits[1]
    assert longest in limited and advice in limited

    several = " ".join(explain(plan((2, WIDE), (1, NARROW), num_devices=5), COSTS, WORKLOAD, compare=False).limits)
    assert longest in several and "2 of its kind share them" in several and advice not in several

    short = TaskLengths(name="short", batch_size=25, lengths={60: 1.0})
    even = dataclasses.replace(WORKLOAD, tasks=(short, WORKLOAD.tasks[1]))
    balanced = " ".join(explain(plan((1, WIDE), (1, NARROW), num_devices=3), COSTS, even, compare=False).limits)
    assert "The work is in balance" in balanced and longest in balanced and advice not in balanced


@pytest.mark.parametrize("width", [60, 70, 80, 120])
def test_waits_and_its_note_are_shown_together_on_any_console(width):
    mixed = ParallelConfig(tp=2, pp=1, remat="attention")
    costs = dataclasses.replace(COSTS, configs=(*COSTS.configs, cost(mixed, 131072, 7e-4)))
    longest = TaskLengths(name="longest", batch_size=2, lengths={131072: 1.0})
    groups = (
        ReplicaGroup(count=12, config=mixed, capacity_tokens=131072),
        *plan((2, NARROW), (1, PIPELINE)).replicas,
    )
    wide = Plan(model="m", num_devices=28, replicas=groups, buckets=(16, 64, 256, 131072))
    workload = dataclasses.replace(WORKLOAD, tasks=(*WORKLOAD.tasks, longest))
    lines = text(explain(wide, costs, workload, compare=False), width=width).splitlines()
    head = next(line for line in lines if line.split()[:1] == ["replica"])
    assert "waits" in head.split() and "total" in head.split() and "131072" in head.split()
    assert "…" not in "".join(lines) and max(map(len, lines)) <= width
    assert WAITS_NOTE.split()[-1] in " ".join(lines)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.01234, "0.0123"), (9.999, "10.0"), (99.96, "100"), (133.2, "133"), (1234.5, "1234")]
)
def test_seconds_have_three_digits_and_no_stray_dot(seconds, shown):
    explanation = explain(UNBALANCED, COSTS, WORKLOAD, compare=False)
    other = Alternative(change="other", plan=plan((1, WIDE)), step_s=seconds)
    line = text(dataclasses.replace(explanation, alternatives=(other,))).split("Other plans")[1]
    assert f" {shown} " in line
    assert in_seconds(seconds) == f"{shown} s"


def test_every_policy_has_its_meaning():
    assert tuple(POLICIES) == REMATS


def test_ranges_of_lengths_end_at_the_capacities_and_the_longest_bucket():
    explanation = explain(UNBALANCED, COSTS, WORKLOAD, compare=False)
    ends = length_ranges(explanation)
    assert {64, 256} <= set(ends) and list(ends) == sorted(ends)
    assert ends[-1] == 256


def test_page_is_well_formed_self_contained_and_escaped():
    named = dataclasses.replace(UNBALANCED, model="<m&m>")
    explanation = explain(named, dataclasses.replace(COSTS, model="<m&m>"), WORKLOAD, time_limit_s=5)
    checker = Checker()
    checker.feed(page(explanation))

    assert checker.open == []
    shown = " ".join(checker.texts)
    for expected in ("Plan for <m&m>", "replica 0 (tp2,pp1,none)", "What limits the step", BEST, "the same batch"):
        assert expected in shown


def test_costs_of_another_model_are_refused():
    with pytest.raises(UserError, match="plan of another model"):
        explain(UNBALANCED, dataclasses.replace(COSTS, model="n"), WORKLOAD)


def test_plans_are_compared_by_what_is_fitted_though_micro_batches_of_one_were_timed():
    made = explain(UNBALANCED, COSTS, WORKLOAD, compare=False).step_s
    prediction = Prediction(step_s=made, bound_s=made, gap=0.0, gpu_seconds=4 * made, solve_s=0.1)
    chosen = plan((1, WIDE), (2, NARROW), predicted=prediction)
    shapes = {g.config: g.shapes(chosen.buckets, num_options=chosen.row_options) for g in chosen.replicas}
    configs = [
        dataclasses.replace(
            one,
            timed=tuple(
                ShapeTime(rows=rows, length=length, seconds=0.75) for rows, length in shapes.get(one.config, ())
            ),
        )
        for one in COSTS.configs
    ]
    plain = explain(chosen, COSTS, WORKLOAD)
    timed = explain(chosen, dataclasses.replace(COSTS, configs=tuple(configs)), WORKLOAD)
    for replica in timed.replicas:
        assert replica.seconds == pytest.approx(1e-2 + 0.75 * replica.num_micro_batches)
    assert plain.fitted_s is None and timed.fitted_s == pytest.approx(plain.step_s)
    assert timed.step_s > 1.1 * timed.fitted_s
    assert timed.bound_s == pytest.approx(plain.bound_s) and timed.gap == pytest.approx(plain.gap)
    assert [(a.change, a.step_s) for a in timed.alternatives] == [(a.change, a.step_s) for a in plain.alternatives]
    assert "as they were timed" in verdict(timed) and in_seconds(plain.step_s) in verdict(timed)
    assert timed.doubts == plain.doubts == ()
