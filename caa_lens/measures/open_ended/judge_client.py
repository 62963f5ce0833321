"""Ask an OpenAI-compatible endpoint many things at once, without losing patience or money.

Trouble is of three kinds. What says nothing about a request (time-outs, cut connections, 5xx, bodies that are no chat
completion) is tried again after a wait that doubles each time; the rate limit (429) makes all wait, as long as the
endpoint asks, and uses up no attempt; what will never work (a wrong key, an unknown model, nobody listening) stops
everything at once. A request that is refused for itself (400, such as a text too long) fails alone.
"""

import asyncio
import json
import math
import numbers
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from caa_lens.arguments import as_seed, check_count, describe

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 600.0  # seconds that an endpoint may ask for before we rather stop


class JudgeError(RuntimeError):
    """The endpoint cannot be used, so the run was stopped. Replies so far are kept: the same call goes on there."""


class _Trouble(Exception):
    """A request without a reply: what happened, whether to try again, and how long the endpoint asks to wait."""

    def __init__(self, text: str, *, again: bool = True, wait: float | None = None, status: int = 0) -> None:
        super().__init__(text)
        self.text, self.again, self.wait, self.status = text, again, wait, status


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to ask, and how patiently.

    Attributes:
        base_url: of the API, usually ending in `/v1`.
        model: the endpoint's name for it.
        api_key: the environment's `OPENAI_API_KEY` if None; servers of your own usually want none.
        settings: what is sent beside model and messages.
        max_attempts: requests for one text, at most; those that met the rate limit do not count.
        concurrency: requests in flight, at most.
        requests_per_minute: requests sent, at most, evenly spaced.
        timeout: seconds for one request as a whole.
        backoff: seconds before the second attempt, half of it by chance; it doubles from attempt to attempt.
        seed: of that chance.

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
    backoff: float | int
    seed: int

    def __post_init__(self) -> None:
        for name in ("base_url", "model"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a text, got {describe(getattr(self, name))}")
        if urlsplit(self.base_url).scheme not in ("http", "https") or not urlsplit(self.base_url).hostname:
            raise ValueError(f"got base_url={self.base_url!r}, expected a URL such as 'http://localhost:8000/v1'")
        limits = {"max_attempts": 1, "concurrency": 1, "requests_per_minute": 1e-9, "timeout": 1e-9, "backoff": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is None and name == "requests_per_minute":
                continue
            if name in ("max_attempts", "concurrency"):
                check_count(name, value, least=None)
            elif isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {describe(value)}")
            if not least <= value < math.inf:
                raise ValueError(f"got {name}={value}, expected {'a positive number' if least else '0 or more'}")
        as_seed(self.seed)
        if reserved := {"model", "messages", "stream", "n"} & set(self.settings):
            raise ValueError(
                f"settings cannot have {', '.join(sorted(reserved))}: one reply to one prompt is asked for"
            )
        if not self.key.isascii() or not self.key.isprintable():
            raise ValueError("the API key has characters that cannot be sent (it is not shown here): copy it again")

    @property
    def key(self) -> str:
        """The API key, or a stand-in: clients insist on one."""
        given = os.environ.get("OPENAI_API_KEY") if self.api_key is None else self.api_key
        return (given or "").strip() or "none"

    @property
    def shown(self) -> str:
        """The URL without user name, password and query."""
        url = urlsplit(self.base_url)
        return f"{url.scheme}://{url.hostname}{f':{url.port}' if url.port else ''}{url.path}"

    def hide(self, text: str) -> str:
        """A text without the key, which a server may repeat in what it says."""
        return text.replace(self.key, "***") if len(self.key) > 4 else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, by its key, and how many attempts it has had already."""

    key: str
    prompt: str
    attempts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request has no reply, after so many attempts."""

    attempts: int
    error: str


Keep = Callable[[Request, int, str, str], bool]
"""Takes a request, the attempt, the reply and its finish reason; keeps it; says whether it will do."""


def ask_all(
    endpoint: Endpoint, requests: Sequence[Request], keep: Keep, *, used_before: bool, done: Callable[[], object]
) -> dict[str, Failure]:
    """Ask everything; give `keep` every reply as it comes; the failures by key.

    Args:
        used_before: whether this endpoint's settings are known to work, so that a refusal speaks of one text only.
        done: called once a request is settled.

    Raises:
        ImportError: without the `openai` client.
        JudgeError: if the endpoint cannot be used.
    """
    try:
        import openai  # noqa: F401
        from anyio.from_thread import start_blocking_portal
    except ImportError:
        raise ImportError("judging needs the openai client: pip install 'caa-lens[judge]'") from None

    asking = _Asking(endpoint, keep, used_before, done)
    # A thread of its own, because a notebook already runs an event loop in this one; Ctrl-C cancels it.
    with start_blocking_portal() as portal:
        portal.call(asking.run, requests)
    return asking.failures


class _Asking:
    """One run: what its workers share."""

    def __init__(self, endpoint: Endpoint, keep: Keep, used_before: bool, done: Callable[[], object]) -> None:
        self.endpoint, self.keep, self.done = endpoint, keep, done
        self.works = used_before
        self.failures: dict[str, Failure] = {}
        self.limited = 0  # 429s in a row
        self.not_before = 0.0  # on the event loop's clock

    async def run(self, requests: Sequence[Request]) -> None:
        import openai

        self.opened = asyncio.Event()
        e = self.endpoint
        async with openai.AsyncOpenAI(
            base_url=e.base_url, api_key=e.key, timeout=e.timeout, max_retries=0
        ) as self.client:
            waiting = iter(requests)
            workers = [asyncio.create_task(self._work(waiting, first=i == 0)) for i in range(e.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, waiting: Iterable[Request], *, first: bool) -> None:
        if not first:
            await self.opened.wait()  # the first request goes alone: it shows whether the endpoint can be used
        for request in waiting:
            await self._settle(request)
            self.done()

    async def _settle(self, request: Request) -> None:
        """Ask until a reply will do, or the attempts are used up."""
        attempt = request.attempts + 1
        while attempt <= self.endpoint.max_attempts:
            await self._turn()
            try:
                raw, finish_reason = await self._ask(request.prompt)
            except _Trouble as trouble:
                limited = trouble.status == 429
                if limited or trouble.wait is not None:
                    self._wait_for_all(trouble, request.key)
                self.opened.set()
                if limited:
                    continue
                self.failures[request.key] = Failure(attempts=attempt, error=trouble.text)
                if not trouble.again:
                    return
                if trouble.wait is None and attempt < self.endpoint.max_attempts:
                    await asyncio.sleep(self._backoff(request.key, attempt))
            else:
                self.opened.set()
                self.works, self.limited = True, 0
                self.failures.pop(request.key, None)
                if self.keep(request, attempt, self.endpoint.hide(raw), finish_reason):
                    return
            attempt += 1
        if self.failures.get(request.key, Failure(attempts=0, error="")).error == _NOBODY:
            raise self._stop("nobody listens there any more")

    async def _turn(self) -> None:
        """Wait for the rate limit: the user's own, and what the endpoint asks for."""
        clock = asyncio.get_running_loop().time
        while (wait := self.not_before - clock()) > 0:
            await asyncio.sleep(wait)
        per_minute = self.endpoint.requests_per_minute
        self.not_before = clock() + (60 / per_minute if per_minute else 0)

    def _wait_for_all(self, trouble: _Trouble, key: str) -> None:
        if trouble.status == 429:
            self.limited += 1
            if self.limited > self.endpoint.concurrency * self.endpoint.max_attempts:
                raise self._stop(f"it let nothing through in {self.limited} requests: {trouble.text}")
        wait = self._backoff(key, self.limited) if trouble.wait is None else trouble.wait
        if wait > LONGEST_WAIT:
            raise self._stop(f"it asks to wait {wait:.0f} s: {trouble.text}")
        self.not_before = max(self.not_before, asyncio.get_running_loop().time() + wait)

    def _backoff(self, key: str, attempt: int) -> float:
        # By request and attempt, so that the waits do not depend on which worker comes first.
        chance = random.Random(f"{self.endpoint.seed}:{key}:{attempt}").uniform(0.5, 1)
        return min(LONGEST_BACKOFF, self.endpoint.backoff * 2.0 ** min(attempt - 1, 30)) * chance

    async def _ask(self, prompt: str) -> tuple[str, str]:
        """The reply to one request, and why it ended there; or `_Trouble`, or a `JudgeError`."""
        import openai

        try:
            # All of it, the body included: the client's own time-out starts anew with every byte.
            async with asyncio.timeout(self.endpoint.timeout):
                response = await self.client.chat.completions.with_raw_response.create(
                    model=self.endpoint.model,
                    messages=[{"role": "user", "content": prompt}],
                    extra_body=dict(self.endpoint.settings),
                )
        except (TimeoutError, openai.APITimeoutError):
            raise _Trouble(f"no reply within {self.endpoint.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:
            # By name, as the class belongs to one of two libraries, depending on the client's version.
            if type(error.__cause__).__name__ != "ConnectError":
                raise _Trouble("the connection was cut") from None
            if not self.opened.is_set():
                raise self._stop("nobody listens there: is the server running, and is base_url right?") from None
            raise _Trouble(_NOBODY) from None
        return _content(response.http_response.text)

    def _refused(self, error: Any) -> _Trouble | JudgeError:
        status, said = error.status_code, self.endpoint.hide(" ".join(str(error).split()))[:300]
        if status in (401, 403):
            # Not what the server said, which may quote the key.
            return self._stop(f"it refuses the API key ({status}): pass api_key=..., or set OPENAI_API_KEY")
        if status == 404:
            return self._stop(f"it knows no model {self.endpoint.model!r}, or base_url lacks its '/v1': {said}")
        if status == 429 and error.code == "insufficient_quota":
            return self._stop(f"the account's quota is used up: {said}")
        if status in (408, 409, 429) or status >= 500:
            return _Trouble(said, wait=_retry_after(error.response.headers), status=status)
        if not self.works and not self.opened.is_set():
            return self._stop(f"it refuses the first request, the shortest of all; see settings=...: {said}")
        return _Trouble(said, again=False)

    def _stop(self, why: str) -> JudgeError:
        return JudgeError(f"the judge at {self.endpoint.shown} cannot be used: {why}")


_NOBODY = "nobody listens there"


def _content(body: str) -> tuple[str, str]:
    """Text and finish reason of a chat completion's first choice; `_Trouble` for any other body."""
    try:
        choice = json.loads(body)["choices"][0]
        content, finish_reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Trouble("what came back is no chat completion") from None
    if not isinstance(content, str | None):
        raise _Trouble("what came back is no chat completion")
    return content or "", str(finish_reason or "")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks to wait: a number or a date; None if it says nothing that can be read."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
