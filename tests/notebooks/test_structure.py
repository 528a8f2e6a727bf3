"""A lint for what every notebook of the series promises its readers."""

import ast
import itertools
import re
import subprocess
import sys

import nbformat
from alt_texts import ALT_TEXTS
from minutes import exercise_minutes, reading_minutes, running_text

from lowrank_utils.interactive import WITHOUT_A_KERNEL

LINES_PER_CELL = 15

# Exercises beyond the three, each a section of its own at the end of its notebook:
# heading → number.
LARGER_EXERCISES = {"05_dora": {"Find the bug": 4}}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def tags(cell):
    return cell.metadata.get("tags", [])


def text_of_outputs(cell):
    """Return all that a cell shows as text."""
    parts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            parts.append(output.text)
        elif output.output_type == "error":
            parts.append(output.evalue)
        else:
            parts.append(str(output.data.get("text/plain", "")))
    return "\n".join(parts)


def has_picture(cell):
    return any(
        "image/png" in output.get("data", {}) for output in cell.get("outputs", [])
    )


def test_all_are_in_normal_form_and_what_is_not_is_named(tmp_path, root):
    spoilt = tmp_path / "spoilt.ipynb"
    script = root / "tools" / "execute_notebooks.py"
    paths = sorted(root.glob("notebooks/*.ipynb"))
    spoilt.write_text(paths[0].read_text(encoding="utf-8") + "\n", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, script, "--check", *paths, spoilt],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line.split(": not in normal form")[0] for line in run.stderr.splitlines()]
    assert (run.returncode, said) == (1, [str(spoilt)])


def test_every_cell_was_executed_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_errors_stand_only_where_a_tag_expects_them(notebook):
    for cell in code_cells(notebook):
        raised = any(output.output_type == "error" for output in cell.outputs)
        # An exercise may raise a hint, but not as it is stored.
        assert raised == (
            "raises-exception" in tags(cell) and "exercise" not in tags(cell)
        ), cell.source


def test_the_file_is_small(path):
    assert path.stat().st_size < 1_000_000


def test_it_opens_with_what_a_reader_asks_first(notebook, path):
    first = notebook.cells[0].source
    assert re.match(rf"# {int(path.stem[:2])}\. \S", first)
    question = first.split("\n\n")[1]
    assert question.startswith("*")
    assert question.endswith("?*")
    for part in ("**You will do**", "**You will learn**", "**You need**"):
        assert part in first


def test_minutes_are_counted_as_the_teaching_guide_says():
    """A formula, a drawing and a plot, a prediction, 240 words, 30 lines: 2.25, 1, 2 and
    4 minutes; and what is folded counts for nothing."""
    words = "word " * 230
    folded = "<details><summary>Answer</summary>" + words + "</details>"
    text = f"$$x$$ ![alt text](../figures/a.svg) **Predict.** {words}{folded}"
    plot = nbformat.v4.new_output("display_data", {"image/png": ""})
    code = nbformat.v4.new_code_cell("x = 1\n\n" * 30, outputs=[plot])
    hidden = nbformat.v4.new_code_cell("x = 1\n" * 300)
    hidden.metadata.tags = ["hide-input"]
    exercise = nbformat.v4.new_markdown_cell("### Exercise 1.1: it (core, 8 minutes)")
    stub = nbformat.v4.new_code_cell("x = 1\n" * 300)
    stub.metadata.tags = ["exercise"]
    cells = [nbformat.v4.new_markdown_cell(text), code, hidden, exercise, stub]
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert reading_minutes(notebook) == 10
    assert exercise_minutes(notebook) == 8
    cells.append(nbformat.v4.new_markdown_cell("word " * 120))
    assert reading_minutes(notebook) == 15


def test_links_to_other_files_lead_somewhere(notebook, path):
    for cell in text_cells(notebook):
        for target in re.findall(r"\]\(([^)#\s]+)\)", cell.source):
            if "://" not in target:
                assert (path.parent / target).is_file(), target


def test_previous_and_next_are_the_neighbours(notebook, path):
    series = sorted(path.parent.glob("[0-9]*.ipynb"))
    place = series.index(path)
    for cell in (notebook.cells[0], notebook.cells[-1]):
        assert "[Contents](../README.md)" in cell.source
        for word, other in (("Previous", place - 1), ("Next", place + 1)):
            found = re.search(rf"{word}: \[([^]]+)\]\(([^)]+)\)", cell.source)
            assert (found is not None) == (0 <= other < len(series))
            if found:
                assert found[2] == series[other].name
                assert found[1].startswith(f"{other + 1}. ")


