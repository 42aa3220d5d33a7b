"""How a server behaves: its options, and the limits of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Limits:
    """What one request and one address may take; ``GET /v1/models`` shows them."""

    header_bytes: int = 16 * 2**10
    body_bytes: int = 32 * 2**20  # of one request
    bodies_bytes: int = 512 * 2**20  # of all requests that are being received or answered
    json_depth: int = 32
    pixels: int = 16_000_000  # of a picture sent
    drawn: int = 2048 * 2048  # pixels of a picture drawn
    pictures: int = 8  # of one request
    prompt: int = 8_000  # characters, the whole conversation
    new_tokens: int = 1_024
    steps: int = 200
    n: int = 10
    stored_bytes: int = 128 * 2**20  # uploads, and pictures asked for by URL
    stored_seconds: int = 3_600
    requests: int = 512  # being answered at the same time, those in the queues included
    connections: int = 4_096  # open at the same time; fewer where the process may open fewer files
    connections_per_address: int = 1_024
    header_seconds: float = 10.0  # to send a request's header, from its first byte or the connection on
    body_seconds: float = 60.0  # to send a request's body
    idle_seconds: int = 30  # between two requests of a connection
    write_seconds: float = 60.0  # a client may leave an answer unread


@dataclass(frozen=True)
class Options:
    """How a server behaves."""

    keys: tuple[str, ...] = ()  # API keys; none: everybody may use the server
    slots: int = 16  # requests that run together, for each model
    queue: int = 64  # requests that may wait, for each model
    timeout: float = 120.0  # seconds for a request
    grace: float = 30.0  # seconds to finish at shutdown
    rate: float | None = None  # requests a minute, for each key (without keys: each address)
    hosts: frozenset[str] = frozenset()  # hosts whose pictures may be fetched by URL; "*": any public host
    runs: Path | None = None  # folder of training runs to show
    log_prompts: bool = False
    quiet: bool = False  # no log line for each request
    strict: bool = False  # parameters without effect are refused instead of ignored
    origins: frozenset[str] = frozenset()  # other sites whose pages may use the server; "*": any site
    host_names: tuple[str, ...] = ()  # names, beside localhost and the bound address, that reach this server
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("slots", "queue", "timeout", "rate"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0, not {value}")
        for origin in self.origins - {"*"}:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"an origin is like http://localhost:3000, without a path, or *; not {origin!r}")
        if not self.grace >= 0:
            raise ValueError(f"grace must be at least 0, not {self.grace}")


def public_name(name: str) -> str:
    """The name of a model for clients. For a folder it is the last part of the path."""
    if not Path(name).is_dir():
        return name
    folder = Path(name).resolve()
    return folder.parent.name if folder.name == "release" else folder.name


def read_keys(file: Path) -> tuple[str, ...]:
    """The keys of a file with one a line; ``#`` begins a comment line. Raises ``ValueError`` for a file without any."""
    lines = [line.strip() for line in file.read_text("utf-8").split("\n")]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{file} holds no key; write one a line")
    return keys
