"""Pictures of the documents: dashboards drawn from answers of a Prometheus, and commands on a terminal."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

REPOSITORY = Path(__file__).parents[2]

from docs_pictures.chromium import Chromium, program  # noqa: E402 found by the line above
from docs_pictures.draw import NARROW, WIDE, fitting, picture  # noqa: E402
from docs_pictures.terminal import Session  # noqa: E402
from docs_pictures.terminal import picture as screen  # noqa: E402

BOARDS = sorted((REPOSITORY / "charts" / "qlora-operator" / "dashboards").glob("*.json"))
SVG = "{http://www.w3.org/2000/svg}"
REASONS = ("AdapterRejected", "NonFiniteLoss", "OutOfDeviceMemory", "Stalled", "Unschedulable", "NodeLost", "PeerLost")


class FixedAnswers:
    """Answers everything with a series for each of many reasons, or with nothing."""

    def __init__(self, reasons=REASONS):
        self.reasons = reasons

    def labels(self, reason):
        same = ("job", "namespace", "rank", "component", "section", "verb", "kind", "pod", "sweep", "trial")
        return {"state": "Failed", "reason": reason, **dict.fromkeys(same, reason)}

    def now(self, expression):
        return [{"metric": self.labels(reason), "value": [9.0, "0.5"]} for reason in self.reasons]

    def over_time(self, expression):
        points = [[float(at), str(at / 9)] for at in range(9)]
        return [{"metric": self.labels(reason), "values": points} for reason in self.reasons]


def panels(drawn):
    """Width, height and texts with their places of each panel."""
    for group in ET.fromstring(drawn).iter(f"{SVG}g"):
        card = group.find(f"{SVG}rect")
        yield float(card.get("width")), float(card.get("height")), list(group.iter(f"{SVG}text"))


@pytest.mark.parametrize("cell", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("board", BOARDS, ids=lambda p: p.stem)
def test_nothing_of_a_panel_is_cut_off_or_beside_it(board, cell):
    for width, height, texts in panels(picture(json.loads(board.read_text()), FixedAnswers(), cell=cell)):
        for text in texts:
            assert -1 <= float(text.get("y")) <= height, text.text
            start, letters = float(text.get("x")), 6.2 * len(text.text)
            if text.get("class") == "soft" and text.get("text-anchor") is None:
                assert start + letters <= width, text.text
            assert 0 <= start <= width, text.text


def test_every_series_has_its_name_below_the_curves():
    board = json.loads(next(p for p in BOARDS if p.stem == "fleet").read_text())
    drawn = picture(board, FixedAnswers(), ("Attempts that ended",), NARROW)
    assert all(f">{reason}<" in drawn for reason in REASONS)


def test_what_failed_is_red_and_what_runs_is_green():
    board = json.loads(next(p for p in BOARDS if p.stem == "fleet").read_text())
    drawn = picture(board, FixedAnswers(("Stalled",)), ("Jobs by state and reason",))
    assert re.findall(r'curve (l\d)"', drawn) == ["l6"]


def test_panels_without_figures_say_what_is_missing():
    for board in BOARDS:
        drawn = picture(json.loads(board.read_text()), FixedAnswers(()))
        if board.stem != "fleet":
            assert "No GPU" in drawn
    assert "exporter is not scraped" in picture(json.loads(BOARDS[1].read_text()), FixedAnswers(()))


def test_large_letters_shrink_to_what_there_is_room_for():
    assert fitting("0%", 100, 30) == 30
    assert fitting("12.34 min left", 100, 30) < 15


def test_a_command_is_shown_with_its_colours_and_without_what_was_there_before_its_last_screen():
    said = Session(["printf", r"before\033[?1049l\033[31mred\033[0m plain\r\n\033[2Knext"], {}).end()
    drawn = screen([("printf", said)])
    words = "".join(ET.fromstring(drawn).itertext())
    assert "before" not in words
    assert all(word in words for word in ("$", "printf", "red", "plain", "next"))
    assert "#ff7870" in drawn
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")


def test_a_page_is_shot_whole_and_printed(tmp_path):
    path = program()
    if path is None:
        pytest.skip("no Chromium on PATH")
    (tmp_path / "page.html").write_text("<!doctype html><body style='margin:0'><div style='height:1234px'>long</div>")
    with Chromium(path) as browser:
        browser.shoot(tmp_path / "page.html", tmp_path / "page.png", 300, dark=True)
        browser.print_page(tmp_path / "page.html", tmp_path / "page.pdf")
    shot = (tmp_path / "page.png").read_bytes()
    assert (int.from_bytes(shot[16:20]), int.from_bytes(shot[20:24])) == (300, 1234)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
