"""Ask an OpenAI-compatible endpoint many things at once, without losing patience or money.

The `openai` client asks again what met a time-out, a cut connection, an error of the server or the rate limit (429):
after half a second, twice as long each time up to eight, or as long as the endpoint asks (`Retry-After`, up to two
minutes). What it does not do: `tenacity` waits on where the rate limit outlasts it, `pyrate_limiter` spaces requests;
a body that does not end is a time-out here, and one that is no chat completion a cut connection. What will never work
(a wrong key, an unknown model, nobody listening) stops everything; a request that is refused for itself (400, such as a
text too long) fails alone.
"""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import httpx2
import openai
import tenacity
from anyio.from_thread import start_blocking_portal
from pyrate_limiter import Limiter
from pyrate_limiter.limiter_factory import create_token_bucket_limiter

from caa_lens.measures.open_ended.judge_endpoint import Endpoint, Request

LONGEST_LIMIT = 600.0  # seconds in which the rate limit may hold up one request before we rather stop
_NO_COMPLETION = "what came back is no chat completion"

Keep = Callable[[Request, str, str], bool]
"""Takes a request, the reply and its finish reason; keeps the reply; says whether it will do."""


def ask_all(
    endpoint: Endpoint, requests: Sequence[Request], keep: Keep, *, used_before: bool, done: Callable[[], object]
) -> None:
    """Ask everything; give `keep` every reply as it comes; attempts and errors are written into the requests.

    Args:
        used_before: whether this endpoint's settings are known to work, so that a refusal speaks of one text only.
        done: called once a request is settled.

    Raises:
        JudgeError: if the endpoint cannot be used.
    """
    gap = math.ceil(60_000 / endpoint.requests_per_minute) if endpoint.requests_per_minute else 0  # milliseconds
    with (
        create_token_bucket_limiter(1, gap, buffer_ms=0) if gap else nullcontext() as limiter,
        # A thread of its own, because a notebook already runs an event loop in this one; Ctrl-C cancels it.
        start_blocking_portal() as portal,
    ):
        portal.call(_Judge(endpoint, keep, used_before).ask_all, requests, limiter, done)


