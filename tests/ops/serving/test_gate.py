"""Tokens: where they come from and what they open; addresses and headers that are refused."""

import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rec.errors import UserError
from rec.ops.serving.connections import MAX_HEADERS
from rec.ops.serving.front import describe, guarded_app
from rec.ops.serving.gate import LOG_FORMATS, MAX_URL, RELOAD, Tokens
from rec.serving.service import Service
from tests.conftest import ROOT

CLOSED, NO_MODELS = (401, 403), 503


SERVICE = Service(lambda: pytest.fail("no model is needed here"))


def status(
    tokens: Tokens, path: str, token: str | bytes | None = None, scheme: str = "Bearer"
) -> int:
    """Of a server without models, which answers 503 to what it lets pass."""
    client = TestClient(guarded_app(SERVICE, tokens))
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


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A directory without `.env`, and an environment without tokens."""
    monkeypatch.chdir(tmp_path)
    for name in ("REC_API_TOKENS", "API_TOKENS", "REC_ADMIN_TOKENS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_tokens_come_from_the_environment_before_the_file(empty: pytest.MonkeyPatch) -> None:
    assert Tokens.from_environment(required=True) == Tokens(required=True)
    Path(".env").write_text("API_TOKENS=one, two,,\nREC_ADMIN_TOKENS='$dollar${HOME}'\n")
    assert Tokens.from_environment(required=False) == Tokens(("one", "two"), ("$dollar${HOME}",))
    empty.setenv("API_TOKENS", "three")
    assert Tokens.from_environment(required=False).api == ("three",)
    empty.setenv("REC_API_TOKENS", "four")
    assert Tokens.from_environment(required=False).api == ("four",)


def refusal() -> str:
    with pytest.raises(UserError) as refused:
        Tokens.from_environment(required=False)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["REC_API_TOKENS", "API_TOKENS", "REC_ADMIN_TOKENS"])
@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_variable_does_not_hide_the_tokens_of_the_file(
    empty: pytest.MonkeyPatch, name: str, blank: str
) -> None:
    Path(".env").write_text(f"{name}=secret\n")
    empty.setenv(name, blank)
    assert refusal().startswith(f"{name} is empty in the environment, but .env has tokens for it")
    Path(".env").unlink()
    assert Tokens.from_environment(required=False) == Tokens()


def test_an_empty_variable_leaves_the_other_name_of_the_tokens(empty: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("API_TOKENS=secret\n")
    empty.setenv("REC_API_TOKENS", "")
    assert Tokens.from_environment(required=False).api == ("secret",)


def test_tokens_that_cannot_be_sent_or_read_end_the_start(empty: pytest.MonkeyPatch) -> None:
    for value in ("good,\udcff\udcfe", "good,a\nb", "good,\x7f"):
        empty.setenv("REC_API_TOKENS", value)
        assert refusal().startswith("REC_API_TOKENS: token 2 is not UTF-8 text or has control")
    empty.setenv("REC_API_TOKENS", " , ,")
    assert refusal() == "REC_API_TOKENS holds commas and no token: set tokens, or unset it"
    empty.delenv("REC_API_TOKENS")
    Path(".env").write_bytes(b"REC_API_TOKENS=\xff\n")
    assert refusal().startswith(".env cannot be read: ")


def test_a_server_that_is_open_by_an_empty_variable_warns(empty: pytest.MonkeyPatch) -> None:
    assert Tokens().warning() is None
    empty.setenv("REC_API_TOKENS", "")
    assert "the API is open" in (Tokens.from_environment(required=False).warning() or "")
    assert "requests are refused" in (Tokens.from_environment(required=True).warning() or "")
    assert Tokens(api=("a",)).warning() is None


# ------------------------------------------------------------------------------------------------------------
# Addresses and headers that two readers could understand differently


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/models", NO_MODELS),
        ("/v1/models%0A", 404),
        ("/v1/users/u/recommendations%0A", 404),
        ("/healthz%0A", 404),
        ("/v1/users/%ff/recommendations", 400),
        (
            "/v1/users/%EF%BF%BD/recommendations",
            NO_MODELS,
        ),  # the character that stands for bad bytes
        ("/v1/items?q=%fe", 400),
        ("/v1/items?q=%C3%BC", NO_MODELS),
        ("/v1/items?q=" + "q" * MAX_URL, 414),
        ("/" + "u" * MAX_URL, 414),
    ],
)
def test_an_address_has_one_meaning_and_a_limit(path: str, expected: int) -> None:
    assert status(Tokens(), path) == expected


def test_no_line_break_leads_past_the_admin_token() -> None:
    client = TestClient(guarded_app(SERVICE, Tokens(api=("user",), admin=("boss",))))
    headers = {"Authorization": "Bearer user"}
    assert client.post(RELOAD, headers=headers).status_code == 401
    assert client.post(f"{RELOAD}%0A", headers=headers).status_code == 404


def test_a_token_is_sent_once() -> None:
    client = TestClient(guarded_app(SERVICE, Tokens(api=("right",))))
    for tokens in (("right", "wrong"), ("wrong", "right"), ("right", "right")):
        headers = [("Authorization", f"Bearer {token}") for token in tokens]
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == 400
        assert response.json() == {"detail": "the header Authorization is repeated: send it once"}


def test_there_are_not_too_many_headers() -> None:
    client = TestClient(guarded_app(SERVICE, Tokens()))
    for number, expected in ((MAX_HEADERS - 10, 200), (MAX_HEADERS + 1, 431)):
        headers = {f"X-{at}": "" for at in range(number)}
        assert client.get("/healthz", headers=headers).status_code == expected


@pytest.mark.parametrize(
    "name, line",
    [
        (
            "json",
            r'\{"time": "[^"]+", "id": "find-me", .*"path": "/healthz\\n", "status": 404, .*\}\n',
        ),
        ("text", r'\S+ testclient GET "/healthz\\n" 404 [\d.]+ ms find-me\n'),
    ],
)
def test_a_request_is_one_line_of_the_log(
    name: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app = guarded_app(SERVICE, Tokens(), access_log=LOG_FORMATS[name])
    with TestClient(app) as client:
        client.get("/healthz%0A", headers={"X-Request-ID": "find-me"})
    assert re.fullmatch(line, capsys.readouterr().out)


def test_the_schema_in_the_repository_is_that_of_the_server() -> None:
    stored = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert stored == describe(), "run make openapi"
