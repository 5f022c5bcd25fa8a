"""Parameters of a trial that no algorithm has to draw: the combinations of a grid. Imports no Optuna."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice, product
from typing import Any

from qlora_api.sweep.parameters import Parameter, text_of
from qlora_api.sweep.spec import AlgorithmType, QLoRASweepSpec
from qlora_sweep.results import Result

Suggest = Callable[[QLoRASweepSpec, int, Sequence[Result]], Mapping[str, Any]]
"""Returns the value of each parameter by path, from the sweep's spec, the trial's number and the results of the trials
with smaller numbers, all of them."""


class UndrawnError(Exception):
    """The parameters of a trial must be drawn by Optuna, which is not imported here."""


def of_grid(spec: QLoRASweepSpec, number: int, _earlier: Sequence[Result]) -> dict[str, Any]:
    """Return a trial's combination.

    Raises:
        UndrawnError: the algorithm is no grid.

    """
    if spec.algorithm.type is not AlgorithmType.GRID:
        raise UndrawnError
    return combination(spec.parameters, number)


def combination(parameters: Sequence[Parameter], number: int) -> dict[str, Any]:
    """Return a combination of the grid; the last parameter varies fastest."""
    values = next(islice(product(*(p.choices or () for p in parameters)), number, None))
    return dict(zip((p.path for p in parameters), values, strict=True))


def texts_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as a trial records them."""
    return {path: text_of(value) for path, value in values.items()}
