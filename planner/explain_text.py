"""Prints an explanation or a simulation as tables and sentences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from planner.dispatch import GAP_LIMIT
from planner.explain import WORTH_SAYING, Explanation, ReplicaTime, in_seconds, three_digits
from planner.other_plans import Alternative
from planner.plan import Plan, ReplicaGroup
from planner.simulate import Simulation, replica_names
from planner.synthetic import Reached

NUM_RANGES = 4
"""Padded lengths are summed up in about this many ranges, to fit a terminal."""

FEW_RANGES = 3
"""Before fewer than so many are shown, the replicas' names are broken."""

MOST_WIDTH = 1000
"""Columns on which the width that a table needs is measured."""

NO_VALUE = "-"

DIGITS = 3
"""Digits of the slowest replica's seconds; all others have as many decimals."""

POLICIES = {
    "none": "nothing",
    "dots": "all but matrix products and attention",
    "attention": "all but attention",
    "full": "the whole layer",
}
"""Rematerialisation policy -> what the backward pass computes again."""

DOUBTS = "What does not add up"
BATCH_NOTE = (
    "The expected batch has as many sequences of each padded length as a step has on average, rounded up; sampled "
    "batches (lobra simulate) scatter around it, and a plan made with --robust is chosen for those instead."
)
WAITS_NOTE = "waits: share of the time until the last replica is done, in which this one has nothing to do."
START_UP_NOTE = "start up: what a step costs a replica whatever it holds, and filling and draining its pipeline."
OTHERS_NOTE = (
    f"Each dispatches the batch as a run would, most to within {GAP_LIMIT:.0%} of its best: smaller differences mean "
    "nothing. All kinds of replica in the cost table may be used, whatever constraints the plan was made under."
)

CUT_SHORT_NOTE = "cut short: its time was up before its search ended; with a longer --time-limit it may be better."


def words(explanation: Explanation) -> tuple[str, ...]:
    """What the plan is, in sentences for someone who sees one for the first time."""
    plan = explanation.plan
    pipeline = any(group.config.pp > 1 for group in plan.replicas)
    idle = plan.num_devices - plan.used_devices
    kinds = "; ".join(_kind(group) for group in plan.replicas)
    first = (
        f"The {plan.num_devices} devices hold {plan.num_replicas} "
        f"{'copies' if plan.num_replicas > 1 else 'copy'} (replicas) of {plan.model}: {kinds}."
        + (f" {idle} {'devices stay' if idle > 1 else 'device stays'} idle." if idle else "")
    )
    second = (
        "tp is how many devices share every layer"
        + (", pp how many stages the layers are cut into" if pipeline else "")
        + f", and the last word what is computed a second time to save memory ({_policies(plan)}). A sequence only "
        "fits a replica that holds its padded length; the step ends when the last replica is done."
    )
    if plan.predicted is None:
        return first, second
    made = plan.predicted
    third = (
        f"Planner {plan.planner} expected {in_seconds(made.step_s)} a step when it made the plan, and had proven that "
        f"no plan takes less than {in_seconds(made.bound_s)}."
    )
    return first, second, third


def _policies(plan: Plan) -> str:
    """What the rematerialisation policies of a plan's replicas mean."""
    used = {remat for group in plan.replicas for remat in group.config.remats}
    return "; ".join(f"{policy}: {meaning}" for policy, meaning in POLICIES.items() if policy in used)


def _kind(group: ReplicaGroup) -> str:
    devices = group.config.num_devices
    number = f"{devices} devices" if devices > 1 else "one device"
    each = " each" if group.count > 1 else ""
    holds = [f"{tokens} with {remat}" for remat, tokens in zip(group.config.remats, group.capacities, strict=True)]
    tokens = f"{group.capacity_tokens} tokens at a time"
    if len(holds) > 1:
        tokens = f"{', '.join(holds)} tokens at a time, each padded length with the first that holds it"
    return f"{group.count} of {group.config} on {number}{each}, up to {tokens}"


