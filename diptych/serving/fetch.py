"""Pictures by URL: fetched from allowed hosts at public addresses only."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import urlsplit

FETCH_SECONDS, FETCH_BYTES = 10.0, 16 * 2**20

# IPv6 networks whose addresses hold an IPv4 address that they lead to, and its distance from the right in bits
_NAT64, _6TO4, _MAPPED = (ipaddress.IPv6Network(n) for n in ("64:ff9b::/96", "2002::/16", "::ffff:0:0/96"))
_EMBEDDED = ((_NAT64, 0), (_6TO4, 80), (_MAPPED, 0))
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # what IANA has allocated; RFC 4291, section 2.4
# inside of it, and not for the public: Teredo (RFC 4380), documentation (RFC 9637), 6bone (RFC 3701)
_SPECIAL = [ipaddress.IPv6Network(n) for n in ("2001::/23", "3fff::/20", "3ffe::/16")]
# IPv4 networks that older Pythons call global: protocol assignments (RFC 6890), relays of 6to4 (RFC 7526)
_SPECIAL_IPV4 = [ipaddress.IPv4Network(n) for n in ("192.0.0.0/24", "192.88.99.0/24")]
_ISATAP = (0x00005EFE, 0x02005EFE)  # first half of an interface identifier whose second half is an IPv4 address


def public_address(host: str, port: int) -> str:
    """An address of the host. Raises ``ValueError`` unless each of its addresses is public."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r} cannot be found") from error
    if private := sorted(a for a in addresses if not is_public(a)):
        raise ValueError(f"host {host!r} has the address {private[0]}, which is not public")
    return sorted(addresses)[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet. IPv6 addresses that lead to an IPv4 address (NAT64, 6to4,
    IPv4-mapped, ISATAP) are as public as that one; other addresses outside of global unicast, and Teredo's, are not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and not any(ip in network for network in _SPECIAL_IPV4)
    for network, shift in _EMBEDDED:
        if ip in network:
            return is_public(str(ipaddress.IPv4Address(int(ip) >> shift & 0xFFFFFFFF)))
    if (int(ip) >> 32 & 0xFFFFFFFF) in _ISATAP and not is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))):
        return False
    return ip in _GLOBAL_UNICAST and ip.is_global and not any(ip in network for network in _SPECIAL)


def fetch(url: str, hosts: frozenset[str]) -> bytes:
    """The bytes behind a URL of an allowed host ("*": any). The address is looked up once, checked, and connected to;
    a redirect is an error. Raises ``ValueError``."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:  # a port that is no number, a bracket that is not closed
        raise ValueError(f"{url[:80]!r} is not a plain http or https URL") from error
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
        raise ValueError(f"{url[:80]!r} is not a plain http or https URL")
    if host not in hosts and "*" not in hosts:
        raise ValueError(f"host {host!r} is not allowed; start the server with --allow-host to fetch from it")
    port = port or (443 if parts.scheme == "https" else 80)
    address, until = public_address(host, port), time.monotonic() + FETCH_SECONDS
    connection = http.client.HTTPConnection(host, port, timeout=FETCH_SECONDS)
    deadline = threading.Timer(FETCH_SECONDS, lambda: connection.sock and connection.sock.shutdown(socket.SHUT_RDWR))
    try:
        connection.sock = socket.create_connection((address, port), FETCH_SECONDS)
        deadline.start()  # each read may take as long as the timeout; all of them together may not
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "diptych", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{host} answered {answer.status}; redirects are not followed")
        data = b""
        while piece := answer.read1(65536):
            data += piece
            if len(data) > FETCH_BYTES or time.monotonic() > until:
                raise ValueError(f"{host}: more than {FETCH_BYTES} bytes or {FETCH_SECONDS:g} s")
        return data
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        raise ValueError(f"{host} cannot be read: {type(error).__name__}") from error
    finally:
        deadline.cancel()
        connection.close()
