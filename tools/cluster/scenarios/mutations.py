"""Random changes of a valid QLoRAJob, drawn from the schema that the API server checks. Seeded: all runs are alike."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]
Path = tuple[str | int, ...]
MISSING = object()
HUGE = 10**30
ODD_TEXTS = ("\u0000", "\u202eevil", "é" * 3, "🙂", "a\nb", " ", "../..", "${HOME}", "{{ 7 * 7 }}", "-rf", "A", "%s")
DECIMALS = ("0", "1", "0.5", "1e400", "1e-400", "9" * 32, "-1", ".5", "1e", "Infinity", "NaN", "0x1", "1_0", "00.10")


@dataclass(frozen=True)
class Mutation:
    """A valid manifest with one thing changed."""

    path: Path
    value: Any
    manifest: dict[str, Any]

    @property
    def field(self) -> str:
        """Name of the field, without places in lists."""
        return next(str(part) for part in reversed(self.path) if isinstance(part, str))

    def __str__(self) -> str:
        shown = "taken away" if self.value is MISSING else repr(self.value)
        return f"{'.'.join(map(str, self.path))}: {shown if len(shown) < 80 else shown[:80] + '…'}"


def mutations(schema: Schema, base: dict[str, Any], count: int, seed: int) -> Iterator[Mutation]:
    """Draw changes of ``base``, each of another field or to another value.

    Args:
        schema: of the whole object, as in a CustomResourceDefinition.
        base: a valid manifest with as many fields as possible, since what is not there cannot be wrong inside.
        count: how many.
        seed: of the draw.

    """
    draw = random.Random(seed)
    places = list(_places(schema["properties"]["spec"], ("spec",)))
    seen: set[str] = set()
    while len(seen) < count:
        path, node = draw.choice(places)
        value = draw.choice(_values(node, draw))
        manifest = _changed(base, path, value)
        if manifest is None or repr((path, value)) in seen:
            continue
        seen.add(repr((path, value)))
        yield Mutation(path, value, manifest)


def _places(node: Schema, path: Path) -> Iterator[tuple[Path, Schema]]:
    yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from _places(inner, (*path, name))
    if "items" in node:
        yield from _places(node["items"], (*path, 0))


def _values(node: Schema, draw: random.Random) -> list[Any]:
    of_type: dict[str, Callable[[Schema, random.Random], list[Any]]] = {
        "integer": _integers,
        "string": _texts,
        "boolean": lambda *_: [True, False, "true", 1, "yes"],
        "object": _objects,
        "array": _lists,
    }
    return [*of_type[node["type"]](node, draw), None, MISSING]


def _integers(node: Schema, _: random.Random) -> list[Any]:
    low, high = node.get("minimum", 0), node.get("maximum", max(node.get("enum", [0])))
    return [low, low - 1, high, high + 1, HUGE, -HUGE, 1.5, str(high), True, [low], {}, ""]


def _texts(node: Schema, draw: random.Random) -> list[Any]:
    if "enum" in node:
        chosen = draw.choice(node["enum"])
        return [chosen, chosen.lower(), chosen + "x", "", 0, [chosen]]
    longest, least = node["maxLength"], node.get("minLength", 0)
    texts = ["a" * longest, "a" * (longest + 1), "é" * (longest + 1), "a" * least, "", draw.choice(ODD_TEXTS)]
    if node.get("pattern", "").startswith("^[0-9]"):
        texts += draw.sample(DECIMALS, 3)
    if any("://" in str(rule) for rule in node.get("x-kubernetes-validations", ())):
        texts += [
            "/local/path",
            "http://x/y",
            "hf://",
            "s3://" + "ü" * 1019,
            "pvc://Bad_Claim/x",
            "pvc://a.b-c/d",
            "pvc://",
        ]
    return [*texts, 7, 0.5, True, {}, [draw.choice(ODD_TEXTS)]]


def _objects(node: Schema, draw: random.Random) -> list[Any]:
    if "additionalProperties" in node:
        most = node["maxProperties"]
        return [
            {},
            {f"k{i}": "v" for i in range(most)},
            {f"k{i}": "v" for i in range(most + 1)},
            {draw.choice(ODD_TEXTS): "v"},
            {"key": draw.choice(ODD_TEXTS)},
            {"key": "v" * (node["additionalProperties"]["maxLength"] + 1)},
            {"key": 7},
            {"": ""},
            "text",
            [],
        ]
    return [{"unknownField": 1}, {}, "text", 7, [], [{}], True]


def _lists(node: Schema, draw: random.Random) -> list[Any]:
    item = draw.choice(_values(node["items"], draw)[:-1])
    return [[], [item], [item] * node["maxItems"], [item] * (node["maxItems"] + 1), "text", {}, 7]


def _changed(base: dict[str, Any], path: Path, value: Any) -> dict[str, Any] | None:
    """The manifest with the change; None where the place is not there. An unknown field is added, not put instead."""
    manifest = copy.deepcopy(base)
    here: Any = manifest
    for part in path[:-1]:
        try:
            here = here[part]
        except (KeyError, IndexError):
            return None
    last = path[-1]
    if isinstance(last, int):
        if not here:
            return None
    elif value == {"unknownField": 1}:
        value = {**here.get(last, {}), **value}
    if value is MISSING:
        if isinstance(last, str) and last not in here:
            return None
        del here[last]
    else:
        here[last] = value
    return manifest
