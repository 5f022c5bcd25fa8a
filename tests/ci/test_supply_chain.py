"""Test that installation, images and releases hold to the pins."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fixtures import skip_unless_ci
from services.binaries import ToolMissingError, find_or_build
from services.images import SOURCES
from services.tools import ACTIONLINT

REPOSITORY = Path(__file__).parents[2]
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yaml"))
ANY_HASH = "0" * 64


def test_every_pin_has_a_hash_and_no_index_is_named():
    pins = re.findall(r"^(\S+)==.*((?:\n    --hash=sha256:[0-9a-f]{64}.*)*)", CONSTRAINTS, re.MULTILINE)
    assert len(pins) > 100
    assert [name for name, hashes in pins if not hashes] == []
    assert "://" not in CONSTRAINTS
    assert "index" not in CONSTRAINTS


@pytest.mark.parametrize(
    ("pins", "error"),
    [
        pytest.param("harmless==1 --hash=sha256:{hash}", None, id="as-pinned"),
        pytest.param("harmless==1 --hash=sha256:" + ANY_HASH, "Hash mismatch for `harmless==1`", id="another-file"),
        pytest.param("", "all requirements must be pinned|must have a hash", id="not-pinned"),
    ],
)
def test_the_installation_takes_no_file_but_those_of_the_constraints(tmp_path, pins, error):
    wheel = write_wheel(tmp_path / "wheels")
    (tmp_path / ".ci").mkdir()
    shutil.copy2(REPOSITORY / ".ci" / "install", tmp_path / ".ci")
    (tmp_path / "constraints.txt").write_text(pins.format(hash=hashlib.sha256(wheel.read_bytes()).hexdigest()) + "\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "project"\nversion = "1"\ndependencies = ["harmless"]\n'
        '[dependency-groups]\nbuild = []\n[build-system]\nrequires = []\nbuild-backend = "none"\n'
    )
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    shutil.copy2(Path(sys.executable).parent / "uv", venv / "bin")
    alone = {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(wheel.parent), "UV_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [".ci/install", sys.executable, venv],
        cwd=tmp_path,
        env={**os.environ, **alone, "UV_DEFAULT_INDEX": "none", "UV_INDEX": "none", "SSL_CERT_FILE": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    installed = bool(list(venv.glob("lib/*/site-packages/harmless.py")))
    assert installed is (error is None), done.stderr
    assert error is None or re.search(error, done.stderr), done.stderr


def write_wheel(folder: Path) -> Path:
    folder.mkdir()
    wheel, info = folder / "harmless-1-py3-none-any.whl", "harmless-1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("harmless.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: harmless\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_the_images_are_built_on_a_base_named_by_its_digest_and_from_files_with_hashes():
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE)
    assert "FROM ${BASE} AS python" in dockerfile
    installs = re.findall(r"pip install .*", dockerfile)
    assert len(installs) == 3
    assert all("--require-hashes" in install for install in installs[:2])  # uv itself, the operator
    assert "UV_REQUIRE_HASHES=1" in dockerfile  # the trainer, but for another build of torch


def test_every_folder_that_an_image_copies_is_sent_to_the_build():
    copied = {*re.findall(r"^COPY (\w+/\w+) ", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)}
    sent = {line.removeprefix("!") for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if "/" in line}
    assert copied == sent - {"**/__pycache__"} == {folder for folders in SOURCES.values() for folder in folders}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_foreign_actions_by_commit(workflow):
    used = re.findall(r"uses: (\S+)(.*)", workflow.read_text())
    foreign = [(action, comment) for action, comment in used if not action.startswith("./")]
    assert foreign
    for action, comment in foreign:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}: say which version that is"


def test_workflows_are_valid():
    try:
        actionlint = find_or_build(ACTIONLINT)
    except ToolMissingError as error:
        skip_unless_ci(str(error))
    done = subprocess.run([actionlint, "-no-color", *WORKFLOWS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_release_has_the_notes_of_its_version_alone(tmp_path):
    for name in (".ci/release-notes", "pyproject.toml", "charts/qlora-operator/Chart.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, tmp_path / name)
    version = re.search(r'^version = "(.*)"', (tmp_path / "pyproject.toml").read_text(), re.MULTILINE)[1]
    log = tmp_path / "CHANGELOG.md"

    def notes(of):
        command = [tmp_path / ".ci" / "release-notes", of]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else done.stderr

    log.write_text(
        f"# Changelog\n\n## [Unreleased]\n\n- later\n\n## [{version}] - today\n\n- this\n\n## [0.0.1]\n\n- old\n"
    )
    assert notes(version) == "- this\n"
    assert "pyproject.toml's version" in notes("9.9.9")
    log.write_text("# Changelog\n\n## [Unreleased]\n\n- later\n")
    assert f'no section "## [{version}]"' in notes(version)
