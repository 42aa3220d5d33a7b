"""Addresses of model servers, and how to write about them without their secrets.

An address may hold a secret: a user and password (``https://user:password@host/v1``) or a key in the query
(``https://host/v1?key=...``). Requests use the whole address. Everything that is written, printed or raised uses
``public_address`` and ``without_secrets``.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

HIDDEN = "***"
NO_KEY = "none"  # what is sent to a server that asks for no key


def public_address(url: str) -> str:
    """The address without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def query(url: str) -> dict[str, str]:
    """The parameters in the address's query."""
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def without_secrets(text: str, url: str, key: str = NO_KEY) -> str:
    """``text`` with the address made public, and its secrets and the key replaced by ``***``."""
    text = text.replace(url, public_address(url))
    parts = urlsplit(url)
    secrets = [parts.netloc.rpartition("@")[0], parts.password or "", parts.query, *query(url).values()]
    secrets += [unquote(secret) for secret in secrets] + ([key] if key != NO_KEY else [])
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) > 3:  # a shorter one is part of ordinary words
            text = text.replace(secret, HIDDEN)
    return text
