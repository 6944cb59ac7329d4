"""Which split a request belongs to, by a stable hash of itself alone: new domains never move old requests."""

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from needle.schema import Example

Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class SplitRule:
    """`domains`: the slice that is used (null: all); `unseen_domains` are held out whole."""

    validation_frac: Share
    test_frac: Share
    salt: str
    unseen_domains: tuple[str, ...]
    domains: tuple[str, ...] | None

    def assign(self, example: Example) -> str:
        if example.domain in self.unseen_domains:
            return "unseen"
        key = f"{self.salt}|{self.words(example.query)}"
        position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        if position < self.test_frac:
            return "test"
        return "validation" if position < self.test_frac + self.validation_frac else "train"

    @staticmethod
    def words(query: str) -> str:
        """Without digits and punctuation, so that requests that differ in a number only stay together."""
        return " ".join(re.findall(r"[^\W\d_]+", query.lower()))

    def uses(self, domain: str) -> bool:
        return self.domains is None or domain in self.domains
