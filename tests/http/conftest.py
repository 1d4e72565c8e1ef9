import pytest_asyncio

from tests.http.fakes import FakeEngine, served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client():
    """One server for all the tests of a module that send a request and leave the engine alone."""
    async with served(FakeEngine()) as client:
        yield client
