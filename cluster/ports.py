"""Free TCP ports for programs that must be told theirs.

Picked below the range from which the system gives out ports by itself, so that nobody gets
one by chance between the look and its use. Two who pick at the same time can still meet:
whoever fails to start asks `is_taken` and picks anew.
"""

import random
import socket
from collections.abc import Collection

from cluster.errors import NoFreePortError

LOWEST = 10_000
HIGHEST = 32_000
"""Linux gives out 32768-60999 by itself, macOS 49152-65535."""
_TRIES = 2_000


def free_ports(count: int, *, within: tuple[int, int] = (LOWEST, HIGHEST)) -> list[int]:
    """`count` different ports on which nobody listens, at any address.

    Raises:
        NoFreePortError: too few are free.
    """
    found: list[int] = []
    for port in random.sample(range(*within), k=min(_TRIES, within[1] - within[0])):
        if len(found) == count:
            break
        if not is_taken(port):
            found.append(port)
    if len(found) < count:
        raise NoFreePortError(
            f"found {len(found)} free ports of {count} between {within}; close some"
        )
    return found


def free_pair(distance: int, *, avoid: Collection[int] = ()) -> int:
    """A free port P, of which P + `distance` is free too, both not in `avoid`.

    Raises:
        NoFreePortError: there is none.
    """
    for port in free_ports(50, within=(LOWEST, HIGHEST - distance)):
        if not {port, port + distance} & set(avoid) and not is_taken(port + distance):
            return port
    raise NoFreePortError(
        f"found no free pair of ports {distance} apart above {LOWEST}; close some"
    )


def is_taken(port: int) -> bool:
    """Whether somebody holds the port, at any IPv4 address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
