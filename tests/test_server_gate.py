"""Who may call the server: hosts, origins, keys."""

import httpx
import pytest
from servers import EDGE, running

KEY = "sésame"


@pytest.fixture(scope="module")
def live():
    with running(EDGE, api_key=KEY, origins=("https://ok.example",), hosts=("box.lan",)) as live:
        yield live


@pytest.fixture(scope="module")
def plain(live):
    """A client without a key."""
    with httpx.Client(base_url=live.url) as client:
        yield client


def bearer(key: str) -> dict[str, bytes]:
    return {"authorization": b"Bearer " + key.encode()}


def test_only_health_is_open_without_the_key(plain):
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        answer = plain.get(path)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert plain.get("/health").status_code == plain.get("/health/live").status_code == 200


def test_the_key_is_accepted_in_either_header(plain):
    key = KEY.encode("utf-8")
    for headers in ({"authorization": b"Bearer " + key}, {"authorization": b"bearer  " + key}, {"x-api-key": key}):
        assert plain.get("/v1/models", headers=headers).status_code == 200
    for headers in (bearer(KEY + "x"), bearer(KEY[:-1]), {"authorization": b"Basic " + key}):
        assert plain.get("/v1/models", headers=headers).status_code == 401


def test_foreign_hosts_are_refused_even_with_the_key(live):
    for host in ("evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "]["):
        answer = live.client.get("/v1/models", headers={"host": host})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed", host
    for host in ("localhost", "localhost:1", "127.0.0.1:8080", "[::1]:8080", "192.168.1.7", "box.lan", "a.localhost"):
        assert live.client.get("/v1/models", headers={"host": host}).status_code == 200, host


def test_foreign_origins_are_refused(live):
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "file://", "http://192.168.1.7"):
        answer = live.client.post("/v1/completions", headers={"origin": origin}, json={"prompt": "a"})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed", origin
    for origin in ("https://ok.example", "http://localhost:3000", "http://127.0.0.1:5500"):
        assert live.client.get("/v1/models", headers={"origin": origin}).status_code == 200


def test_only_allowed_origins_get_cors_headers(live, plain):
    ask = {"origin": "https://ok.example", "access-control-request-method": "POST"}
    answer = plain.options("/v1/chat/completions", headers=ask)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://ok.example"
    local = live.client.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert "access-control-allow-origin" not in local.headers
    with running(EDGE) as closed:
        answer = closed.client.options("/v1/models", headers={**ask, "origin": "http://localhost:3000"})
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
