"""Measures configs round by round: as many side by side as there are devices for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from planner.config_cost import ConfigCost
from planner.plan import ParallelConfig
from profiling.ahead import Searches
from profiling.config_cost import Searched, time_configs
from profiling.grid import side_by_side
from profiling.measure import Setup
from profiling.memory import DoesNotFitError
from profiling.packed import search_packed, time_packed
from profiling.table import Keep


def rounds_of(setup: Setup, configs: Sequence[ParallelConfig]) -> Sequence[Sequence[tuple[ParallelConfig, int]]]:
    """What is measured at a time, and from which device on: as much as there are devices for.

    One by one on simulated devices, whose host's cores are shared out otherwise (`HostShare`).
    """
    if setup.cores is not None:
        return [[(config, 0)] for config in configs]
    return side_by_side(configs, num_devices=len(setup.devices))


def measure_round(
    setup: Setup, searches: Searches[Searched], first_devices: Mapping[ParallelConfig, int], keep: Keep
) -> None:
    """Keeps the costs of a round's configs, by where their devices begin, or why one is left out."""
    found: list[Searched] = []
    for config in first_devices:
        try:
            found.append(searches.take(config))
        except DoesNotFitError as error:
            keep(config, str(error))
    if not setup.packed:
        time_configs(setup, found, lambda cost: keep(cost.config, cost))
        return
    padded: list[ConfigCost] = []
    time_configs(setup, found, padded.append)
    found.clear()  # and with them the weights on the devices
    _measure_packed(setup, padded, first_devices, keep)


def _measure_packed(
    setup: Setup, padded: Sequence[ConfigCost], first_devices: Mapping[ParallelConfig, int], keep: Keep
) -> None:
    """Keeps the costs of configs whose padded ones are known, packed ones with them."""
    by_config = {cost.config: cost for cost in padded}
    found = []
    for config, cost in by_config.items():
        searched = search_packed(setup, config, cost.capacity_tokens, first_device=first_devices[config])
        if searched is None:
            keep(config, cost)
        else:
            found.append(searched)
    time_packed(
        setup, found, lambda config, packed: keep(config, dataclasses.replace(by_config[config], packed=packed))
    )
