"""The names under which a server may be addressed: a defence against DNS rebinding.

A web page whose name is re-pointed to 127.0.0.1 reaches a local server with its own name in the ``Host`` header, and
the browser takes both for one origin. The server therefore answers only to names that it knows to be its own.
"""

from __future__ import annotations

import ipaddress
import re

_HOST = re.compile(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?)\.?)(?::[0-9]{1,5})?")
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def host_name(header: str) -> str | None:
    """The host of a ``Host`` header without port, brackets and trailing dot, in lower case; an address in its shortest
    form. None where the header is not a host."""
    match = _HOST.fullmatch(header.strip().lower())
    if match is None or (match["name"] and ".." in match["name"]):
        return None
    try:
        return str(ipaddress.ip_address(match["six"] or match["name"]))
    except ValueError:
        return match["name"]  # None where brackets hold no address


class HostNames:
    """The hosts that a server bound to ``bound`` answers to: that address, localhost and ``names``. A server bound to
    every address (0.0.0.0, ::) answers to any address, too: only names can be re-pointed."""

    def __init__(self, bound: str, names: tuple[str, ...] = ()) -> None:
        parsed = {}
        for name in (bound, *names):
            parsed[name] = host_name(f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name)
            if parsed[name] is None:
                raise ValueError(f"{name!r} is not a host name or an address")
        self.names = LOCAL | {name for name in parsed.values() if name}
        self.any_address = parsed[bound] in ("0.0.0.0", "::")

    def __contains__(self, header: str) -> bool:
        """Whether a ``Host`` header names this server."""
        host = host_name(header)
        return host is not None and (host in self.names or (self.any_address and _is_address(host)))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
