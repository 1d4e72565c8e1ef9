"""Keys: default-deny from the matched route, scopes, and keys that see some tenants only."""

import pytest

from runtime.http.auth import SCOPES, Key, KeyRing, make_key
from runtime.http.config import HttpConfig
from runtime.http.errors import Unauthorized
from runtime.http.routes import PUBLIC, ROUTES
from serve import create_app
from tests.http.fakes import FakeEngine, served
from vbert.errors import ConfigError

TEXT = {"model": "acme.a", "input": "hello"}


@pytest.fixture
def keys(tmp_path):
    """Secrets by name: every scope alone on all tenants, and one key with all scopes bound to acme.* ."""
    made = {scope: make_key(scope, [scope]) for scope in SCOPES}
    made["acme"] = make_key("acme", SCOPES, ["acme.*"])
    path = tmp_path / "keys"
    path.write_text("# who may call\n\n" + "\n".join(key.line() for _, key in made.values()) + "\n")
    return {"file": str(path)} | {name: secret for name, (secret, _) in made.items()}


def registered(app):
    """(method, path with an id) of every route that aiohttp knows, whoever added it."""
    return [(route.method, route.resource.canonical.replace("{id}", "other")) for route in app.router.routes()]


def test_only_health_is_public():
    assert {route.path for route in ROUTES if route.scopes == PUBLIC} == {"/health/live", "/health/ready"}


async def test_no_route_opens_without_a_key(keys):
    wrong = ("", "Bearer", "Bearer wrong", f"Basic {keys['infer']}", keys["infer"], f"Bearer {keys['infer']}x")
    async with served(FakeEngine(), keys=keys["file"]) as client:
        walked = registered(client.app)
        assert len(walked) == len(ROUTES) + sum(route.method == "GET" for route in ROUTES)  # HEAD too
        for method, path in walked:
            for header in wrong:
                answer = await client.ask(method, path, headers={"Authorization": header})
                if path.startswith("/health/"):
                    assert answer.status == 200
                else:
                    assert answer.status == 401, (method, path, header)
                    assert method == "HEAD" or answer.code == "invalid_api_key"
                    assert answer.headers["WWW-Authenticate"] == "Bearer"


async def test_a_stranger_cannot_tell_which_paths_exist(keys):
    async with served(FakeEngine(), keys=keys["file"]) as client:
        for method, path in (
            ("GET", "/nothing"),
            ("POST", "/v1/models"),
            ("GET", "//v1/models"),
            ("GET", "/v1/models/"),
        ):
            assert (await client.ask(method, path)).status == 401, path
        assert (await client.ask("GET", "/nothing", key=keys["infer"])).status == 404


async def test_every_route_refuses_a_key_of_another_scope(keys):
    by_path = {(route.method, route.path.replace("{id}", "other")): route for route in ROUTES}
    async with served(FakeEngine(), keys=keys["file"]) as client:
        for method, path in registered(client.app):
            route = by_path["GET" if method == "HEAD" else method, path]
            for scope in SCOPES:
                answer = await client.ask(method, path, key=keys[scope])
                refused = route.scopes != PUBLIC and scope not in route.scopes
                assert (answer.status == 403) == refused, (method, path, scope)


async def test_every_route_of_a_tenant_refuses_a_key_bound_to_others(keys):
    engine = FakeEngine()
    of_tenants = [route for route in ROUTES if route.names_tenant]
    assert len(of_tenants) == 13
    async with served(engine, keys=keys["file"]) as client:
        for tenant, statuses in (("other", {403}), ("absent", {403}), ("acme.a", {200, 201})):
            for route in of_tenants:
                path = route.path.replace("{id}", tenant)
                answer = await client.ask(route.method, path, key=keys["acme"], **content(route, tenant))
                assert answer.status in statuses, (route.path, tenant)
    assert {tenant for _, tenant, _ in engine.calls} == {"acme.a"}


def content(route, tenant):
    if route.upload:
        return {"data": b"bytes"}
    if route.body is None:
        return {}
    if not route.infers:
        return {"json": {"version": 2}}
    parts = {"rerank": {"query": "q", "documents": ["d"]}, "score": {"input": [["a", "b"]]}}
    return {"json": {"model": tenant} | parts.get(route.path.split("/")[-1], {"input": "text"})}


async def test_a_bound_key_sees_only_its_tenants_in_lists(keys):
    async with served(FakeEngine(), keys=keys["file"]) as client:

        async def ids(path, name):
            return [row["id"] for row in (await client.ask("GET", path, key=keys[name])).json["data"]]

        assert await ids("/v1/models", "infer") == ["base", "acme.a", "acme.b", "other"]
        assert await ids("/v1/tenants", "admin") == ["acme.a", "acme.b", "other"]
        assert await ids("/v1/models", "acme") == await ids("/v1/tenants", "acme") == ["acme.a", "acme.b"]


