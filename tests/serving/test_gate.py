"""Tokens: where they come from and what they open."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rec.registry import Pair
from rec.serving.app import create_app
from rec.serving.gate import RELOAD, Tokens
from rec.serving.service import Service

CLOSED, NO_MODELS = (401, 403), 503


def never_found() -> Pair:
    raise AssertionError("no model is needed here")


SERVICE = Service(never_found, never_found)  # type: ignore[arg-type]


def status(
    tokens: Tokens, path: str, token: str | bytes | None = None, scheme: str = "Bearer"
) -> int:
    """Of a server without models, which answers 503 to what it lets pass."""
    client = TestClient(create_app(SERVICE, tokens))
    sent = token.encode() if isinstance(token, str) else token
    headers = {} if sent is None else {b"Authorization": scheme.encode() + b" " + sent}
    response = (
        client.post(path, headers=headers) if path == RELOAD else client.get(path, headers=headers)
    )
    assert response.status_code == 200 or isinstance(response.json()["detail"], str)
    assert (response.status_code == 401) == ("WWW-Authenticate" in response.headers)
    return response.status_code


def test_without_tokens_the_api_is_open_and_the_reload_closed() -> None:
    assert status(Tokens(), "/v1/models") == NO_MODELS
    assert status(Tokens(), RELOAD) == 403
    assert status(Tokens(api=("a",)), RELOAD, "a") == 403


def test_a_token_is_needed_once_there_is_one() -> None:
    tokens = Tokens(api=("first", "Schlüssel 東"))
    for path in ("/v1/models", "/v1/users/u/recommendations", "/v1/nowhere", "/v1"):
        assert status(tokens, path) == 401
    for wrong in (
        "second",
        "",
        "firs",
        "first,",
        "FIRST",
        "Schlüssel",
        "\xff",
        b"\xff\xfe\x80",
        "first first",
    ):
        assert status(tokens, "/v1/models", wrong) == 401
    assert status(tokens, "/v1/models", "first", scheme="Basic") == 401
    for right in ("first", "Schlüssel 東", " first "):
        assert status(tokens, "/v1/models", right) == NO_MODELS
    assert status(tokens, "/v1/models", "first", scheme="bearer") == NO_MODELS


def test_only_an_admin_token_reloads_and_it_opens_the_api_too() -> None:
    tokens = Tokens(api=("user",), admin=("boss",))
    assert status(tokens, RELOAD, "user") == 401
    assert status(tokens, "/v1/models", "boss") == NO_MODELS


def test_required_tokens_close_everything_but_health() -> None:
    for path in ("/v1/models", "/docs", "/openapi.json", "/nowhere", RELOAD):
        assert status(Tokens(required=True), path, "any") == 403
        assert status(Tokens(api=("a",), required=True), path) in CLOSED
    assert status(Tokens(api=("a",), required=True), "/v1/models", "a") == NO_MODELS
    assert status(Tokens(required=True), "/healthz") == 200
    assert status(Tokens(required=True), "/readyz") == NO_MODELS


def test_tokens_come_from_the_environment_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("REC_API_TOKENS", "API_TOKENS", "REC_ADMIN_TOKENS"):
        monkeypatch.delenv(name, raising=False)
    assert Tokens.from_environment(required=True) == Tokens(required=True)
    Path(".env").write_text("API_TOKENS=one, two,,\nREC_ADMIN_TOKENS='$dollar${HOME}'\n")
    assert Tokens.from_environment(required=False) == Tokens(("one", "two"), ("$dollar${HOME}",))
    monkeypatch.setenv("API_TOKENS", "three")
    assert Tokens.from_environment(required=False).api == ("three",)
    monkeypatch.setenv("REC_API_TOKENS", "four")
    assert Tokens.from_environment(required=False).api == ("four",)
