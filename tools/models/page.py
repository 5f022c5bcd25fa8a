"""The page of model types: docs/reference/models.md."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from typing import Any

HEADING = """<!-- Written by 'make models'. Do not edit. -->

# Model types

All causal and composite language models of transformers {transformers}, each as a toy of random weights that
`make models` shrinks from the type's default configuration, planned, prepared, trained for two steps, published, loaded
by PEFT {peft} onto the 16-bit base, and merged, with the trainer's own functions. {counts}.

- *Weights*, *adapter*: bytes that are planned, as a share of those measured, less one.
- *Rows*: packed end to end in one sequence, or one by one where the type mixes them; in brackets the largest difference
  of a token's loss from that of its row alone, in nats.
- *Reload*: distance of the logits of PEFT's model from the trained one's, as a share of their deviation (median token);
  *merge*: of the merged model from what PEFT merges, rounded to bf16; *effect*: of the trained model from the base.

A type that is refused ends in Prepare, with the sentence beside it. A base of a type that is not here, since
it is newer, takes the same way: layers, experts and routers are found by structure.
"""
SUCCEEDED, REFUSED = "Succeeded", "Refused"


def page(results: list[dict[str, Any]]) -> str:
    """Return the page for the results of all types."""
    results = sorted(results, key=lambda r: r["type"])
    counts = Counter(r["outcome"] for r in results)
    words = ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.most_common())
    heading = HEADING.format(transformers=version("transformers"), peft=version("peft"), counts=words.capitalize())
    parts = [heading, *_measured([r for r in results if r["outcome"] == SUCCEEDED])]
    others = [r for r in results if r["outcome"] not in (SUCCEEDED, REFUSED)]
    for title, found in (("Refused", [r for r in results if r["outcome"] == REFUSED]), ("Other", others)):
        if found:
            parts += [f"\n## {title}\n", "|Type|Outcome|", "|-|-|", *map(_line, found)]
    return "\n".join(parts) + "\n"


def _measured(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "\n## Succeeded\n",
        "|Type|Weights|Adapter|Rows|Tensors that learn|Effect|Reload|Merge|",
        "|-|-|-|-|-|-|-|-|",
    ]
    for result in results:
        m = result["measured"]
        rows = "one by one" if m["rowByRow"] else f"packed ({m['apart']:.0e})"
        lines.append(
            f"|{result['type']}|{m['weights']:+.3%}|{m['adapter']:+.3%}|{rows}|{m['tensors']}|{m['effect']:.2f}"
            f"|{m['reload']:.0e}|{m['merge']:.3f}|"
        )
    return lines


def _line(result: dict[str, Any]) -> str:
    words = result["sentence"].replace("|", "\\|").replace("<", "&lt;")
    return f"|{result['type']}|{'' if result['outcome'] == REFUSED else result['outcome'] + ': '}{words}|"
