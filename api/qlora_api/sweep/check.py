"""Checks of a sweep that a schema cannot express: each value in the job that it makes, and the size of a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice, product
from typing import Any

from qlora_api.errors import FieldError, ManifestError
from qlora_api.sweep.parameters import Parameter, ValueKind, text_of
from qlora_api.sweep.spec import AlgorithmType, QLoRASweepSpec
from qlora_api.sweep.trials import with_values

DIVIDING_FIELDS = ("training.globalBatchSize", "training.microBatchSize")
"""Most numbers of a range would not divide the batch."""
MAX_COMBINATIONS = 1024
"""Combinations of values that are checked; takes about half a second."""


def sweep_errors(spec: QLoRASweepSpec) -> list[FieldError]:
    """Return the errors of a sweep's parameters, with paths from ``spec`` on."""
    errors = [*_repeated_choices(spec), *_invalid_ranges(spec)]
    if not errors and (together := [*_invalid_combination(spec)]):
        errors += [*_invalid_values(spec)] or together
    return errors or [*_trials_and_combinations(spec)]


def grid_size(spec: QLoRASweepSpec) -> int:
    """Return the number of combinations of all choices."""
    return math.prod(len(p.choices or ()) for p in spec.parameters)


def _trials_and_combinations(spec: QLoRASweepSpec) -> Iterator[FieldError]:
    """Check that a grid has room for its combinations, and that draws from choices alone need not be repeated."""
    if any(parameter.choices is None for parameter in spec.parameters):
        return
    size, most = grid_size(spec), spec.max_trials
    if spec.algorithm.type is AlgorithmType.GRID and size > most:
        sizes = " × ".join(str(len(p.bounds)) for p in spec.parameters)
        yield FieldError("spec.maxTrials", most, f"must be at least {size}, the combinations of the grid ({sizes})")
    if spec.algorithm.type is not AlgorithmType.GRID and size < most:
        allowed = f"must be at most {size}, the combinations of the choices: no trial is repeated"
        yield FieldError("spec.maxTrials", most, allowed)


def _repeated_choices(spec: QLoRASweepSpec) -> Iterator[FieldError]:
    for index, parameter in enumerate(spec.parameters):
        earlier: list[float | str] = []
        for number, choice in enumerate(parameter.choices or ()):
            if (value := parameter.comparable(choice)) in earlier:
                yield FieldError(f"spec.parameters[{index}].choices[{number}]", text_of(choice), "must not occur twice")
            earlier.append(value)


def _invalid_ranges(spec: QLoRASweepSpec) -> Iterator[FieldError]:
    for index, parameter in enumerate(spec.parameters):
        if parameter.range is None:
            continue
        field = f"spec.parameters[{index}].range"
        if parameter.kind is ValueKind.OTHER:
            yield FieldError(field, parameter.path, "has values without an order: give choices instead")
        elif parameter.path in DIVIDING_FIELDS:
            yield FieldError(field, parameter.path, "must divide the batch: give choices instead")
        elif parameter.kind is ValueKind.INTEGER:
            for name, end in (("min", parameter.range.min), ("max", parameter.range.max)):
                if not float(end).is_integer():
                    yield FieldError(f"{field}.{name}", end, f"must be a whole number, as {parameter.path} is one")


def _values(index: int, parameter: Parameter) -> Iterator[tuple[str, Any]]:
    """Give the manifest's field and the value of each choice, or of both ends of a range."""
    place = f"spec.parameters[{index}]"
    for number, value in enumerate(parameter.bounds):
        yield (f"{place}.range.{('min', 'max')[number]}" if parameter.range else f"{place}.choices[{number}]"), value


def _invalid_values(spec: QLoRASweepSpec) -> Iterator[FieldError]:
    """Check each value by itself, with the template's values of all other fields, for errors of its own field."""
    for index, parameter in enumerate(spec.parameters):
        for field, value in _values(index, parameter):
            for error in _errors_of(spec, {parameter.path: value}):
                if error.field == parameter.path or error.field.startswith(f"{parameter.path}["):
                    yield FieldError(field, value, f"as {parameter.path}: {error.allowed}")


def _invalid_combination(spec: QLoRASweepSpec) -> Iterator[FieldError]:
    """Check each value in some combination, and combinations up to a limit; give the first one that is not valid."""
    paths = [parameter.path for parameter in spec.parameters]
    bounds = [parameter.bounds for parameter in spec.parameters]
    longest = max(len(values) for values in bounds)
    each = (tuple(values[number % len(values)] for values in bounds) for number in range(longest))
    for combination in chain(each, islice(product(*bounds), MAX_COMBINATIONS)):
        values = dict(zip(paths, combination, strict=True))
        if errors := _errors_of(spec, values):
            together = ", ".join(f"{path} {text_of(value)}" for path, value in values.items())
            sentence = f"a trial with {together} is not valid: {errors[0]}"
            yield FieldError("spec.parameters", None, "", sentence=sentence)
            return


def _errors_of(spec: QLoRASweepSpec, values: dict[str, Any]) -> list[FieldError]:
    try:
        with_values(spec.template.spec, values)
    except ManifestError as error:
        return error.errors
    return []
