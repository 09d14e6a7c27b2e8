"""Which KV pages are free. Page ids only: the arrays live in `models.kv_cache`."""


class OutOfPages(Exception):
    """More pages were asked for than are free; a policy must look at `num_free` first."""


class PageTable:
    """The free list of one instance's page pool.

    Freed pages are handed out again last-in first-out, so a lightly loaded pool touches few pages.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self, count: int) -> list[int]:
        """Takes `count` pages off the free list. Raises OutOfPages, changing nothing."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} of {self.num_pages} free")
        if count <= 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def free(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))

    def check(self, held: list[int]) -> None:
        """Raises AssertionError unless `held` and the free list are together every page, once."""
        assert sorted(held + self._free) == list(range(self.num_pages)), "pages leaked or shared"
