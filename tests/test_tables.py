"""Tables as a terminal and a page of Markdown show them."""

import pytest

from tinystories_jax.tables import columns, markdown_table, markdown_text

ROWS = [("name", "a", "unit"), ("loss", "1.25", ""), ("a|b_c", "10", "of <all>")]


def test_columns_are_aligned_without_spaces_at_the_end():
    assert columns(ROWS) == ["name   a     unit", "loss   1.25", "a|b_c  10    of <all>"]
    assert columns(ROWS, flush_right=True) == ["name      a      unit", "loss   1.25", "a|b_c    10  of <all>"]


def test_rows_of_other_lengths_are_a_fault():
    with pytest.raises(ValueError, match="zip"):
        columns([("a", "b"), ("c",)])


def test_a_table_of_markdown_shows_its_cells_as_they_are():
    head, *rows = ROWS
    assert markdown_table(head, rows).splitlines() == [
        "| name | a | unit |",
        "| --- | --- | --- |",
        "| loss | 1.25 |  |",
        "| a\\|b\\_c | 10 | of \\<all\\> |",
    ]
    assert markdown_table(head, rows, flush_right=True).splitlines()[1] == "| --- | ---: | ---: |"


@pytest.mark.parametrize(
    ("text", "markdown"),
    [("1. a", "1\\. a"), ("- a", "\\- a"), ("1.5", "1.5"), ("a - b", "a - b"), ("# a", "\\# a"), ("===", "\\===")],
)
def test_what_begins_a_list_or_a_heading_is_text(text, markdown):
    assert markdown_text(text) == markdown