def verdict(explanation: Explanation) -> str:
    """The step time against the proven bound."""
    said = f"A step of the expected batch ({sum(explanation.counts.values())} sequences) takes " + in_seconds(
        explanation.step_s
    )
    if explanation.fitted_s is not None:
        said += (
            " by its micro-batches as they were timed (lobra profile --plan). Plans are made and compared by what is "
            f"fitted, which says {in_seconds(explanation.fitted_s)}"
        )
    if explanation.bound_s is None or explanation.gap is None:
        return said + "."
    said += f"; no plan on these devices can take less than {in_seconds(explanation.bound_s)} (proven)."
    if explanation.gap <= WORTH_SAYING / 2:
        return f"{said} So this plan is the best possible to within {explanation.gap:.1%}."
    return f"{said} So another plan could save {explanation.gap:.0%} of the step at the most."


def render(explanation: Explanation) -> RenderableType:
    """Everything as one rich renderable."""
    parts: list[RenderableType] = [Text(str(explanation.plan), style="bold"), Text()]
    parts += [Text(sentence) for sentence in words(explanation)]
    parts += [Text(), Text(verdict(explanation)), Text(BATCH_NOTE), Text(), ReplicaTable(explanation)]
    parts += [Text(), *_bullets("What limits the step", explanation.limits)]
    if explanation.doubts:
        parts += [Text(), *_bullets(DOUBTS, explanation.doubts)]
    if explanation.alternatives:
        parts += [Text(), alternatives_table(explanation)]
        parts += [Text(note, style="dim") for note in other_notes(explanation)]
    return Group(*parts)


def replica_notes(explanation: Explanation) -> tuple[str, ...]:
    """What the last columns of the table of replicas mean."""
    return (START_UP_NOTE, WAITS_NOTE) if _starts_up(explanation) else (WAITS_NOTE,)


def _starts_up(explanation: Explanation) -> bool:
    return any(replica.filling_s + replica.fixed_s for replica in explanation.replicas)


def _bullets(title: str, sentences: Sequence[str]) -> tuple[RenderableType, RenderableType]:
    bullets = Table.grid(padding=(0, 1))
    for sentence in sentences:
        bullets.add_row(" -", Text(sentence))
    return Text(title, style="bold"), bullets


@dataclasses.dataclass(frozen=True)
class ReplicaTable:
    """The table of replicas and notes on its columns; where the console is narrow, with fewer ranges of lengths."""

    explanation: Explanation

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ends = length_ranges(self.explanation)
        tries = [(ends[first:], False) for first in range(max(1, len(ends) + 1 - FEW_RANGES))]
        tries += [(ends[first:], True) for first in range(len(ends))]
        for shown, broken in tries:
            table = replica_table(self.explanation, shown, broken_names=broken)
            if Measurement.get(console, options.update(max_width=MOST_WIDTH), table).maximum <= options.max_width:
                break
        yield table
        for note in replica_notes(self.explanation):
            yield Text(note, style="dim")


