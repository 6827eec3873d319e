"""Pages by how many free blocks they have, so that the best fit is found without looking at each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Page", "PagesByRoom"]


class Page(Protocol):
    """What is asked of a page."""

    page_id: int

    def num_free_blocks(self) -> int:
        """Count its free blocks."""

    def alloc(self, num_blocks: int) -> list[int]:
        """Take free blocks."""

    def free_batch(self, block_ids: Sequence[int]) -> None:
        """Give blocks back."""

    def full(self) -> bool:
        """Tell whether none is free."""

    def empty(self) -> bool:
        """Tell whether all are free."""

    def init(self, block_mem_size: int) -> None:
        """Cut it into blocks."""


class PagesByRoom(dict[int, "Page"]):
    """Pages by number, as a dict, and by room.

    A page's room must not change while it is in here: take it out, change it, put it back.

    Parameters
    ----------
    pages
        What it begins with.
    """

    def __init__(self, pages: Mapping[int, Page] | Iterable[tuple[int, Page]] = ()) -> None:
        super().__init__()
        # Pages of each room, and a bit for each room that has any.
        self._by_room: dict[int, dict[int, None]] = {}
        self._room_of: dict[int, int] = {}
        self._rooms = 0
        for page_id, page in dict(pages).items():
            self[page_id] = page

    def __setitem__(self, page_id: int, page: Page) -> None:
        if page_id in self:
            self._leave(page_id)
        super().__setitem__(page_id, page)
        room = page.num_free_blocks()
        self._room_of[page_id] = room
        self._by_room.setdefault(room, {})[page_id] = None
        self._rooms |= 1 << room

    def __delitem__(self, page_id: int) -> None:
        super().__delitem__(page_id)
        self._leave(page_id)

    def pop(self, page_id: int, *default: Page) -> Page:  # type: ignore[override]
        """Take a page out."""
        if page_id in self:
            self._leave(page_id)
        return super().pop(page_id, *default)

    def clear(self) -> None:
        """Take all pages out."""
        super().clear()
        self._by_room.clear()
        self._room_of.clear()
        self._rooms = 0

    def take(self, blocks: int) -> Page:
        """Take out the page with the least room that has room for so many blocks, or else the one with the most.

        Parameters
        ----------
        blocks
            How many.

        Returns
        -------
        Page
            The page.

        Raises
        ------
        KeyError
            If there is none.
        """
        if not self._rooms:
            raise KeyError("no page has room")
        enough = self._rooms >> blocks
        room = blocks + (enough & -enough).bit_length() - 1 if enough else self._rooms.bit_length() - 1
        return self.pop(next(iter(self._by_room[room])))

    def _leave(self, page_id: int) -> None:
        room = self._room_of.pop(page_id)
        pages = self._by_room[room]
        del pages[page_id]
        if not pages:
            del self._by_room[room]
            self._rooms ^= 1 << room
