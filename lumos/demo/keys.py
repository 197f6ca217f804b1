"""API keys: who may use the HTTP API, and how much.

A file of keys is YAML. Each entry has the name of a client and either its key or a mapping:

    alice: 3f9c0e51a8d24b76
    bob: {key: 8e41b7d09c5f2a63, queue_length: 4, clips_per_hour: 100}
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from lumos.demo.limits import ServerBusy
from lumos.errors import UserError, instead, shown
from lumos.files import parse_yaml, read_text
from lumos.settings import is_whole

HOUR = 3600  # seconds
SHORTEST = 16  # characters of a key
MAX_KEYS_BYTES = 2**20
NAME = re.compile(r"[\w.@-]{1,64}")
KEY = re.compile(rf"[\w.~+/=-]{{{SHORTEST},256}}", re.ASCII)  # the characters that RFC 6750 allows, and _


@dataclass(frozen=True)
class Key:
    """A client of the API with its limits; None is no limit.

    digest          SHA-256 of the key
    queue_length    clips of this client that may wait or be made at a time
    clips_per_hour  clips that the client may ask for within any 3600 seconds
    """

    name: str
    digest: bytes = b""
    queue_length: int | None = None
    clips_per_hour: int | None = None


ANYONE = Key("")
"""The client of a request to a server without keys."""
LIMITS = tuple(entry.name for entry in fields(Key) if entry.name not in ("name", "digest"))


class Keys:
    """The keys of a server. Without any, every request is allowed and its client is ANYONE."""

    def __init__(self, keys: Sequence[Key] = (), clock: Callable[[], float] = time.monotonic):
        self.keys, self._clock, self._lock = tuple(keys), clock, threading.Lock()
        self._asked: dict[str, deque[float]] = {key.name: deque() for key in keys}  # time of each clip of the last hour

    def client(self, authorization: str | None) -> Key:
        """Return the client with the bearer token of an Authorization header; HTTPException with status 401 if there is none."""
        if not self.keys:
            return ANYONE
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode(errors="replace")).digest()
        # Every key is compared, so that the time of the answer tells nothing.
        found = [key for key in self.keys if hmac.compare_digest(key.digest, digest)]
        if scheme.lower() != "bearer" or not found:
            what = "the key is unknown" if token and scheme.lower() == "bearer" else "a key is needed"
            raise HTTPException(401, f"{what}; send the header Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
        return found[0]

    @contextmanager
    def counted(self, key: Key, clips: int) -> Iterator[None]:
        """Count clips that a client asks for in the block; an error in the block takes them back.

        ServerBusy if they exceed what is left of its clips_per_hour, UserError if they never fit.
        """
        if key.clips_per_hour is None:
            yield
            return
        if clips > key.clips_per_hour:
            raise UserError(f"{clips} clips are more than this key may have in an hour ({key.clips_per_hour}); ask for fewer")
        asked = self._take(key, clips)
        try:
            yield
        except BaseException:
            with self._lock:
                for _ in range(clips):
                    asked.pop()
            raise

    def _take(self, key: Key, clips: int) -> deque[float]:
        with self._lock:
            asked, now = self._asked[key.name], self._clock()
            while asked and asked[0] <= now - HOUR:
                asked.popleft()
            if (surplus := len(asked) + clips - key.clips_per_hour) > 0:
                wait = math.ceil(asked[surplus - 1] + HOUR - now)
                raise ServerBusy(f"this key may have {key.clips_per_hour} clips in an hour; try again in {wait} s", wait)
            asked.extend([now] * clips)
            return asked


def read_keys(path: str | Path) -> Keys:
    """Return the keys of a file; UserError for a file of another form, without saying a key in the message."""
    found = parse_yaml(read_text(path, "API keys", MAX_KEYS_BYTES, pipes=True), str(path))
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} holds no keys; write one a line, NAME: KEY")
    keys = [key_of(name, entry, f"{path}: {shown(name, 70)}") for name, entry in found.items()]
    if len({key.digest for key in keys}) < len(keys):
        raise UserError(f"{path}: two names have the same key; give each its own")
    return Keys(keys)


def key_of(name: Any, entry: Any, where: str) -> Key:
    """Return the key of an entry of a file; `where` begins the message of a UserError."""
    entry = entry if isinstance(entry, dict) else {"key": entry}
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where} is no name of a client; give up to 64 letters, digits and . @ - _")
    if unknown := [option for option in entry if option not in ("key", *LIMITS)]:
        raise UserError(f"{where}: {shown(unknown[0])} is unknown{instead(unknown[0], ('key', *LIMITS), 'known are')}")
    if not isinstance(entry.get("key"), str) or not KEY.fullmatch(entry["key"]):
        raise UserError(f"{where}: the key is not allowed; give {SHORTEST} to 256 letters, digits and . ~ + / = - _, in quotes if "
                        "all are digits")  # fmt: skip
    limits = {limit: entry[limit] for limit in LIMITS if limit in entry}
    for limit, value in limits.items():
        if not is_whole(value) or value < 1:
            raise UserError(f"{where}: {limit} {shown(value)} is not allowed; give a whole number of at least 1")
    return Key(name, hashlib.sha256(entry["key"].encode()).digest(), **limits)