async def test_the_key_is_the_caller(keys):
    engine = FakeEngine()
    async with served(engine, keys=keys["file"]) as client:
        assert (await client.ask("POST", "/v1/embeddings", json=TEXT, key=keys["acme"])).status == 200
    async with served(engine) as client:
        assert (await client.ask("POST", "/v1/embeddings", json=TEXT, key="anything")).status == 200
    assert [keywords["caller"] for _, _, keywords in engine.calls] == ["acme", "local"]


async def test_without_keys_a_web_page_from_elsewhere_is_refused(keys):
    pages = ({"Host": "evil.example:80"}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "[::1"})
    programs = ({}, {"Host": "localhost:1"}, {"Host": "[::1]:80"}, {"Origin": "http://127.0.0.1:3000"})
    async with served(FakeEngine()) as client:
        for headers in pages:
            answer = await client.ask("POST", "/v1/tenants/other/rollback", headers=headers)
            assert (answer.status, answer.code) == (403, "forbidden")
            assert (await client.ask("GET", "/health/live", headers=headers)).status == 200
        for headers in programs:
            assert (await client.ask("POST", "/v1/tenants/other/rollback", headers=headers)).status == 200
    async with served(FakeEngine(), keys=keys["file"]) as client:
        for headers in pages[:3]:
            assert (await client.ask("GET", "/v1/models", headers=headers, key=keys["infer"])).status == 200


async def test_a_backbone_whose_name_has_a_slash_is_a_model_like_others():
    engine = FakeEngine()
    engine.name = "org/base"
    async with served(engine) as client:
        assert (await client.ask("GET", "/v1/models/org%2Fbase")).json["parent"] is None
        assert (await client.ask("POST", "/v1/embeddings", json={"model": "org/base", "input": "x"})).status == 200


def test_a_keys_file_holds_no_secret():
    secret, key = make_key("a", ["infer"], ["x.*", "y"])
    assert secret not in key.line()
    assert key.line() == f"a:{key.digest}:infer:x.*,y"
    assert KeyRing([key]).authenticate(f"bearer {secret}") is key
    with pytest.raises(Unauthorized):
        KeyRing([key]).authenticate(f"Bearer {secret}x")
    with pytest.raises(Unauthorized):
        KeyRing([key]).authenticate("Bearer \udcff")


def test_all_keys_are_compared_whichever_matches(monkeypatch):
    compared = []
    monkeypatch.setattr("runtime.http.auth.compare_digest", lambda a, b: compared.append(a) or a == b)
    made = [make_key(name, ["infer"]) for name in "abc"]
    ring = KeyRing([key for _, key in made])
    for secret, key in made:
        compared.clear()
        assert ring.authenticate(f"Bearer {secret}") is key
        assert compared == [key.digest for _, key in made]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no keys"),
        ("# only words", "no keys"),
        ("a:b:infer", "line 1: 3 fields"),
        (f"a:{'0' * 63}:infer:*", "64 lower-case"),
        (f"a:{'0' * 64}:infer,root:*", "scopes"),
        (f"a:{'0' * 64}::*", "scopes"),
        (f"a:{'0' * 64}:infer:", "patterns"),
        (f"a b:{'0' * 64}:infer:*", "key name"),
        (f"a:{'0' * 64}:infer:*\na:{'1' * 64}:infer:*", "same name"),
    ],
)
def test_a_wrong_keys_file_is_refused(tmp_path, text, said):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        KeyRing.load(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing.load(str(tmp_path / "absent"))


def test_without_keys_only_loopback_is_served(tmp_path):
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        HttpConfig(host=host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"):
        with pytest.raises(ConfigError, match="keys"):
            HttpConfig(host=host)
        HttpConfig(host=host, keys="some file")
    path = tmp_path / "keys"
    path.write_text("")
    with pytest.raises(ConfigError, match="no keys"):
        create_app(FakeEngine(), HttpConfig(host="0.0.0.0", keys=str(path)))


def test_tenant_patterns_match_the_whole_name_and_case():
    key = Key(name="k", digest="0" * 64, scopes=frozenset({"infer"}), tenants=("acme.*", "one"))
    assert [name for name in ("acme.a", "acme.", "xacme.a", "ACME.a", "one", "one2", "") if key.sees(name)] == [
        "acme.a", "acme.", "one",
    ]  # fmt: skip
