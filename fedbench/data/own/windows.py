"""Text that LEAF cut into windows, put together again: for a model that learns the next token of all of it at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedbench.data.own.table import BadRow, Table, column, text_of_cell


def put_together(table: Table, length: int, client: Sequence[str]) -> Table:
    """The texts of each client in pieces of at most `length` characters, as the column `text` beside those of clients.

    Rows are windows that slide by one character (LEAF, Caldas et al. 2018: `x`, and the character after it, `y`); one
    that does not begin where the one before it goes on, or is another client's, begins another text. A piece
    ends at the last space within its length, where there is one.
    """
    x, y = column(table, "x", "text"), column(table, "y", "text")
    whose = [column(table, name, "client") for name in client]
    broken = list(table.broken)
    columns: dict[str, list[object]] = {"text": [], **{name: [] for name in client}}
    places: list[str] = []
    text, last, begun = "", "", 0

    def close(row: int) -> None:
        for piece in pieces_of(text, length):
            columns["text"].append(piece)
            places.append(f"{table.places[begun]} to {table.places[row]}")
            for name, cells in zip(client, whose, strict=True):
                columns[name].append(cells[begun])

    for row, place in enumerate(table.places):
        try:
            window, follows = text_of_cell(x[row]), y[row]
            if not isinstance(follows, str) or len(follows) != 1:
                raise BadRow("has no character that follows")
        except BadRow as error:
            broken.append((place, *(*error.args, "")[:2]))
            continue
        same = all(cells[row] == cells[begun] for cells in whose)
        if text and same and window == last:
            text += follows
        else:
            close(row - 1)
            text, begun = window + follows, row
        last = (window + follows)[1:]
    close(len(table) - 1)
    return Table(table.where, columns, places, f"{table.about}, {len(table)} windows put together", tuple(broken))


def pieces_of(text: str, length: int) -> Iterator[str]:
    """A text in pieces of at most so many characters, those that hold more than blanks."""
    while text:
        space = text.rfind(" ", 1, length + 1) if len(text) > length else -1
        end = space if space > 0 else length
        if text[:end].strip():
            yield text[:end]
        text = text[end:]
