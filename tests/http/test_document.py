"""docs/http_api.md names every route with its scope, every error with its status, and every limit with its default."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from runtime.http.auth import SCOPES
from runtime.http.config import HttpConfig
from runtime.http.errors import STATUS
from runtime.http.routes import ROUTES

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "http_api.md").read_text()


def rows(heading):
    """Cells of the first table under a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_routes():
    def scope(route):
        if route.scopes == set(SCOPES):
            return "any"
        return " or ".join(sorted(route.scopes, reverse=True)) or "none"

    assert [(row[0], row[1]) for row in rows("Routes")] == [
        (f"`{route.method} {route.path}`", scope(route)) for route in ROUTES
    ]


def test_errors():
    documented = {(int(row[0]), code) for row in rows("Errors") for code in re.findall(r"`(\w+)`", row[1])}
    assert documented - {(503, "not_ready")} == {(status, cls.code) for cls, status in STATUS.items()}


@pytest.mark.parametrize("field", fields(HttpConfig), ids=lambda field: field.name)
def test_options(field):
    flag = "--" + field.name.replace("_", "-")
    assert f"`{flag}" in TEXT or field.name in ("host", "port")
