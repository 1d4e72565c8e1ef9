"""Any sequence of calls leaves the store as it leaves two dictionaries."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.store import TenantStore
from runtime.versions import ModuleFacts
from vbert.errors import BadRequest

FACTS = ModuleFacts(fingerprint="sha256:0", task="embed")
CALLS = st.tuples(
    st.sampled_from(["put", "keep", "activate", "rollback", "remove", "collect", "reopen"]),
    st.sampled_from(["a", "b"]),
    st.integers(1, 4),
)


class Model:
    """What the store promises, in memory."""

    def __init__(self):
        self.last, self.versions, self.active = {}, {}, {}  # `active`: a stack, the top is served

    def put(self, tenant, data, activate=True):
        versions = self.versions.setdefault(tenant, {})
        version = next((v for v, stored in versions.items() if stored == data), None)
        if version is None:
            version = self.last[tenant] = self.last.get(tenant, 0) + 1
            versions[version] = data
        if activate:
            self.activate(tenant, version)

    def activate(self, tenant, version):
        self.versions.get(tenant, {})[version]
        stack = self.active.setdefault(tenant, [])
        if stack[-1:] != [version]:
            stack.append(version)

    def rollback(self, tenant):
        if len(self.active.get(tenant, [])) < 2:
            raise KeyError(tenant)
        self.active[tenant].pop()

    def remove(self, tenant):
        if not self.versions.get(tenant):
            raise KeyError(tenant)
        self.versions[tenant], self.active[tenant] = {}, []


def apply(model, store, name, tenant, number):
    """One call on both; the store refuses what the model refuses."""
    data = b"%d" % number
    arguments = {"put": (data,), "activate": (number,), "rollback": (), "remove": ()}
    try:
        if name == "keep":
            model.put(tenant, data, activate=False)
            store.put(tenant, data, FACTS, activate=False)
        elif name == "collect":
            store.collect_garbage(store.garbage())
        else:
            getattr(model, name)(tenant, *arguments[name])
            getattr(store, name)(tenant, *arguments[name], *([FACTS] if name == "put" else []))
    except KeyError:
        with pytest.raises(BadRequest):
            getattr(store, name)(tenant, *arguments[name])


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(CALLS, max_size=12))
def test_behaves_like_its_model(tmp_path_factory, calls):
    folder = tmp_path_factory.mktemp("model")
    store, model = TenantStore(folder), Model()
    for name, tenant, number in calls:
        if name == "reopen":
            store.close()
            store = TenantStore(folder)
        else:
            apply(model, store, name, tenant, number)
    served = {tenant: stack[-1] for tenant, stack in model.active.items() if stack}
    assert {v.tenant: v.version for v in store.list()} == served
    for tenant, versions in model.versions.items():
        if versions:
            assert {v.version: store.blob_path(v.digest).read_bytes() for v in store.versions(tenant)} == versions
    store.check()
    store.close()
