"""Figures that a guide takes from the memory model and from a generated page are still theirs."""

from __future__ import annotations

import json
import re

import pytest

from docs.blocks import REPOSITORY, blocks_of

GUIDE = REPOSITORY / "docs" / "guides" / "choose-settings.md"
GIB = 1 << 30


def rows(heading):
    """Cells of the tables of a section."""
    section = GUIDE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]


@pytest.fixture
def components(tmp_path):
    """Return what 'qlora plan' says of the guide's base, by component."""
    from qlora_cli.memory_plan import plan_job

    block = next(b for b in blocks_of(GUIDE) if "config.json" in b.text)
    config = tmp_path / "config.json"
    config.write_text(re.search(r"^\{.*?\}$", block.text, re.MULTILINE | re.DOTALL)[0])

    def ask(*settings):
        options = plan_job.PlanOptions(gpu="a100-80gb", model_config=config)
        answered = plan_job.answer(REPOSITORY / "examples" / "cluster" / "one-gpu.yaml", options, settings)
        return json.loads(json.dumps(plan_job.as_dict(answered)))["memory"]["components"]

    return ask


@pytest.mark.parametrize("rank", [8, 16, 64, 256])
def test_a_ranks_memory(rank, components):
    found = components(f"lora.rank={rank}")
    shown = next(row for row in rows("Rank") if row[0] == str(rank) and row[1].endswith(" M"))
    assert shown[1] == f"{found['adapterWeights'] / 4 / 1e6:.1f} M"
    learned = sum(found[name] for name in ("adapterWeights", "gradients", "optimizerState"))
    assert shown[2] == f"{learned / GIB:.1f} GiB"


@pytest.mark.parametrize(("kind", "first"), [("None", "16 bit (`None`)"), ("INT8", "`INT8`"), ("NF4", "`NF4`, `FP4`")])
def test_a_quantizations_memory(kind, first, components):
    found = components(f"quantization.type={kind}")
    names = ("quantizedWeights", "quantizationConstants", "unquantizedWeights")
    shown = next(row for row in rows("Quantization") if row[0].startswith(first) and row[1].endswith("GiB"))
    assert shown[1] == f"{sum(found.get(name, 0) for name in names) / GIB:.1f} GiB"


def test_losses_by_quantization_are_those_of_the_fidelity_page():
    page = (REPOSITORY / "docs" / "fidelity.md").read_text()
    measured = [row for row in rows("Quantization") if re.fullmatch(r"\d\.\d{4}", row[1])]
    assert len(measured) == 4
    for row in measured:
        assert all(f"{cell.removesuffix(' %')}" in page for cell in row[1:] if cell), row
