"""The search of all experiments: the best of every grid, then what it does with other seeds."""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from benchmarks.engine.config import Must

SEARCH_SEED = 1000  # the first seed of the search; those that are reported start from 0
SEEDS = Must(
    f"be a whole number from 2 to {SEARCH_SEED}, the first seed of the search",
    lambda x: 2 <= x <= SEARCH_SEED,
)

Key = TypeVar("Key", bound=Hashable)
Setting = TypeVar("Setting", bound=Hashable)


class Found(NamedTuple):
    """What a search found."""

    chosen: dict[Any, Any]  # of every grid, a setting
    seen: dict[Any, Any]  # by setting, what the search made of it; none if there was no choice
    final: dict[Any, Any]  # by setting that was chosen, what became of it


def seeds_of(config: Any, searching: bool) -> range:
    """Those of the search, or those that are reported."""
    if searching:
        return range(SEARCH_SEED, SEARCH_SEED + config.search_seeds)
    return range(config.seeds)


def search(
    grids: Mapping[Key, Sequence[Setting]],
    run: Callable[[list[Setting], bool], Mapping[Setting, Any]],
    choose: Callable[[Key, Mapping[Setting, Any]], Setting],
) -> Found:
    """Runs all settings, and those that are chosen again.

    ``run`` takes settings, and whether they are searched or reported; ``choose`` takes a grid's key
    and what ``run`` made of its settings. A grid of one setting is not searched, if all are.
    """
    seen: dict[Setting, Any] = {}
    if max(map(len, grids.values())) > 1:
        seen |= run(list(dict.fromkeys(itertools.chain(*grids.values()))), True)
    chosen = {
        key: choose(key, {s: seen[s] for s in grid}) if len(grid) > 1 else grid[0]
        for key, grid in grids.items()
    }
    return Found(chosen, seen, dict(run(list(dict.fromkeys(chosen.values())), False)))
