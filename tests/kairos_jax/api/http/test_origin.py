"""What a page of elsewhere has a browser send is not taken; nor does a client that breaks off leave
more than a line.
"""

import asyncio
import json
import logging

import http_fakes
import pytest
from http_fakes import fetch, of, says, until
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from kairos_jax.api.gate import Gate
from kairos_jax.api.http.app import make_app
from kairos_jax.api.http.errors import ApiError
from kairos_jax.api.http.live import Live
from kairos_jax.api.http.origin import Origins
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.keys import digest

TEXT = "/v1/completions"
BODY = json.dumps(http_fakes.ASK | {"prompt": "x", "max_tokens": 2})
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def client():
    with http_fakes.client_of_thread() as client:
        yield client


def post(client, path=TEXT, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(path, content=BODY, headers=named)


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/json;", None]
)
def test_json_is_taken_and_so_is_a_body_without_a_type(client, kind):
    answer = post(client, **({"content_type": kind} if kind else {}))
    assert of(answer.json())["text"] == says("x", 2)


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "text/json",
        "x",
    ],
)
@pytest.mark.parametrize("path", [TEXT, "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_what_a_form_can_send_is_not(client, path, kind):
    answer = post(client, path, content_type=kind)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (415, "unsupported_media_type")
    assert f'must be application/json, got "{kind.partition(";")[0]}"' in error["message"]


def test_a_page_of_elsewhere_cannot_leave_the_type_out(client):
    """As it can with a Blob that has none."""
    answer = post(client, origin=PAGE)
    assert answer.status_code == 415
    assert f'"{PAGE}"' in answer.json()["error"]["message"]
    assert post(client, origin="null").status_code == 415
    own = str(client.base_url).rstrip("/")
    assert post(client, origin=own).status_code == 200
    # With the type, a browser has asked before.
    assert post(client, origin=PAGE, content_type="application/json").status_code == 200


def test_a_page_that_may_read_answers_may_leave_the_type_out():
    for allowed in (PAGE, "*"):
        app = HttpOptions(0, cors_origins=[allowed])
        with http_fakes.client_of_thread(app=app) as client:
            assert post(client, origin=PAGE).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.", "kairos.localhost", "127.0.0.1:1", "[::1]:80",
     "::1", "10.1.2.3", "[fe80::1%eth0]:8000"],
)  # fmt: skip
def test_names_that_nobody_can_point_elsewhere_are_known(client, host):
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "x y"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/", "/live", "/metrics", "/nowhere"])
def test_a_name_that_somebody_pointed_here_is_refused(client, path, host):
    answer = client.get(path, headers={"host": host})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (421, "misdirected_request")
    assert "got " in error["message"]
    assert "--allowed_hosts" in error["message"]


def test_further_names_are_those_of_the_flag_and_the_host():
    def taken(origins: Origins, host: str) -> bool:
        try:
            origins.check("GET", {"host": host})
        except ApiError as error:
            return "must be an IP address or one of " not in str(error)
        return True

    some = Origins.of("node7", ["Kairos", "kairos.svc:8000"], (), keyed=False)
    for host in ("node7:80", "NODE7", "kairos", "kairos.svc", "kairos.svc:9", "localhost"):
        assert taken(some, host)
    for host in ("node8", "other.kairos", "kairos.svc.evil"):
        assert not taken(some, host)
    for anything in (Origins.of("h", ["*"], (), False), Origins.of("h", [], (), keyed=True)):
        assert taken(anything, "evil.example")
    assert Origins.of("h", [], (), keyed=False).check("GET", {}) is None


def test_where_a_key_is_asked_for_any_name_will_do():
    with http_fakes.client_of_thread(app=HttpOptions(0, keys=[digest(b"key")])) as client:
        headers = {"host": "any.example", "authorization": "Bearer key"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/health", headers={"host": "any.example"}).status_code == 200


def test_a_profile_is_not_for_pages_of_elsewhere(client):
    for headers in ({"content_type": "text/plain"}, {"origin": PAGE}):
        assert post(client, "/debug/profile?steps=1", **headers).status_code == 415


def test_a_head_takes_no_place_among_those_who_look_on():
    async def main():
        gate = Gate(lambda: 0.0)
        live = Live(gate, max_viewers=1)
        app = make_app(gate, HttpOptions(0), live.routes())
        for _ in range(3):
            status, headers, body = await asyncio.wait_for(fetch(app, "HEAD", "/live"), 10)
            assert (status, body) == (200, b"")
            assert headers["content-type"].startswith("text/event-stream")
        assert (live.num_viewers, live._ticking) == (0, None)

    asyncio.run(main())


@pytest.mark.parametrize("path", [TEXT, "/tokenize"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_that_breaks_off_leaves_no_traceback(caplog, monkeypatch, path, chunked):
    caplog.set_level(logging.WARNING)
    reads, ends = [], []  # of a body, and of requests
    receive, run_asgi = RequestResponseCycle.receive, RequestResponseCycle.run_asgi

    async def told_of_reads(cycle):
        reads.append(cycle)
        return await receive(cycle)

    async def told_of_ends(cycle, app):
        await run_asgi(cycle, app)
        ends.append(cycle)

    monkeypatch.setattr(RequestResponseCycle, "receive", told_of_reads)
    monkeypatch.setattr(RequestResponseCycle, "run_asgi", told_of_ends)

    async def main():
        async with http_fakes.serving() as api:
            size = "transfer-encoding: chunked" if chunked else "content-length: 100"
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{size}\r\n\r\n"
            for begun in ("", '5\r\n{"pro' if chunked else '{"prompt": '):
                for abort in (False, True):
                    reads.clear()
                    ends.clear()
                    where = "127.0.0.1", api.harness.server.http.port
                    _, writer = await asyncio.open_connection(*where)
                    writer.write((head + begun).encode())
                    await writer.drain()
                    # It waits for the rest.
                    await until(lambda begun=begun: len(reads) == 1 + bool(begun))
                    assert not ends
                    writer.transport.abort() if abort else writer.close()
                    await until(lambda: ends)
            assert (await api.post(TEXT, {"prompt": "x"})).status_code == 200

    asyncio.run(main())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
