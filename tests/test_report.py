"""The HTML page: complete, self-contained, and safe against what models write."""

import re

import pandas as pd
import plotly.graph_objects as go
import pytest

from caa_lens.report import Section, write_report

EVIL = "<script>alert('x')</script> & </td>"


def page(tmp_path) -> str:
    path = write_report(
        tmp_path / "report.html",
        title=EVIL,
        lead="lead",
        sections=[
            Section(
                title="one",
                text=EVIL,
                figures=[go.Figure(go.Scatter(x=[1], y=[2], name=EVIL))],
                texts=[(EVIL, [("+1", EVIL)])],
                tables=[pd.DataFrame({EVIL: [EVIL, 0.123456]})],
            )
        ],
        settings={"model": EVIL},
    )
    return path.read_text(encoding="utf-8")


def test_text_from_models_and_data_is_escaped_everywhere(tmp_path):
    assert "<script>alert" not in page(tmp_path)
    assert page(tmp_path).count("&lt;script&gt;alert") >= 7


def test_the_page_asks_the_network_for_nothing(tmp_path):
    html = page(tmp_path)
    assert not re.findall(r"<(?:script|img|iframe)[^>]+src=", html)
    assert not re.findall(r"<link[^>]+href=[\"'](?!data:)", html)


def test_the_plotly_script_is_put_in_once_and_figures_use_it(tmp_path):
    html = page(tmp_path)
    assert html.count("Plotly.newPlot(") >= 1
    assert len(html) < 8_000_000


def test_numbers_in_tables_are_rounded_for_reading(tmp_path):
    assert "<td>0.1235</td>" in page(tmp_path)


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    page(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        page(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
