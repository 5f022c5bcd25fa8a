"""Code and documents use the field's own words: docstrings begin with a verb or noun, and retired terms stay away."""

from __future__ import annotations

import ast
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUESTION = re.compile(r"(What|Of|How|Whether|Where|When|Why|Who|Which|In which)\b")
HISTORY = ("CHANGELOG.md", "docs/decisions/")
"""Decisions and changes of the past keep the words of their time."""

RETIRED = {
    r"\bsaid\([^)]*holds=": "with_condition(…, is_true=)",
    r"\bwhy_waiting\b": "pending_reason",
    r"\blast[ _]words?\b": "termination message",
    r"\bSeen[A-Z]\w*|\bsee_pod\b|\bseen\.py\b": "Observed…, PodSnapshot",
    r"\bMeeting\b|\bFarewell\b|\bsay goodbye\b": "Rendezvous, ExitRecord",
    r"\bclass (Place|Board|Side)\b": "WorkerIdentity, MetricsRecorder, Split",
    r"\bcanary\b|\brehearsal\b": "probe_peak_memory",
    r"\bfirst_look\b|\btake_stock\b|\blook_around\b": "initial_sync, list_jobs, refresh_capabilities",
    r"\bFREE_OF_CHARGE\b": "UNCOUNTED_REASONS",
    r"\bFieldMistake\b|\b[Mm]istakes?\b(?!\")": "FieldError, error",
    r"\b_?must_(fit|suit)\b": "check_fits, check_…",
    r"\bdealing\.py\b|\bdef deal\(": "balance_sequences",
    r"\bdoomed\b|\bdef ends\(\) -> Iterator": "jobs_to_delete, exit_with_code()",
    r"\b(lean|learned|words|yamls)\.py\b": "kopf_import.py, memory_correction.py, units.py, kubernetes_yaml.py",
    r"\bHold a published\b": "Verify a published",
    r"Attempts after the first that crashes": "Maximum number of restarts after failures",
}


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and not name.startswith(HISTORY)]
    return [ROOT / name for name in names if ROOT / name != Path(__file__).resolve() and (ROOT / name).is_file()]


def docstrings(node: ast.AST) -> list[str]:
    """Return the docstring of a module, class or function, and those under the assignments in its body."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    documented = [
        statement.value.value
        for before, statement in pairwise(node.body)
        if isinstance(before, ast.Assign | ast.AnnAssign)
        and isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]
    return [ast.get_docstring(node) or "", *documented]


def test_no_docstring_begins_with_a_question_word():
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in tracked("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for text in docstrings(node)
        if QUESTION.match(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("term", RETIRED)
def test_a_retired_term_stays_away(term):
    pattern, found = re.compile(term), []
    for path in tracked("*.py", "*.md", "*.yaml"):
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines if pattern.search(line)
        ]
    assert not found, f"use {RETIRED[term]}:\n" + "\n".join(found)


ONE_MEANING = {
    "Executed": "an object that leaves a trace where it is unpickled",
    "FakeApi": "a stand-in for a client of the Kubernetes API, with the calls that a test needs",
    "Handler": "a handler of http.server, of a server that a test or tool starts",
    "Hub": "a stand-in for the Hugging Face Hub",
    "PanicException": "the exception that PyO3 raises for a panic",
}


def test_no_class_name_has_two_meanings():
    where: dict[str, list[str]] = {}
    for path in tracked("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    twice = {name: paths for name, paths in where.items() if len(paths) > 1 and name not in ONE_MEANING}
    assert not twice
