"""Columns that an objective adds to rows: what documents say of themselves, checked, cast and laid out.

Shape suffixes: T tokens of the row, L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from megatron_gemini.contracts import Column
from megatron_gemini.data.samples.document import Document
from megatron_gemini.modalities.bad_sample import BadSample


def check_columns(document: Document, columns: Sequence[Column]) -> None:
    """Raise BadSample("bad_column") for a document of which a column cannot be made; the message names the column."""
    for column in columns:
        column_values(document, column)


def column_values(document: Document, column: Column) -> np.ndarray:
    """A document's values of a column, in its dtype: [L], or [] of a column per document.

    One number stands for all tokens, and a document that does not have the column has `fill`. Raises BadSample as
    `check_columns` does.
    """
    dtype = np.dtype(column.dtype)
    shape = () if column.per == "document" else (len(document),)
    try:
        given = np.asarray(document.columns.get(column.name, column.fill))
    except ValueError:  # a ragged list
        raise _bad(document, column, "is no array") from None
    if given.dtype.kind not in "biuf":
        raise _bad(document, column, "does not hold numbers")
    if given.shape not in ((), shape):
        wanted = "one number" if column.per == "document" else f"one number, or one for each of {len(document)} tokens"
        raise _bad(document, column, f"has the shape {list(given.shape)}; it needs {wanted}")
    with np.errstate(invalid="ignore", over="ignore"):
        cast = given.astype(dtype)
    # Samples come from strangers: a NaN would end the run, and a number that wraps around would train on nonsense.
    if dtype.kind == "f" and not np.isfinite(cast).all():
        raise _bad(document, column, f"holds a number that is not finite in {column.dtype}")
    if dtype.kind != "f" and not (cast == given).all():
        raise _bad(document, column, f"holds a number that {column.dtype} has not")
    return np.broadcast_to(cast, shape)


def _bad(document: Document, column: Column, problem: str) -> BadSample:
    return BadSample("bad_column", f"{document.key}: the column {column.name!r} {problem}")


def pack_columns(documents: Sequence[Document], columns: Sequence[Column], row_tokens: int) -> dict[str, torch.Tensor]:
    """By name: [T] of columns per token or target, [documents] of those per document. The documents stand in this
    order from the row's beginning.

    A target's column is that of the token which a position predicts, so that it is shifted by one as
    `Batch.target_T` is; a document's last position, and padding, have `fill`. Raises BadSample as `check_columns`.
    """
    packed = {}
    for column in columns:
        values = [column_values(document, column) for document in documents]
        if column.per == "document":
            packed[column.name] = torch.from_numpy(np.stack(values))
            continue
        if column.per == "target":
            values = [of_targets(values_L, column.fill) for values_L in values]
        packed[column.name] = lay_out(values, column.dtype, column.fill, row_tokens)
    return packed


def lay_out(documents: Iterable[np.ndarray], dtype: str, fill: float, row_tokens: int) -> torch.Tensor:
    """The values of documents, [L] each, back to back in a row [T] that `fill` fills up."""
    row_T = np.full(row_tokens, fill, np.dtype(dtype))
    begin = 0
    for values_L in documents:
        row_T[begin : begin + len(values_L)] = values_L
        begin += len(values_L)
    return torch.from_numpy(row_T)


def of_targets(values_L: np.ndarray, fill: float) -> np.ndarray:
    """[L]: where a token is predicted, the value that it has; the last token predicts none and gets `fill`."""
    return np.append(values_L[1:], np.array(fill, values_L.dtype))
