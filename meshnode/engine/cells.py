"""Pictures among tokens: what stands for them where a sequence is a list of integers. Pure.

A model reads a picture as one or several *views* (the whole of it, or tiles), each a run of
embeddings. In a prompt every embedding has a *cell*, a negative integer made of the view's digest
and the embedding's place in it. So two prompts have the same cells exactly where they show the
same picture, and whoever compares sequences to reuse a KV cache need not know that there are any.

Does not know pixels, embeddings or where in a prompt a picture may stand.
"""

from __future__ import annotations

from collections.abc import Sequence

# Twice what the largest view of any model here has; it only keeps the parts of a cell apart.
VIEW_CELLS_MAX = 2**16


def cells(digest: int, count: int) -> list[int]:
    """The cells of a view: `digest` is at least 0, `count` 1 to `VIEW_CELLS_MAX`."""
    if digest < 0 or not 1 <= count <= VIEW_CELLS_MAX:
        raise ValueError(f"a view of {count} cells")
    return [-1 - digest * VIEW_CELLS_MAX - place for place in range(count)]


def view_at(tokens: Sequence[int], start: int) -> int | None:
    """The digest of the view that the item at `start` belongs to; None for a token."""
    return None if tokens[start] >= 0 else (-1 - tokens[start]) // VIEW_CELLS_MAX


def stretch(tokens: Sequence[int], start: int, most: int) -> int:
    """How many items from `start` on can be computed at once: up to `most` tokens, or a whole
    view, whatever its length; never both. `start` is not inside a view."""
    first = tokens[start]
    end = start + 1
    if first >= 0:
        last = min(len(tokens), start + most)
        while end < last and tokens[end] >= 0:
            end += 1
    else:
        while end < len(tokens) and tokens[end] == first - (end - start) and _is_inner(tokens[end]):
            end += 1
    return end - start


def _is_inner(cell: int) -> bool:
    """Whether a cell is not the first of its view."""
    return (-1 - cell) % VIEW_CELLS_MAX != 0
