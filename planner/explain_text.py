"""Prints an explanation or a simulation as tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.explain import WORTH_SAYING, Alternative, Explanation, ReplicaTime, in_seconds
from planner.plan import ReplicaGroup
from planner.simulate import Simulation, replica_names
from planner.synthetic import Reached

NUM_RANGES = 4
"""Padded lengths are summed up in about this many ranges, to fit a terminal."""

NO_VALUE = "-"


def words(explanation: Explanation) -> tuple[str, ...]:
    """What the plan is, in sentences for someone who sees one for the first time."""
    plan = explanation.plan
    pipeline = any(group.config.pp > 1 for group in plan.replicas)
    idle = plan.num_devices - plan.used_devices
    kinds = "; ".join(_kind(group) for group in plan.replicas)
    first = (
        f"The {plan.num_devices} devices hold {plan.num_replicas} "
        f"{'copies' if plan.num_replicas > 1 else 'copy'} (replicas) of {plan.model}: {kinds}."
        + (f" {idle} devices stay idle." if idle else "")
    )
    second = (
        "tp is how many devices share every layer"
        + (", pp how many stages the layers are cut into" if pipeline else "")
        + ", and the last word what is recomputed to save memory. A sequence only fits a replica that holds its padded "
        "length; the step ends when the last replica is done."
    )
    if plan.predicted is None:
        return first, second
    made = plan.predicted
    third = (
        f"Planner {plan.planner} expected {in_seconds(made.step_s)} a step when it made the plan, and had proven that "
        f"no plan takes less than {in_seconds(made.bound_s)}."
    )
    return first, second, third


def _kind(group: ReplicaGroup) -> str:
    devices = group.config.num_devices
    number = f"{devices} devices" if devices > 1 else "one device"
    each = " each" if group.count > 1 else ""
    return f"{group.count} of {group.config} on {number}{each}, up to {group.capacity_tokens} tokens at a time"


def verdict(explanation: Explanation) -> str:
    """The step time against the proven bound."""
    said = f"A step of the expected batch ({sum(explanation.counts.values())} sequences) takes " + in_seconds(
        explanation.step_s
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
    parts += [Text(), Text(verdict(explanation)), Text(), replica_table(explanation), Text()]
    parts.append(Text("What limits the step", style="bold"))
    bullets = Table.grid(padding=(0, 1))
    for sentence in explanation.limits:
        bullets.add_row(" -", Text(sentence))
    parts.append(bullets)
    if explanation.alternatives:
        parts += [Text(), alternatives_table(explanation)]
    return Group(*parts)


def replica_table(explanation: Explanation) -> Table:
    """Seconds of each replica by padded length."""
    ends = length_ranges(explanation)
    start_up = any(replica.filling_s + replica.fixed_s for replica in explanation.replicas)
    table = Table(title="Seconds of a step by padded length (tokens) of the sequences", box=SIMPLE_HEAD)
    table.add_column("replica", no_wrap=True)
    for name in [f"to {end}" for end in ends] + ["start up"] * start_up + ["total", "waits"]:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for replica in explanation.replicas:
        cells = by_range(replica, ends) + [replica.filling_s + replica.fixed_s] * start_up
        table.add_row(
            replica.name,
            *(f"{cell:#.3g}" if cell else NO_VALUE for cell in cells),
            f"{replica.seconds:#.3g}",
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
    for name in ("what", "plan"):
        table.add_column(name)
    table.add_column("step (s)", justify="right")
    table.add_column("against this plan", justify="right")
    for other in explanation.alternatives:
        table.add_row(other.change, *alternative_cells(explanation, other))
    return table


def alternative_cells(explanation: Explanation, other: Alternative) -> tuple[str, str, str]:
    """(plan or why there is none, seconds, difference to the plan explained)."""
    if other.plan is None or other.step_s is None:
        return f"none: {other.note}", NO_VALUE, NO_VALUE
    same = other.plan.replicas == explanation.plan.replicas and other.plan.num_devices == explanation.plan.num_devices
    difference = f"{other.step_s / explanation.step_s - 1:+.1%}"
    return str(other.plan), f"{other.step_s:#.3g}", "the same plan" if same else difference


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
        table.add_row(name, f"{busy:#.3g}", f"{idle:.1%}")
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
