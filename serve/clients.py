"""Whom the limits of one client count: connections, late bodies, requests a minute.

In: the address at the other end of a connection. Out: the same for all addresses that one client may choose from.
"""

import functools
import ipaddress


@functools.lru_cache(maxsize=4096)
def client_of(host: str) -> str:
    """The address, or of version 6 its network of 64 bits: within it a client may take another one each time.

    Of neighbours on one link all have the same network there; they are told apart by address.
    """
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:  # of version 4, or a local socket
        return host
    within = address.ipv4_mapped
    if within or address.is_link_local:
        return str(within or address)
    return address.packed[:8].hex()
