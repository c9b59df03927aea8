"""The transports by name: whatever offers, starts or names one asks here."""

from __future__ import annotations

from .mpi import MpiTransport
from .single import SingleTransport
from .threads import ThreadTransport
from .torch_distributed import GlooTransport, NcclTransport
from .transport import Transport

# In the order in which `connect` looks for what the environment offers, and `launch` for what is installed.
TRANSPORTS: dict[str, type[Transport]] = {
    MpiTransport.name: MpiTransport,
    NcclTransport.name: NcclTransport,
    GlooTransport.name: GlooTransport,
    ThreadTransport.name: ThreadTransport,
    SingleTransport.name: SingleTransport,
}
# Those that `launch` can start, the default first.
LAUNCHED: list[str] = [name for name, kind in TRANSPORTS.items() if kind.started_by is not None]
