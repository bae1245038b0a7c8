"""Item text from a `{column}` template: what the encoder reads of an item.

The template is data, cut into literals and column names once; the text of all items is then one
join of whole columns.
"""

from __future__ import annotations

import string

import pyarrow as pa
import pyarrow.compute as pc

from rellax_ds.errors import ConfigError


def render(items: pa.Table, template: str) -> pa.Array:
    """Text of every item.

    An item gets the empty string, which no encoder should see, when every column that the template
    names is blank for it, or when its title is and the template names it.

    Args:
        items: The item table.
        template: Text with `{column}` fields; `{{` and `}}` stand for braces.

    Returns:
        One string per item, in the table's order.

    Raises:
        ConfigError: The template names an unknown column, names none, or cannot be read.
    """
    pieces = _pieces(template)
    fields = [field for _, field in pieces if field is not None]
    for field in fields:
        if field not in items.column_names:
            raise ConfigError(
                f"embeddings.text: '{{{field}}}' is no column of the item table; "
                f"choose from {', '.join(items.column_names)}"
            )
    if not fields:
        raise ConfigError(
            f"embeddings.text: {template!r} names no column, so all items would be alike; "
            f"choose from {', '.join(items.column_names)}"
        )
    columns = {
        field: items.column(field).combine_chunks().cast(pa.string()).fill_null("")
        for field in fields
    }
    parts = []
    for literal, name in pieces:
        parts.append(pa.scalar(literal))
        if name is not None:
            parts.append(columns[name])
    text = pc.binary_join_element_wise(*parts, "")
    blank = {
        field: pc.equal(pc.utf8_trim_whitespace(column), "") for field, column in columns.items()
    }
    empty = blank.get("title", pa.scalar(False))
    everything = pa.scalar(True)
    for column in blank.values():
        everything = pc.and_(everything, column)
    return pc.if_else(pc.or_(empty, everything), "", text)


def _pieces(template: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"embeddings.text: {template!r}: {error}; write {{column}} for a field and "
            "{{ or }} for a brace"
        ) from None
    for _, field, specification, conversion in parsed:
        if field is not None and (not field or specification or conversion):
            raise ConfigError(
                f"embeddings.text: {template!r}: a field is a plain {{column}}, "
                "without format or conversion"
            )
    return [(literal, field) for literal, field, _, _ in parsed]
