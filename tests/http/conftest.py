import pytest
import pytest_asyncio

from tests.http.fakes import FakeEngine, served
from tests.http.live import live
from tests.tiny import tiny_backbone


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client():
    """One server for all the tests of a module that send a request and leave the engine alone."""
    async with served(FakeEngine()) as client:
        yield client


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    return tiny_backbone("bert", tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def server(tmp_path_factory, backbone_folder):
    """The real thing, in float32. Tests add tenants under names of their own."""
    with live(tmp_path_factory.mktemp("live"), backbone_folder) as server:
        yield server
