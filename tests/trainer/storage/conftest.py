import pytest

from services import fake_hub


@pytest.fixture
def hub(monkeypatch):
    with fake_hub.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running
