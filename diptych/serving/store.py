"""Pictures kept in memory for a while: uploads, and pictures asked for by URL."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from diptych.serving.options import Limits


@dataclass(frozen=True)
class StoredFile:
    """The bytes of a picture, its media type, and until when (``time.monotonic``) it is kept."""

    data: bytes
    media: str
    until: float


class FileStore:
    """Files under ids that cannot be guessed. Where they exceed ``Limits.stored_bytes`` the oldest are dropped."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.files, self.bytes = limits, OrderedDict[str, StoredFile](), 0

    def put(self, data: bytes, media: str) -> str:
        """Stores a file and returns its id."""
        key = f"file-{secrets.token_hex(16)}"
        now = time.monotonic()
        self.files[key] = StoredFile(data, media, now + self.limits.stored_seconds)
        self.bytes += len(data)
        while self.files and (self.bytes > self.limits.stored_bytes or next(iter(self.files.values())).until < now):
            self.drop(next(iter(self.files)))
        return key

    def get(self, key: str) -> StoredFile | None:
        """The file of an id; None for an unknown or deleted one."""
        file = self.files.get(key)
        return file if file and file.until >= time.monotonic() else None

    def drop(self, key: str) -> bool:
        """Deletes a file. Returns False for an unknown id."""
        file = self.files.pop(key, None)
        self.bytes -= len(file.data) if file else 0
        return file is not None
