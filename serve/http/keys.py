"""API keys: hashed, with scopes and a rate limit each."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from invar_ray.errors import ConfigError
from serve.http.conditions import Conditions

KEY_ENV, KEYS_ENV = "INVAR_API_KEY", "INVAR_API_KEYS"
Scope = Literal["query", "admin", "metrics"]
_EMPTY = frozenset(
    hashlib.sha256(text).hexdigest() for text in (b"", b" ", b"\n", b"\r\n", b"\x00")
)
"""Hashes of what a shell makes of a variable that is not set: a key that everybody has."""
_EMPTY_HASH = "the SHA-256 of an empty key, which everybody has"
_HASH_IT = "hash a real key: printf %s KEY | sha256sum"


class ApiKey(BaseModel):
    """A key that clients may send; the key itself is known to them only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._\-]{1,64}$", description="For logs; never the key.")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="Hex SHA-256 of the key: printf %s KEY | sha256sum"
    )
    scopes: tuple[Scope, ...] = Field(("query",), min_length=1, description="What it is for.")
    requests_per_minute: int = Field(0, ge=0, description="Of one HTTP replica; 0 sets no limit.")
    where: Conditions = Field(
        Conditions(),
        description="The only passages that this key may find, e.g. {equals: {tenant: [acme]}}: on "
        "top of what a "
        "request asks for, which cannot widen it.",
    )

    @field_validator("sha256")
    @classmethod
    def _of_a_key(cls, value: str) -> str:
        if value in _EMPTY:
            raise ValueError(f"this is {_EMPTY_HASH}; {_HASH_IT}")
        return value


def keys_from_environment(environment: Mapping[str, str]) -> list[ApiKey]:
    """The keys of ``INVAR_API_KEY`` (one, in the clear, for queries) and ``INVAR_API_KEYS``.

    ``INVAR_API_KEYS`` holds ``name:sha256:scopes[:requests per minute[:conditions]]``, separated by
    commas or line breaks, scopes joined by ``+``, e.g. ``ops:9f86...:query+admin:600``.  Conditions
    bind the key to passages: ``column=value`` or ``column^=beginning``, joined by ``&``, e.g.
    ``acme:9f86...:query:0:tenant=acme``.

    White space around a key is no part of it: mounted secrets end in a line break, which no client
    can send.

    Raises:
        ConfigError: if a variable is set and holds no key, or an entry is malformed; it prints
            neither key nor hash.
    """
    keys = []
    given = environment.get(KEY_ENV)
    if given is not None:
        plain = given.strip()
        if not plain or not plain.isprintable() or " " in plain:
            raise ConfigError(
                f"{KEY_ENV} is set and "
                f"{'holds white space or control characters within' if plain else 'empty'}",
                expected="one key, without white space",
                action=f"set it to a key, or unset it (then queries need none, unless {KEYS_ENV} "
                "or api_keys has one)",
            )
        keys.append(ApiKey(name="default", sha256=hashlib.sha256(plain.encode()).hexdigest()))
    listed = environment.get(KEYS_ENV)
    entries = [entry for part in re.split(r"[,\n]", listed or "") if (entry := part.strip())]
    if listed is not None and not entries:
        raise ConfigError(
            f"{KEYS_ENV} is set and empty",
            expected="name:sha256 in hex:scopes, one or more",
            action=f"list a key, or unset it (then queries need no key, unless {KEY_ENV} or "
            "api_keys has one)",
        )
    for number, entry in enumerate(entries, start=1):
        parts = entry.split(":", 4)  # a condition's value may hold colons
        if len(parts) > 1 and parts[1].strip().lower() in _EMPTY:
            raise ConfigError(f"entry {number} of {KEYS_ENV} has {_EMPTY_HASH}", action=_HASH_IT)
        try:
            rate = int(parts[3]) if len(parts) > 3 else 0
            if len(parts) < 3:
                raise ValueError
            scopes = tuple(parts[2].split("+"))
            values = {
                "name": parts[0],
                "sha256": parts[1].lower(),
                "scopes": scopes,
                "requests_per_minute": rate,
            }
            bound = {"where": Conditions.parse(parts[4])} if len(parts) > 4 else {}
            keys.append(ApiKey.model_validate(values | bound))
        except ValueError:
            raise ConfigError(
                f"entry {number} of {KEYS_ENV} is malformed",
                expected="name:sha256 in hex:query, admin, metrics or several joined by +"
                "[:requests per minute[:column=value&..]]",
            ) from None
    return keys


def service_keys(configured: Sequence[ApiKey], environment: Mapping[str, str]) -> list[ApiKey]:
    """All keys of a service: those of its configuration and those of the environment.

    Raises:
        ConfigError: see :func:`keys_from_environment` and :class:`KeyRing`.
    """
    keys = [*configured, *keys_from_environment(environment)]
    KeyRing(keys)
    return keys


class KeyRing:
    """Recognises keys in constant time and counts what each may still ask.

    Args:
        keys: the keys; none lets everyone query and nobody administrate.

    Raises:
        ConfigError: two of them have one name, or are one key.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        names = [key.name for key in keys]
        if len(set(names)) < len(names):
            raise ConfigError(
                "two API keys have one name",
                expected="a name for each, by which logs tell them apart",
            )
        first: dict[str, str] = {}
        for key in keys:
            if key.sha256 in _EMPTY:
                raise ConfigError(f"API key {key.name} has {_EMPTY_HASH}", action=_HASH_IT)
            if key.sha256 in first:
                raise ConfigError(
                    f"API keys {first[key.sha256]} and {key.name} are one key: the hash is the "
                    "same",
                    expected="a key for each name, or the conditions and scopes of one of them "
                    "would be lost",
                    action="make another key for one of them, or take one entry out",
                )
            first[key.sha256] = key.name
        self._keys = list(keys)
        self._buckets: dict[str, tuple[float, float]] = {}  # name -> (tokens, time)

    @property
    def open(self) -> bool:
        """Whether queries need no key."""
        return not self._keys

    def find(self, given: bytes) -> ApiKey | None:
        """The key that was sent, if it is one of ours.  Every key is compared, whichever fits;
        nothing sent is none.
        """
        digest = hashlib.sha256(given).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found if given.strip() else None

    def wait_s(self, key: ApiKey) -> float:
        """0 and one request counted, or the seconds until the key may ask again (a token bucket of
        a minute).
        """
        if key.requests_per_minute == 0:
            return 0.0
        now, rate = time.monotonic(), key.requests_per_minute / 60
        tokens, last = self._buckets.get(key.name, (float(key.requests_per_minute), now))
        tokens = min(float(key.requests_per_minute), tokens + (now - last) * rate)
        if tokens < 1:
            self._buckets[key.name] = tokens, now
            return (1 - tokens) / rate
        self._buckets[key.name] = tokens - 1, now
        return 0.0
