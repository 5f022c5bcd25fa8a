"""Lines of text that never cut a path."""

import io

from rich.console import Console

from qlora_cli.text.paragraphs import LabelledLines, Paragraph

PATH = "/work/" + "a-long-folder-name/" * 6 + "checkpoints"


def shown(renderable, width):
    out = Console(file=io.StringIO(), width=width, markup=False)
    out.print(renderable, crop=False)
    return out.file.getvalue().splitlines()


def test_a_path_that_is_longer_than_the_screen_is_whole_on_a_line_of_its_own():
    rows = [("Model", "small"), ("Checkpoints", f"every 50 steps and every 10 min, the newest 2 kept, in {PATH}")]
    assert shown(LabelledLines(rows), 60) == [
        "Model         small",
        "Checkpoints   every 50 steps and every 10 min, the newest 2",
        "              kept, in",
        f"              {PATH}",
    ]


def test_a_paragraph_is_folded_between_words():
    assert shown(Paragraph(f"cannot read {PATH} because\nof this"), 40) == ["cannot read", PATH, "because", "of this"]
