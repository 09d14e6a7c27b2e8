"""Which KV pages are free, held or cached. Page ids only: the arrays live in `models.kv_cache`."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class OutOfPages(Exception):
    """More pages were asked for than are free; a policy must look at `num_free` first."""


class PageTable:
    """Which sequences hold which pages of one instance's pool, and what is in the pages without a
    holder.

    A page may be cached under a key that says what is in it: then several may hold it, and when
    none does, it stays as it is until the room is needed, the longest unheld going first. So it
    counts as free. All others have one holder.

    Freed pages that are not cached are handed out again last-in first-out, so a lightly loaded pool
    touches few pages. changed: told which keys have come or gone, of one call all at once.
    num_shared: how many holders pages have beyond the first.
    """

    def __init__(self, num_pages: int, changed: Callable[[list[int]], None] = lambda keys: None):
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages, self.num_shared = num_pages, 0
        self._changed = changed
        self._free = list(range(num_pages - 1, -1, -1))
        self._page: dict[int, int] = {}  # by key
        self._key: dict[int, int] = {}  # by page
        self._holders: dict[int, int] = {}  # of cached pages
        self._unheld: OrderedDict[int, None] = OrderedDict()  # cached pages, the next to go first

    @property
    def num_free(self) -> int:
        """Pages that `alloc` can give."""
        return len(self._free) + len(self._unheld)

    @property
    def num_cached(self) -> int:
        """Pages that are cached, held or not."""
        return len(self._key)

    def __contains__(self, key: int) -> bool:
        """Whether there is a page under this key."""
        return key in self._page

    def find(self, key: int) -> int | None:
        """The page under a key."""
        return self._page.get(key)

    def alloc(self, count: int) -> list[int]:
        """Takes `count` free pages. Raises OutOfPages, changing nothing."""
        if count <= 0:
            return []
        if count > len(self._free):
            if count > self.num_free:
                raise OutOfPages(
                    f"{count} pages asked for, {self.num_free} of {self.num_pages} free"
                )
            self._evict(count - len(self._free))
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def share(self, keys: Iterable[int]) -> list[int]:
        """Takes the pages under these keys, all of which are here."""
        pages = [self._page[key] for key in keys]
        for page in pages:
            self._hold(page)
        return pages

    def cache(self, pages: Sequence[int], keys: Sequence[int]) -> list[int]:
        """Puts pages, which their one holder has filled, under keys. Returns the pages that this
        holder has now: where there was one under the key, that; then its own is free.
        """
        now, new = [], []
        for page, key in zip(pages, keys, strict=True):
            known = self._page.get(key)
            if known is None:
                self._page[key], self._key[page], self._holders[page] = page, key, 1
                new.append(key)
            else:
                self._hold(known)
                self._free.append(page)
            now.append(page if known is None else known)
        if new:
            self._changed(new)
        return now

    def free(self, pages: Sequence[int]) -> None:
        """Takes back what one holder has. Of cached ones the last goes first, as a sequence
        that wants it needs those before it too.
        """
        if not self._key:
            self._free.extend(reversed(pages))
            return
        holders = self._holders
        for page in reversed(pages):
            count = holders.get(page)
            if count is None:
                self._free.append(page)
                continue
            holders[page] = count - 1
            if count > 1:
                self.num_shared -= 1
            else:
                self._unheld[page] = None

    def num_freed_by(self, pages: Sequence[int]) -> int:
        """How many of them would be free if one holder gave them back."""
        return sum(self._holders.get(page, 1) == 1 for page in pages)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raises AssertionError unless `held`, the pages of each holder, and those that are free
        are together every page, once; save for cached ones, which several may hold.
        """
        count = Counter(page for pages in held for page in pages)
        assert all(len(set(pages)) == len(pages) for pages in held), "a page is held twice by one"
        free = [*self._free, *self._unheld]
        assert sorted([*count, *free]) == list(range(self.num_pages)), "pages leaked or shared"
        shared = {page: count[page] for page in self._holders}
        assert self._holders == shared, "holders of cached pages"
        assert all(count[page] == 1 for page in count.keys() - shared.keys()), "pages shared"
        assert self.num_shared == sum(n - 1 for n in shared.values() if n), "num_shared"
        assert self._page == {key: page for page, key in self._key.items()}, "keys of pages"
        assert self._key.keys() == self._holders.keys(), "cached pages"

    def _hold(self, page: int) -> None:
        if self._holders[page]:
            self.num_shared += 1
        else:
            del self._unheld[page]
        self._holders[page] += 1

    def _evict(self, count: int) -> None:
        """Forgets what lies in the cached pages that nobody has held for the longest time."""
        pages = [self._unheld.popitem(last=False)[0] for _ in range(count)]
        keys = [self._key.pop(page) for page in pages]
        for page, key in zip(pages, keys, strict=True):
            del self._page[key], self._holders[page]
        self._free += pages
        self._changed(keys)