def test_headings_are_in_order(notebook):
    # Fenced code may have lines that begin with #; none of the notebooks uses fences.
    levels = [
        len(match)
        for cell in text_cells(notebook)
        for match in re.findall(r"^(#+) ", cell.source, flags=re.MULTILINE)
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_it_closes_with_exercises_and_with_what_was_learned(notebook, path):
    headings = re.findall(
        r"^## (.+)$",
        "\n".join(cell.source for cell in text_cells(notebook)),
        flags=re.MULTILINE,
    )
    assert headings[headings.index("Exercises") :] == [
        "Exercises",
        *LARGER_EXERCISES.get(path.stem, {}),
        "What you can do now",
    ]
    assert "**Further reading**" in notebook.cells[-1].source
    assert "arXiv" in notebook.cells[-1].source


def test_three_exercises_rise_in_difficulty_with_hints_a_check_and_a_solution(
    notebook, path
):
    number = int(path.stem[:2])
    titles = [
        cell.source
        for cell in text_cells(notebook)
        if cell.source.startswith("### Exercise") and "(change, " not in cell.source
    ]
    assert [re.search(r"\((\S+), \d+ minutes\)", title)[1] for title in titles] == [
        "warm-up",
        "core",
        "stretch",
        *["stretch"] * len(LARGER_EXERCISES.get(path.stem, {})),
    ]
    assert all("<details><summary>Hint" in title for title in titles)
    stubs = [cell for cell in code_cells(notebook) if "exercise" in tags(cell)]
    solutions = [cell for cell in code_cells(notebook) if "solution" in tags(cell)]
    for place, (stub, solution) in enumerate(
        zip(stubs, solutions, strict=True), start=1
    ):
        name = f"Exercise {number}.{place}"
        assert titles[place - 1].startswith(f"### {name}: ")
        assert f'raise NotImplementedError("{name}: ' in stub.source
        assert text_of_outputs(stub).startswith(f"To do: {name}: ")
        assert solution.source.startswith(f"# Solution {number}.{place}\n")
        assert f"Solution {number}.{place}: correct" in text_of_outputs(solution)
        assert solution.metadata.jupyter.source_hidden
        assert "hide-cell" in tags(solution)
        # The stub and its solution call the same check on a function of the same name.
        assert (
            stub.source.split("\n\n")[-1].strip()
            == re.search(r"^check_.*$", solution.source, flags=re.MULTILINE)[0]
        )


def test_there_is_an_exercise_of_change(notebook):
    assert any(
        cell.source.startswith("### Exercise") and "(change, " in cell.source
        for cell in text_cells(notebook)
    )


def test_the_running_text_is_short(notebook, path):
    limit = 1600 if int(path.stem[:2]) <= 5 else 2200
    texts = [running_text(cell.source) for cell in text_cells(notebook)]
    assert sum(len(text.split()) for text in texts) <= limit


def test_an_exercise_of_change_has_a_cell_to_change_and_a_sample_answer(notebook):
    for place, cell in enumerate(notebook.cells):
        if cell.source.startswith("### Exercise") and "(change, " in cell.source:
            assert "<details><summary>A sample answer</summary>" in cell.source
            assert notebook.cells[place + 1].cell_type == "code"


def test_a_larger_exercise_stands_in_its_section(notebook, path):
    everything = "\n".join(cell.source for cell in text_cells(notebook))
    for heading, number in LARGER_EXERCISES.get(path.stem, {}).items():
        section = everything.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert f"### Exercise {int(path.stem[:2])}.{number}: " in section


def test_each_question_has_a_folded_answer_before_the_next_heading(notebook):
    # Pieces between headings, and in each of them what follows a question up to the
    # next one.
    pieces = re.split(
        r"^#+ .*$",
        "\n".join(cell.source for cell in text_cells(notebook)),
        flags=re.MULTILINE,
    )
    after = [text for piece in pieces for text in piece.split("**Predict.**")[1:]]
    assert len(after) >= 3
    for text in after:
        found = re.findall(
            r"<details><summary>Answer</summary>(.+?)</details>", text, flags=re.DOTALL
        )
        assert len(found) == 1, text
        assert len(found[0].split()) >= 5, found[0]


def test_a_picture_with_sliders_has_a_still_one_beside_it(notebook):
    cells = notebook.cells
    for place, cell in enumerate(cells):
        uses_sliders = "PictureWithSliders(" in cell.source and cell.cell_type == "code"
        assert uses_sliders == ("interactive" in tags(cell))
        if uses_sliders:
            assert text_of_outputs(cell) == WITHOUT_A_KERNEL
            code_before = [c for c in cells[:place] if c.cell_type == "code"][-1]
            assert has_picture(code_before), cell.source


def test_set_up_can_be_run_twice(notebook):
    """The first code cell only imports and sets: nothing in it adds to what was
    there."""
    allowed = {"reproducible", "use_style"}
    for node in ast.parse(code_cells(notebook)[0].source).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Call)
            assert node.value.func.id in allowed
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom))