def replica_table(explanation: Explanation, ends: Sequence[int], *, broken_names: bool = False) -> Table:
    """Seconds of each replica by ranges of padded length with these upper ends."""
    start_up = _starts_up(explanation)
    decimals = max(0, DIGITS - 1 - math.floor(math.log10(explanation.slowest_s)))
    title = "Seconds of a step by padded length (tokens) of the sequences"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("replica", no_wrap=True)
    names = [f"to\n{end}" for end in ends] + ["start\nup"] * start_up + ["total", "waits"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for replica in explanation.replicas:
        cells = by_range(replica, ends) + [replica.filling_s + replica.fixed_s] * start_up
        seconds = [f"{cell:.{decimals}f}" if cell else NO_VALUE for cell in cells]
        seconds.append(f"{replica.seconds:.{decimals}f}")
        table.add_row(
            replica.name.replace(" (", "\n  (") if broken_names else replica.name,
            *seconds,
            f"{1 - replica.seconds / explanation.slowest_s:.1%}",
            style="bold" if replica.seconds == explanation.slowest_s else None,
        )
    return table


def length_ranges(explanation: Explanation) -> tuple[int, ...]:
    """Upper ends, ascending, of ranges of padded lengths: the replicas' capacities, and halvings of the smallest."""
    longest, shortest = max(explanation.counts), min(explanation.counts)
    ends = {min(replica.capacity_tokens, longest) for replica in explanation.replicas}
    half = min(ends) // 2
    while len(ends) < NUM_RANGES and half >= shortest:
        ends.add(half)
        half //= 2
    return tuple(sorted(ends))


def by_range(replica: ReplicaTime, ends: Sequence[int]) -> list[float]:
    """Seconds of a replica in each range of padded lengths."""
    starts = [0, *ends[:-1]]
    return [
        sum(seconds for length, seconds in replica.by_bucket.items() if start < length <= end)
        for start, end in zip(starts, ends, strict=True)
    ]


def alternatives_table(explanation: Explanation) -> Table:
    """What other plans cost on the same batch."""
    table = Table(title="Other plans on the same batch", box=SIMPLE_HEAD)
    rows = [(alternative_name(other), *alternative_cells(explanation, other)) for other in explanation.alternatives]
    table.add_column("what", overflow="fold")
    # Plans are broken between replicas.
    table.add_column(
        "plan", overflow="fold", min_width=max((len(w) for row in rows for w in row[1].split()), default=1)
    )
    table.add_column("step (s)", justify="right")
    table.add_column("against this plan", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def alternative_name(other: Alternative) -> str:
    return f"{other.change}, cut short" if other.cut_short else other.change


def other_notes(explanation: Explanation) -> tuple[str, ...]:
    """What to know of the other plans."""
    notes = [OTHERS_NOTE]
    if explanation.num_kept_in:
        kept = explanation.num_kept_in
        notes.append(
            f"{kept} kinds of replica with fewer devices were not left out."
            if kept > 1
            else "One kind of replica with fewer devices was not left out."
        )
    if any(other.cut_short for other in explanation.alternatives):
        notes.append(CUT_SHORT_NOTE)
    return tuple(notes)


def alternative_cells(explanation: Explanation, other: Alternative) -> tuple[str, str, str]:
    """(plan or why there is none, seconds, difference to the plan explained)."""
    if other.plan is None or other.step_s is None:
        return f"none: {other.note}", NO_VALUE, NO_VALUE
    same = other.plan.replicas == explanation.plan.replicas and other.plan.num_devices == explanation.plan.num_devices
    difference = f"{other.step_s / explanation.compared_s - 1:+.1%}"
    return str(other.plan), three_digits(other.step_s), "the same plan" if same else difference


def simulation_table(simulation: Simulation) -> Table:
    """Mean seconds and waiting share of each replica."""
    title = f"{len(simulation.steps)} simulated steps, dispatch {simulation.method}, seed {simulation.seed}"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("replica", no_wrap=True)
    for name in ("busy (s), mean", "idle share"):
        table.add_column(name, justify="right")
    for name, busy, idle in zip(
        replica_names(simulation.plan), simulation.replica_s, simulation.idle_shares, strict=True
    ):
        table.add_row(name, three_digits(busy), f"{idle:.1%}")
    return table


def simulation_line(simulation: Simulation) -> str:
    """The totals of a simulation."""
    return (
        f"step mean {simulation.mean_step_s:.4g} s, p50 {simulation.quantile_s(0.5):.4g} s, "
        f"p95 {simulation.quantile_s(0.95):.4g} s; {simulation.gpu_seconds:.4g} GPU-seconds a step; "
        f"{simulation.tokens_per_s:,.0f} tokens/s; padding {simulation.padding_share:.1%}; "
        f"idle {simulation.idle_share:.1%}; "
        f"dispatch mean {sum(step.solve_s for step in simulation.steps) / len(simulation.steps):.3g} s"
    )


def reached_table(reached: Sequence[Reached]) -> Table:
    """Wanted and reached moments of synthetic lengths."""
    table = Table(title="Synthetic lengths (tokens), wanted/reached", box=SIMPLE_HEAD)
    table.add_column("task", no_wrap=True)
    for name in ("mean", "skewness", "kurtosis", "std"):
        table.add_column(name, justify="right")
    for row in reached:
        pairs = [(row.wanted.mean, row.moments.mean, 0), (row.wanted.skewness, row.moments.skewness, 2)]
        pairs.append((row.wanted.kurtosis, row.moments.kurtosis, 2))
        cells = [f"{wanted:.{digits}f}/{got:.{digits}f}" for wanted, got, digits in pairs]
        table.add_row(row.task, *cells, f"{row.moments.std:.0f}")
    return table
