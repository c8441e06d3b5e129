"""The choice of the port at which the ranks of a node meet."""

from __future__ import annotations

import socket
from random import SystemRandom

# below those that Linux gives to connections by itself, and those of Kubernetes' services
PORTS = range(16384, 30000)


def free_port() -> int:
    """Return a port of this node on which nothing listens, for ranks that meet there once they have started.

    `WatchedLauncher` asks before it starts the other ranks of a single node.  A port that the system chooses can be
    taken again in the meantime, as the near end of a connection of any other program: the ranks would end with "address
    already in use".  A RuntimeError is raised if none of 100 ports is free.
    """
    for port in SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:  # it is in use
                continue
        return port
    raise RuntimeError(f"none of 100 ports between {PORTS.start} and {PORTS.stop - 1} is free; set MASTER_PORT")
