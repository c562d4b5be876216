"""Which of a host's network interfaces leads to the other ranks (gloo would take the one of the host's name)."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys

SIOCGIFADDR = 0x8915  # of Linux's <sys/ioctl.h>


def use_route_to(address: str, one_host: bool) -> None:
    """Let gloo and NCCL use the interface that leads to a host, unless the user has chosen one.

    Where all ranks are on one host that may be the loopback interface; otherwise a host whose own name stands for that
    (Debian's 127.0.1.1) is left to the libraries.
    """
    own = own_address(address)
    name = interface_of(own) if sys.platform == "linux" and own else None
    if name is not None and (one_host or name != "lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if name != "lo":  # NCCL has shared memory within a host, and refuses this one
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def own_address(address: str) -> str | None:
    """This host's IPv4 address on the way to another; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])
    return None


def interface_of(own: str) -> str | None:
    """The name of the interface that has an address."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]) == own:
                    return name
    return None
