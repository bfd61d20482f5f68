"""How much of each sub-layer stays, so that the model loses least within a budget.

What each number of units that stay costs, and loses, is a table for each sub-layer; one entry is chosen of each. That
is the multiple-choice knapsack problem, solved by dynamic programming over costs in equal steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STEPS = 4096  # of the budget


def allocate(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: float) -> list[int] | None:
    """The places of one entry of each table, of the least sum of losses whose costs are within the budget.

    Costs count in steps of the budget; what is returned is within the budget as they are.

    Args:
        losses: for each sub-layer the loss of each choice.
        costs: for each sub-layer the cost of each choice, not negative.

    Returns:
        None where even the cheapest choices cost more.
    """
    cheapest = [int(cost.argmin()) for cost in costs]
    if _total(costs, cheapest) > budget:
        return None
    if budget <= 0:
        return cheapest
    best = np.zeros(_STEPS + 1)  # least loss of the sub-layers so far with at most so many steps
    picks = []
    for loss, cost in zip(losses, costs, strict=True):
        needed = np.floor(cost / budget * _STEPS + 1e-9).astype(np.int64)
        following, pick = np.full(_STEPS + 1, np.inf), np.zeros(_STEPS + 1, dtype=np.int64)
        for choice in np.flatnonzero(needed <= _STEPS):
            size = needed[choice]
            total = best[: _STEPS + 1 - size] + loss[choice]
            better = total < following[size:]
            following[size:][better] = total[better]
            pick[size:][better] = choice
        best = following
        picks.append((pick, needed))
    for steps in range(_STEPS, -1, -1):  # few: what was rounded down is below a step each
        if not np.isfinite(best[steps]):
            break
        chosen, left = [], steps
        for pick, needed in reversed(picks):
            chosen.append(int(pick[left]))
            left -= needed[chosen[-1]]
        if _total(costs, chosen := chosen[::-1]) <= budget:
            return chosen
    return cheapest


def _total(costs: Sequence[np.ndarray], chosen: Sequence[int]) -> float:
    return float(sum(cost[choice] for cost, choice in zip(costs, chosen, strict=True)))