class _Judge:
    """An endpoint, what becomes of its replies, and whether it is known to work."""

    def __init__(self, endpoint: Endpoint, keep: Keep, works: bool) -> None:
        self.endpoint, self.keep, self.works = endpoint, keep, works

    async def ask_all(self, requests: Sequence[Request], limiter: Limiter | None, done: Callable[[], object]) -> None:
        e, slots = self.endpoint, asyncio.Semaphore(self.endpoint.concurrency)

        async def in_turn(request: httpx2.Request) -> None:
            if limiter is not None:
                await limiter.try_acquire_async()

        async def settle(request: Request) -> None:
            async with slots:
                await self._settle(client, request)
            done()

        http_client = openai.DefaultAsyncHttpxClient(event_hooks={"request": [in_turn], "response": [self._check_body]})
        async with openai.AsyncOpenAI(
            base_url=e.base_url,
            api_key=e.key,
            timeout=e.timeout,
            max_retries=e.max_attempts - 1,
            http_client=http_client,
        ) as client:
            await settle(requests[0])  # alone: it shows whether the endpoint can be used
            self.works = True
            try:
                async with asyncio.TaskGroup() as group:
                    for request in requests[1:]:
                        group.create_task(settle(request))
            except BaseExceptionGroup as several:
                raise several.exceptions[0] from None

    async def _settle(self, client: openai.AsyncOpenAI, request: Request) -> None:
        """Ask until a reply will do, or the attempts are used up."""
        while request.attempts < self.endpoint.max_attempts:
            request.attempts += 1
            try:
                raw, finish_reason = await self._ask(client, request.prompt)
            except openai.APIError as error:
                request.error = self._told(error, client)
                if not _of_the_text(error):
                    request.attempts = self.endpoint.max_attempts
                return
            if self.keep(request, self.endpoint.hide(raw), finish_reason):
                return

    async def _ask(self, client: openai.AsyncOpenAI, prompt: str) -> tuple[str, str]:
        """A reply and its finish reason, however often the client meets the rate limit."""
        patiently = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: _is_rate_limit(error) and not _gave_up(error, client)),
            wait=tenacity.wait_random_exponential(max=60),
            stop=tenacity.stop_after_delay(LONGEST_LIMIT),
            reraise=True,
        )
        response: Any = await patiently(
            client.chat.completions.with_raw_response.create,
            model=self.endpoint.model,
            messages=[{"role": "user", "content": prompt}],
            extra_body=dict(self.endpoint.settings),
        )
        return _content(response.http_response.text)

    async def _check_body(self, response: httpx2.Response) -> None:
        """Have the client ask again after a body that does not end in time, or is no chat completion."""
        try:
            async with asyncio.timeout(self.endpoint.timeout):  # the client's own starts anew with every byte
                await response.aread()
            if response.is_success:
                _content(response.text)
        except TimeoutError:
            raise httpx2.ReadTimeout("the body did not end") from None
        except ValueError:
            raise httpx2.RemoteProtocolError(_NO_COMPLETION) from None

    def _told(self, error: openai.APIError, client: openai.AsyncOpenAI) -> str:
        """Why a request has no reply, in words; a `JudgeError` if no other would have one."""
        if isinstance(error, openai.APITimeoutError):
            return f"no reply within {self.endpoint.timeout:g} s"
        if not isinstance(error, openai.APIStatusError):
            if isinstance(error.__cause__, httpx2.ConnectError):
                why = "nobody listens there: is the server running, and is base_url right?"
                raise self.endpoint.unusable(why) from None
            return _NO_COMPLETION if str(error.__cause__) == _NO_COMPLETION else "the connection was cut"
        status, said = error.status_code, self.endpoint.hide(" ".join(str(error).split()))[:300]
        wait, why = error.response.headers.get("retry-after"), ""
        if status in (401, 403):
            # Not what the server said, which may quote the key.
            why = f"it refuses the API key ({status}): pass api_key=..., or set OPENAI_API_KEY"
        elif status == 404:
            why = f"it knows no model {self.endpoint.model!r}, or base_url lacks its '/v1': {said}"
        elif error.code == "insufficient_quota":
            why = f"the account's quota is used up: {said}"
        elif wait and _gave_up(error, client):
            why = f"it asks to wait too long (Retry-After: {wait}): {said}"
        elif _is_rate_limit(error) and not _gave_up(error, client):
            why = f"its rate limit held up a request for {LONGEST_LIMIT:g} s: {said}"
        elif _of_the_text(error) and not self.works:
            why = f"it refuses the first request, the shortest of all; see settings=...: {said}"
        if why:
            raise self.endpoint.unusable(why) from None  # the client's error may hold the key
        return said


def _is_rate_limit(error: BaseException) -> bool:
    return isinstance(error, openai.RateLimitError) and error.code != "insufficient_quota"


def _of_the_text(error: openai.APIError) -> bool:
    """Whether a request was refused for itself."""
    return isinstance(error, openai.APIStatusError) and error.status_code < 500 and error.status_code not in (408, 409)


def _gave_up(error: Any, client: openai.AsyncOpenAI) -> bool:
    """Whether the client stopped before its last attempt: the endpoint told it to, or asks to wait too long."""
    return int(error.request.headers["x-stainless-retry-count"]) < client.max_retries


def _content(body: str) -> tuple[str, str]:
    """Text and finish reason of a chat completion's first choice; a `ValueError` for any other body."""
    try:
        choice = json.loads(body)["choices"][0]
        content, finish_reason = choice["message"].get("content"), choice.get("finish_reason")
        if not isinstance(content, str | None):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(_NO_COMPLETION) from None
    return content or "", str(finish_reason or "")
