"""A TCP relay between a caller and a server, which may stop carrying for a while."""

import asyncio
import contextlib
from dataclasses import dataclass, field


@dataclass
class Relay:
    """Listens on a port of its own. carries: while it is not set, what comes in is kept, and goes
    on later: as on a network that drops packets for a while.
    """

    port: int
    carries: asyncio.Event = field(default_factory=asyncio.Event)
    listener: asyncio.Server = field(init=False)
    address: str = ""

    @classmethod
    async def start(cls, address: str) -> "Relay":
        relay = cls(int(address.rpartition(":")[2]))
        relay.carries.set()
        relay.listener = await asyncio.start_server(relay._serve, "127.0.0.1", 0)
        relay.address = f"127.0.0.1:{relay.listener.sockets[0].getsockname()[1]}"
        return relay

    async def _serve(self, reader, writer) -> None:
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
            await asyncio.gather(self._carry(reader, back), self._carry(there, writer))

    async def _carry(self, reader, writer) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self.carries.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:  # at the end of the loop too, which cancels it
            writer.close()

    def close(self) -> None:
        self.listener.close()
