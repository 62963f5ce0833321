"""Where a judge is asked, how patiently, and about what."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from caa_lens.arguments import as_float, check_count, describe


class JudgeError(RuntimeError):
    """The endpoint cannot be used, so the run was stopped. Replies so far are kept: the same call goes on there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to ask, and how patiently.

    Attributes:
        base_url: of the API, usually ending in `/v1`.
        model: the endpoint's name for it.
        api_key: the environment's `OPENAI_API_KEY` if None; servers of your own usually want none.
        settings: what is sent beside model and messages.
        max_attempts: replies asked for about one text, at most, and requests in a row that bring none. The rate limit
            is waited for and uses up no attempt.
        concurrency: requests in flight, at most.
        requests_per_minute: requests sent, at most, evenly spaced.
        timeout: seconds for one request as a whole.

    Raises:
        ValueError: for a URL that is none, numbers out of range, or a key that cannot be sent.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    settings: Mapping[str, Any]
    max_attempts: int
    concurrency: int
    requests_per_minute: float | int | None
    timeout: float | int

    def __post_init__(self) -> None:
        for name in ("base_url", "model"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a text, got {describe(getattr(self, name))}")
        if urlsplit(self.base_url).scheme not in ("http", "https") or not urlsplit(self.base_url).hostname:
            raise ValueError(f"got base_url={self.base_url!r}, expected a URL such as 'http://localhost:8000/v1'")
        for name in ("max_attempts", "concurrency"):
            check_count(name, getattr(self, name))
        for name in ("requests_per_minute", "timeout"):
            value = getattr(self, name)
            if not (name == "requests_per_minute" and value is None) and as_float(name, value) <= 0:
                raise ValueError(f"got {name}={value}, expected a positive number")
        if reserved := ", ".join(sorted({"model", "messages", "stream", "n"} & set(self.settings))):
            raise ValueError(f"settings cannot have {reserved}: one reply to one prompt is asked for")
        if not self.key.isascii() or not self.key.isprintable():
            raise ValueError("the API key has characters that cannot be sent (it is not shown here): copy it again")

    @property
    def key(self) -> str:
        """The API key, or a stand-in: clients insist on one."""
        given = os.environ.get("OPENAI_API_KEY") if self.api_key is None else self.api_key
        return (given or "").strip() or "none"

    def hide(self, text: str) -> str:
        """A text without the key, which a server may repeat in what it says."""
        return text.replace(self.key, "***") if len(self.key) > 4 else text

    def unusable(self, why: str) -> JudgeError:
        """The error that stops a run; it names the URL without user name, password and query."""
        url = urlsplit(self.base_url)
        shown = f"{url.scheme}://{url.hostname}{f':{url.port}' if url.port else ''}{url.path}"
        return JudgeError(f"the judge at {shown} cannot be used: {why}")


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A prompt by its key; how often it was asked about, and why there is no reply now (or "")."""

    key: str
    prompt: str
    attempts: int = 0
    error: str = ""