def test_what_is_drawn_or_trained_is_reproducible(notebook):
    everything = "\n".join(cell.source for cell in code_cells(notebook))
    assert re.search(r"^reproducible\(", everything, flags=re.MULTILINE)
    assert re.search(r"^use_style\(\)$", everything, flags=re.MULTILINE)


def test_code_cells_are_short(notebook):
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        imports_only = all(
            isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr))
            for node in ast.parse(cell.source).body
        )
        limit = 20 if imports_only else LINES_PER_CELL
        assert len(lines) <= limit, f"{len(lines)} lines:\n{cell.source}"
        assert max(map(len, lines)) <= 88, max(lines, key=len)


def test_no_output_is_a_by_product(notebook):
    """Neither what matplotlib returns nor a wall time, which would differ in every
    run."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "execute_result":
                assert "image/png" in output.data or "interactive" in tags(cell)
        shown = text_of_outputs(cell)
        assert not re.search(
            r"<matplotlib|<Figure|Text\(|\[<|Line2D", shown.replace("<Figure size", "")
        ), shown
        assert not re.search(r"\b\d+(\.\d+)? ?(s|ms|µs|seconds)\b", shown), shown


def test_every_plot_is_followed_by_words(notebook):
    cells = notebook.cells
    for place, cell in enumerate(cells):
        if (
            cell.cell_type == "code"
            and has_picture(cell)
            and "solution" not in tags(cell)
        ):
            assert cells[place + 1].cell_type == "markdown", cell.source


def test_drawings_carry_their_alt_text(notebook):
    for cell in text_cells(notebook):
        for alt, name in re.findall(
            r"!\[([^]]*)\]\(\.\./figures/(\w+)\.svg\)", cell.source
        ):
            assert alt == ALT_TEXTS[name].text
        assert len(re.findall(r"!\[", cell.source)) == len(
            re.findall(r"!\[[^]]+\]\(\.\./figures/", cell.source)
        )


def test_plots_carry_an_alt_text_that_states_what_they_show(notebook):
    for cell in code_cells(notebook):
        if has_picture(cell):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) > 60, cell.source
            assert alt.endswith(".")
            assert not re.match(
                "(A |The )?(plot|figure|image|picture)", alt, flags=re.IGNORECASE
            ), alt


NUMBER = re.compile(r"(?<![\w.,/^])[+−-]?\d[\d,]*(?:\.\d+)?%?(?![\w/])")


def test_measured_numbers_in_prose_come_from_an_output_above(notebook):
    """A number with a decimal point or a percent sign stands in an output or in code
    above.

    Numbers of a paper are left alone: their sentence says whose they are.
    """
    seen = ""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            seen += "\n" + cell.source + "\n" + text_of_outputs(cell)
            continue
        if (
            cell.source.startswith("### Exercise")
            or "**Further reading**" in cell.source
        ):
            continue
        prose = re.sub(
            r"\]\([^)]*\)|\$\$.*?\$\$|!\[[^]]*\]|`[^`]*`|^#+ .*$|^\|.*$",
            " ",
            cell.source,
            flags=re.S | re.M,
        )
        for sentence in re.split(r"(?<=[.:?!])\s|\n\n", prose):
            if re.search(
                r"\bpapers?\b|[Ii]t reports|arXiv|article's numbers|series starts",
                sentence,
            ):
                continue
            for number in NUMBER.findall(sentence):
                plain = number.lstrip("+").replace("−", "-")
                if "." in plain or "%" in plain:
                    assert plain in seen, f"{number!r} in: {sentence}"


def test_measured_numbers_in_alt_texts_come_from_code_or_an_output(notebook):
    """As in prose, but rounded where a picture is described."""
    seen = ""
    for cell in code_cells(notebook):
        seen += "\n" + cell.source + "\n" + text_of_outputs(cell)
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        values = [float(number) for number in re.findall(r"\d+\.\d+", seen)]
        for number in re.findall(r"\d+\.\d+", alt):
            digits = len(number.partition(".")[2])
            assert any(round(value, digits) == float(number) for value in values), (
                f"{number} in: {alt}"
            )
