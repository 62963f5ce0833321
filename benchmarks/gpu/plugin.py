"""A pytest plugin for `make gpu`: keeps each test's outcome as it comes, and skips what a left-out package would do.

Tests that passed in an earlier run with the same file of outcomes are not run again.
"""

import json
import os
from typing import Any

import pytest

from .outcomes import path, read, reason


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    done = {test for test, outcome in read(path()).items() if outcome in ("passed", "skipped")}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    if call.excinfo is not None and report.failed and (why := reason(call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1] or 0, f"Skipped: {why}")
    return report


def pytest_runtest_logreport(report: Any) -> None:
    file = path()
    final = report.when == "call" or report.outcome != "passed"
    if (
        file is None
        or not final
        or "PYTEST_XDIST_WORKER" in os.environ
        or (report.when == "teardown" and report.passed)
    ):
        return
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps([report.nodeid, report.outcome]) + "\n")
