"""Whose KV lies in which pages, and the prefix cache: prompts that begin alike share the pages of
what they have in common, whether their KV is computed here or brought here.

A page whose tokens are all of one prompt is cached under a key of that prompt's
(`Request.page_keys`), which stands for these tokens and for all before them. So what is cached of a
prompt are its first pages, and a holder of one of them holds those before it too: pages are
cached in order, given back together, the last first, and evicted in the order in which they were
given back. None is therefore evicted before those that follow it.
"""

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from schedulers.ledger.pages import PageTable
from schedulers.ledger.request import Request, Seq
from schedulers.ledger.rows import Column, Rows


class Pool:
    """The pages of one instance's sequences.

    It keeps `computed` of each waiting prompt at the tokens that would be found cached if it began
    now: policies need the work that truly remains of it. By the order above only two keys can
    change that: of the last page that is cached of it, and of the next. They are watched, so an
    arrival costs its own pages, and a page that comes or goes costs the prompts that watch it.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.table = PageTable(num_pages, self._changed)
        self.page_size = page_size
        self._watchers: dict[int, dict[Seq, None]] = {}

    # What it gives to sequences, and takes back.

    def needed(self, seq: Seq) -> int:
        """Pages that it lacks for all its tokens so far."""
        return -(-seq.length // self.page_size) - len(seq.pages)

    def give(self, seq: Seq) -> None:
        """The pages that it needs."""
        if (count := self.needed(seq)) > 0:
            seq.pages += self.table.alloc(count)
            seq.cells[Column.CAPACITY] = len(seq.pages) * self.page_size

    def grow(self, running: Rows[Seq], work: Mapping[str, int]) -> None:
        """A page more for each of `work` whose next token has no room."""
        capacity = running.capacity
        (rows,) = (running.length > capacity).nonzero()
        if rows.size and len(work) < len(running.seqs):
            rows = rows[[running.id_at(row) in work for row in rows.tolist()]]
        if rows := rows.tolist():
            for row, page in zip(rows, self.table.alloc(len(rows)), strict=True):
                running.seqs[row].pages.append(page)
                capacity[row] += self.page_size

    def take_back(self, seq: Seq) -> None:
        """All its pages."""
        self.table.free(seq.pages)
        seq.pages = []
        seq.cells[Column.CAPACITY] = 0.0

    # What is cached of prompts.

    def cached(self, request: Request) -> int:
        """Tokens of a prompt that would be found cached if it were here and began now."""
        return self.page_size * self.num_cached(request.page_keys, self._most(request))

    def num_cached(self, keys: Sequence[int], most: int | None = None) -> int:
        """How many of the first pages of a prompt, `most` at most, are cached."""
        # The first that is not there, as none is there after it.
        return bisect_left(keys, True, hi=most, key=lambda key: key not in self.table)

    def watch(self, seq: Seq) -> None:
        """A prompt waits from now on."""
        if seq.request.page_keys:
            self._match(seq)

    def unwatch(self, seq: Seq) -> None:
        """A sequence waits no more."""
        for key in self._watched(seq) if seq.request.page_keys else ():
            if watchers := self._watchers.get(key):
                watchers.pop(seq, None)
                if not watchers:
                    del self._watchers[key]

    def share(self, seq: Seq) -> None:
        """Gives a sequence that begins, or whose KV is to be fetched, the pages that are cached of
        its prompt.
        """
        self.unwatch(seq)
        if seq.pages:  # its KV is here
            return
        keys = seq.request.page_keys
        pages = self.num_cached(keys) if seq.num_tokens else seq.computed // self.page_size
        seq.pages = self.table.share(keys[:pages])
        seq.cells[Column.CAPACITY] = seq.cached = pages * self.page_size

    def cache(self, seq: Seq, count: int) -> None:
        """The KV of the last `count` of its computed tokens has come into its pages: caches those
        of its prompt that are full now. Where another sequence has cached the same tokens first,
        its page takes the place of ours, or ours could outlast those before it.
        """
        keys, full = seq.request.page_keys, self._filled(seq, count)
        if keys[full]:
            own = seq.pages[full]
            pages = self.table.cache(own, keys[full])
            if pages != own:
                seq.pages = [*seq.pages[: full.start], *pages, *seq.pages[full.stop :]]

    def is_awaited(self, seq: Seq, count: int) -> bool:
        """Whether a waiting prompt lacks a page that those tokens fill: see `cache`."""
        keys = seq.request.page_keys[self._filled(seq, count)]
        return any(key in self._watchers and key not in self.table for key in keys)

    def check(
        self,
        waiting: Sequence[Seq],
        running: Sequence[Seq],
        *others: Sequence[Seq],
        fresh: Mapping[Seq, int],
    ) -> None:
        """Raises AssertionError if a page is leaked or shared by mistake, or if what is known of
        prompts is not what is cached. fresh: computed tokens that are still to be cached.
        """
        held = (*waiting, *running, *itertools.chain(*others))
        for seq in held:
            room = len(seq.pages) * self.page_size
            assert room == seq.cells[Column.CAPACITY], f"pages of {seq.request.id!r}"
        self.table.check([seq.pages for seq in held])
        prompts = [seq for seq in waiting if not seq.num_tokens]
        for seq in prompts:
            keys = seq.request.page_keys[: self._most(seq.request)]
            pages = [self.table.find(key) for key in keys]
            found = self.page_size * [*pages, None].index(None)
            assert seq.computed == found, f"what is cached of {seq.request.id!r}"
            rest = pages[found // self.page_size :]
            assert rest.count(None) == len(rest), "cached without those before"
        for seq in held:
            if seq.pages:
                here = seq.computed - fresh.get(seq, 0) if seq.ready else seq.cached
                keys = seq.request.page_keys[: here // self.page_size]
                cached = [self.table.find(key) for key in keys]
                assert seq.pages[: len(keys)] == cached, f"cached pages of {seq.request.id!r}"
        watching = {seq for seqs in self._watchers.values() for seq in seqs}
        assert watching == {seq for seq in prompts if self._most(seq.request)}, "who watches"

    def _changed(self, keys: list[int]) -> None:
        for seq in {seq: None for key in keys for seq in self._watchers.get(key, ())}:
            self.unwatch(seq)
            self._match(seq)

    def _match(self, seq: Seq) -> None:
        seq.cells[Column.COMPUTED] = self.cached(seq.request)
        for key in self._watched(seq):
            self._watchers.setdefault(key, {})[seq] = None

    def _watched(self, seq: Seq) -> Sequence[int]:
        count = seq.computed // self.page_size
        return seq.request.page_keys[max(count - 1, 0) : min(count + 1, self._most(seq.request))]

    def _filled(self, seq: Seq, count: int) -> slice:
        """Pages of its prompt that the last `count` of its computed tokens have filled."""
        size, most = self.page_size, len(seq.request.page_keys)
        return slice((seq.computed - count) // size, min(seq.computed // size, most))

    def _most(self, request: Request) -> int:
        """Pages that may be found of its prompt: its last token must be computed in any case, as
        the next is sampled from it.
        """
        return min(len(request.page_keys), (len(request.prompt) - 1) // self.page_size)
