"""Limits on what the side endpoint is asked: words it does not know, long targets, long bodies."""

import base64

import pytest

from tests.component.endpoint.test_app import Side, error_of
from vllm_cost_meter.endpoint.limits import BODY_BYTES_MAX, TARGET_BYTES_MAX


@pytest.fixture
def side(tmp_path):
    made = Side(tmp_path, metrics=bytes)
    yield made
    made.reader.close()


def operations(side: Side) -> dict[str, str]:
    """Return the method of each path, with real names in place of its parameters."""
    paths = side.app.openapi()["paths"]
    ids = {"{request_id}": "h1", "{tenant}": "alice"}
    found = {"/openapi.json": "get"}
    for path, methods in paths.items():
        for placeholder, id in ids.items():
            path = path.replace(placeholder, id)
        found[path] = next(iter(methods))
    return found


def words(side: Side) -> list[tuple[str, str, bool]]:
    """Return (path, word, whether it may be given several times) of all routes."""
    return [
        (path.replace("{request_id}", "h1").replace("{tenant}", "alice"), each["name"], is_list)
        for path, methods in side.app.openapi()["paths"].items()
        for each in next(iter(methods.values())).get("parameters", [])
        if each["in"] == "query"
        for is_list in [each["schema"].get("type") == "array"]
    ]


def test_a_mistyped_word_is_refused_on_every_route(side):
    asked = operations(side)
    assert len(asked) > 15
    for path, method in asked.items():
        error = error_of(side.get(f"{path}?idel=proportional", method.upper()))
        assert (error["code"], error["type"]) == (422, "invalid_request"), path
        assert "'idel'" in error["message"]


def test_an_empty_word_and_one_given_twice_are_refused_wherever_they_are_known(side):
    known = words(side)
    assert len(known) > 15
    for path, word, is_list in known:
        error = error_of(side.get(f"{path}?{word}="))
        assert error["code"] == 422, path
        assert error["message"].startswith(f"{word}: expected"), path
        twice = side.get(f"{path}?{word}=7d&{word}=7d")
        if not is_list:
            assert "expected once, got it 2 times" in error_of(twice)["message"], (path, word)


@pytest.mark.parametrize("path", ["/cost/requests?tenant=a%00b", "/cost/requests/a%00b"])
def test_control_characters_are_refused_before_a_database_sees_them(side, path):
    assert error_of(side.get(path))["code"] == 422


def test_a_target_longer_than_any_question_is_refused_before_anybody_knows_who_asks(side):
    assert error_of(side.get(f"/cost/requests?tenant={'x' * TARGET_BYTES_MAX}"))["code"] == 414
    assert error_of(side.get(f"/cost/requests/{'x' * TARGET_BYTES_MAX}"))["code"] == 414


def test_errors_repeat_at_most_200_characters_of_what_was_asked(side):
    long = "y" * 5_000
    for path in operations(side):
        for target in (f"{path}?{long}=1", f"{path}/{long}", *(f"{path}?{w}={long}" for w in ALL)):
            reply = side.get(target)
            assert reply.status_code != 500
            assert reply.text.count("y") < 300 or reply.status_code == 200, target


ALL = ("window", "tz", "filter", "next", "idle", "ratio")


def test_a_body_longer_than_any_curve_is_refused(side):
    reply = side.post("/cost/calc/c-eff", b"[" * (BODY_BYTES_MAX + 1))
    assert error_of(reply)["code"] == 413


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"curve": [{"requests_per_s": 1' + b"0" * 400])
def test_a_body_that_no_reader_likes_is_the_askers_error(side, body):
    body += b"}]}" if body.startswith(b"{") else b""
    for path, method in operations(side).items():
        if method == "post":
            assert error_of(side.post(path, body))["code"] in (400, 422), path


def test_a_page_token_nested_without_end_is_no_token(side):
    token = base64.urlsafe_b64encode(b"[" * 3_000).decode()
    assert error_of(side.get(f"/cost/requests?next={token}"))["code"] == 422
