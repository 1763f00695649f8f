"""API keys: hashed, with scopes and a rate limit each."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from invar_ray.errors import ConfigError
from serve.conditions import Conditions

KEY_ENV, KEYS_ENV = "INVAR_API_KEY", "INVAR_API_KEYS"
Scope = Literal["query", "admin"]


class ApiKey(BaseModel):
    """A key that clients may send; the key itself is known to them only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._\-]{1,64}$", description="For logs; never the key.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Hex SHA-256 of the key: printf %s KEY | sha256sum")
    scopes: tuple[Scope, ...] = Field(("query",), min_length=1, description="What it is for.")
    requests_per_minute: int = Field(0, ge=0, description="Of one HTTP replica; 0 sets no limit.")
    where: Conditions = Field(
        Conditions(),
        description="The only passages that this key may find, e.g. {equals: {tenant: [acme]}}: on top of what a "
        "request asks for, which cannot widen it.",
    )


def keys_from_environment(environment: Mapping[str, str]) -> list[ApiKey]:
    """The keys of ``INVAR_API_KEY`` (one, in the clear, for queries) and ``INVAR_API_KEYS``.

    ``INVAR_API_KEYS`` holds ``name:sha256:scopes[:requests per minute[:conditions]]``, separated by commas or line
    breaks, scopes joined by ``+``, e.g. ``ops:9f86...:query+admin:600``.  Conditions bind the key to passages:
    ``column=value`` or ``column^=beginning``, joined by ``&``, e.g. ``acme:9f86...:query:0:tenant=acme``.

    Raises:
        ConfigError: if an entry is malformed; it never prints the entry's hash.
    """
    keys = []
    plain = environment.get(KEY_ENV)
    if plain:
        keys.append(ApiKey(name="default", sha256=hashlib.sha256(plain.encode()).hexdigest()))
    entries = [entry.strip() for entry in re.split(r"[,\n]", environment.get(KEYS_ENV, ""))]
    for number, entry in enumerate((entry for entry in entries if entry), start=1):
        parts = entry.split(":", 4)  # a condition's value may hold colons
        try:
            rate = int(parts[3]) if len(parts) > 3 else 0
            if len(parts) < 3:
                raise ValueError
            scopes = tuple(parts[2].split("+"))
            values = {"name": parts[0], "sha256": parts[1].lower(), "scopes": scopes, "requests_per_minute": rate}
            bound = {"where": Conditions.parse(parts[4])} if len(parts) > 4 else {}
            keys.append(ApiKey.model_validate(values | bound))
        except ValueError:
            raise ConfigError(
                f"entry {number} of {KEYS_ENV} is malformed",
                expected="name:sha256 in hex:query or admin or query+admin[:requests per minute[:column=value&..]]",
            ) from None
    return keys


class KeyRing:
    """Recognises keys in constant time and counts what each may still ask.

    Args:
        keys: the keys; none lets everyone query and nobody administrate.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        names = [key.name for key in keys]
        if len(set(names)) < len(names):
            raise ConfigError("two API keys have one name", expected="a name for each, by which logs tell them apart")
        self._keys = list(keys)
        self._buckets: dict[str, tuple[float, float]] = {}  # name -> (tokens, time)

    @property
    def open(self) -> bool:
        """Whether queries need no key."""
        return not self._keys

    def find(self, given: bytes) -> ApiKey | None:
        """The key that was sent, if it is one of ours.  Every key is compared, whichever fits."""
        digest = hashlib.sha256(given).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found

    def wait_s(self, key: ApiKey) -> float:
        """0 and one request counted, or the seconds until the key may ask again (a token bucket of a minute)."""
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
