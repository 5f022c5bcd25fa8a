"""The quickstart's data at toy size: what becomes a row, what is held out, and that nothing leaks."""

import ast
import importlib
import json
import warnings

import pytest

DOCUMENTED = '''"""About the module."""
import os


class Box:
    """A box."""

    def put(self, thing, *, gently: bool = True) -> None:
        """Put a thing in.

        It stays there.
        """
        # thump
        self.thing = thing

    def empty(self):
        """Only a docstring here, and no more."""


async def wait(seconds=1):
    """Wait for some
    seconds."""
    return os.name
'''


@pytest.fixture
def library(tmp_path):
    """Make a folder of modules, given by name and source, as the standard library is one."""

    def make(**sources):
        for name, source in sources.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return importlib.import_module("stdlib_rows").read_modules(tmp_path)

    return make


@pytest.fixture
def rows():
    return importlib.import_module("stdlib_rows")


def function(name, summary):
    return f'def {name}(x):\n    """{summary}"""\n    return x\n'


def held_out_names(rows, count):
    """Names that fall on the held-out side, and as many that do not."""
    names = [f"module{i}" for i in range(200)]
    out = [n for n in names if rows.Module(n, "", ast.Module([], [])).held_out]
    kept = [n for n in names if n not in out]
    return out[:count], kept[:count]


def test_rows_are_signatures_and_first_paragraphs(library, rows):
    [module] = library(box=DOCUMENTED)
    found = rows.extract([module])
    assert [(r.prompt, r.completion) for r in (*found.train, *found.eval)] == [
        (
            "class Box:\n    def put(self, thing, *, gently: bool=True) -> None:",
            '\n        """Put a thing in."""',
        ),
        ("class Box:\n    def empty(self):", '\n        """Only a docstring here, and no more."""'),
        ("async def wait(seconds=1):", '\n    """Wait for some seconds."""'),
    ]


@pytest.mark.parametrize(
    "summary",
    [
        pytest.param("Short.", id="too-short"),
        pytest.param("long " * 50, id="too-long"),
        pytest.param("f(1) >>> 2 and so on", id="an-example"),
        pytest.param(r"Has a \\ backslash in it", id="needs-escapes"),
    ],
)
def test_what_says_little_or_cannot_be_quoted_is_no_row(library, rows, summary):
    found = rows.extract(library(m=function("f", summary)))
    assert found.train == found.eval == ()


def test_pretraining_text_is_code_without_docstrings(library, rows):
    [module] = library(box=DOCUMENTED)
    text = rows.without_docstrings(module)
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [n for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)]
    assert "# thump" in text
    assert "return os.name" in text


def test_held_out_modules_are_in_no_other_part(library, rows):
    out, kept = held_out_names(rows, 3)
    modules = library(**{n: function(n, f"Say what {n} is.") for n in (*out, *kept)})
    found = rows.extract(modules)
    text = "".join(rows.pretraining_texts(modules))
    assert {r.prompt for r in found.eval} == {f"def {n}(x):" for n in out}
    assert {r.prompt for r in found.train} == {f"def {n}(x):" for n in kept}
    assert all(f"def {n}(x)" in text for n in kept)
    assert not any(n in text for n in out)


def test_held_out_row_that_training_has_too_is_dropped(library, rows):
    [out], [kept] = held_out_names(rows, 1)
    same = function("same", "Do the same thing.") + function("same", "Do the same thing.")
    found = rows.extract(library(**{out: same + function("other", "Do the other thing."), kept: same}))
    assert [r.prompt for r in found.train] == ["def same(x):"]
    assert [r.prompt for r in found.eval] == ["def other(x):"]


@pytest.mark.parametrize("twins", [("decimal", "_pydecimal"), ("io", "_pyio"), ("json.decoder", "_json.decoder")])
def test_twins_fall_on_the_same_side(rows, twins):
    nothing = ast.Module([], [])
    families = [
        [part.removeprefix("_py").strip("_") for part in rows.Module(name, "", nothing).name.split(".")]
        for name in twins
    ]
    assert families[0] == families[1]
    assert len({rows.Module(name, "", nothing).held_out for name in twins}) == 1


def test_files_that_do_not_parse_and_tests_are_skipped(library):
    modules = library(good="x = 1\n", template="def {name}(): pass\n", test__test_good="y = 2\n")
    assert [m.name for m in modules] == ["good"]


def test_the_real_library_splits_without_leaks(rows):
    modules = rows.read_modules()
    found = rows.extract(modules)
    assert len(found.train) > 3000
    assert 0.05 < len(found.eval) / len(found.train) < 0.25
    assert not {r.completion for r in found.train} & {r.completion for r in found.eval}
    assert not {r.prompt for r in found.train} & {r.prompt for r in found.eval}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tokenizer_and_base_come_back_from_disk(library, rows, tmp_path, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, while they are imported
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        small_base = importlib.import_module("small_base")
    text = rows.without_docstrings(library(box=DOCUMENTED)[0]) * 40
    recipe = small_base.Recipe(vocabulary=300, hidden=64, intermediate=128, layers=1, heads=1, steps=6, length=32)
    tokenizer = small_base.train_tokenizer([text], recipe.vocabulary)
    model = small_base.make_model(tokenizer, recipe)
    blocks = small_base.token_blocks(tokenizer, [text], recipe)
    said = []
    loss = small_base.train_base(model, blocks, recipe, getattr(torch, dtype), said.append)
    assert 0 < loss < 8
    assert "step 1 of 6" in said[0]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    again = AutoTokenizer.from_pretrained(tmp_path / "base")
    for sample in (text, "naïve ☃ \t\n    x", '\n    """Do it."""'):
        assert again.decode(again(sample)["input_ids"]) == sample
    assert again.eos_token_id == AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.eos_token_id
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    assert shapes
    assert all(columns % 64 == 0 for _, columns in shapes)


def test_default_sizes_fill_blocks_of_nf4():
    recipe = importlib.import_module("small_base").Recipe()
    assert recipe.hidden % 64 == recipe.intermediate % 64 == 0


def test_place_copies_once_and_leaves_other_folders_alone(tmp_path):
    prepare = importlib.import_module("prepare")
    kept, out = tmp_path / "kept", tmp_path / "out"
    kept.mkdir()
    (kept / prepare.ABOUT).write_text(json.dumps({"key": "1"}))
    prepare.place(kept, out)
    (out / "mine").touch()
    prepare.place(kept, out)
    assert (out / "mine").exists()
    (kept / prepare.ABOUT).write_text(json.dumps({"key": "2"}))
    prepare.place(kept, out)
    assert not (out / "mine").exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(SystemExit, match="was not made by this script"):
        prepare.place(kept, foreign)
