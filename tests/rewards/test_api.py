"""A reward server that answers, and every way in which one does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trimtab.errors import RewardError
from trimtab.rewards import Answer
from trimtab.rewards.api import ApiReward
from trimtab.types import Completion, Example, Message, Origin, Prompt, TokenRow

pytestmark = pytest.mark.unit

Reply = tuple[int, bytes]


class Server:
    """A server on a free port of this machine; `reply(number, request)` is its status and body for the number-th request."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[int, dict[str, Any]], Reply] = self.lengths
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                status, answer = outer.reply(len(outer.requests), body)
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(answer)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1/score"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @staticmethod
    def lengths(number: int, body: dict[str, Any]) -> Reply:
        return 200, json.dumps({"scores": [len(text) for text in body["messages"]]}).encode()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def answer(ids: tuple[int, ...]) -> Answer:
    example = Example(origin=Origin(file="f", row=1), prompt=(Message(role="user", content="q"),))
    return Answer(
        prompt=Prompt(index=0, token_ids=ids[:1], example=example),
        completion=Completion(
            prompt_index=0,
            sample_index=0,
            token_ids=ids[1:],
            logprobs=(0.0,) * len(ids[1:]),
            finish="stop",
            policy_version=0,
        ),
        row=TokenRow(token_ids=ids, scored=tuple(range(1, len(ids)))),
        text="",
    )


ANSWERS = [answer((1, 2)), answer((1, 2, 3))]


def reward(url: str, slept: list[float] | None = None, **more: Any) -> ApiReward:
    pauses: list[float] = [] if slept is None else slept
    return ApiReward(url, lambda ids: "x" * len(ids), sleep=pauses.append, where="run.yaml:3: reward_model", **more)


def test_whole_dialogues_go_out_and_their_scores_come_back(server: Server) -> None:
    assert reward(server.url, model="m").score(ANSWERS) == [2.0, 3.0]
    assert server.requests == [{"model": "m", "messages": ["xx", "xxx"]}]
    assert reward(server.url).score([]) == [] and len(server.requests) == 1


def test_a_server_that_stumbles_is_asked_again_with_growing_pauses(server: Server) -> None:
    server.reply = lambda number, body: Server.lengths(number, body) if number > 3 else (503, b"loading")
    slept: list[float] = []
    assert reward(server.url, slept).score(ANSWERS) == [2.0, 3.0]
    assert slept == [1.0, 2.0, 4.0]


def test_a_server_that_fails_for_good(server: Server) -> None:
    server.reply = lambda number, body: (500, b"out of memory\ntrace")
    slept: list[float] = []
    with pytest.raises(RewardError, match="asked 3 times") as caught:
        reward(server.url, slept, retries=2).score(ANSWERS)
    assert len(server.requests) == 3 and slept == [1.0, 2.0]
    assert caught.value.where == f"run.yaml:3: reward_model: {server.url}"
    assert "500" in caught.value.why and "out of memory" in caught.value.why
    assert "--resume" in caught.value.remedy


def test_a_server_that_refuses_is_not_asked_again(server: Server) -> None:
    server.reply = lambda number, body: (404, b"no such path")
    with pytest.raises(RewardError, match="refuses") as caught:
        reward(server.url).score(ANSWERS)
    assert len(server.requests) == 1 and "404" in caught.value.why


def test_a_server_that_is_not_there(server: Server) -> None:
    server.stop()
    slept: list[float] = []
    with pytest.raises(RewardError, match="asked 2 times"):
        reward(server.url, slept, retries=1).score(ANSWERS)
    assert slept == [1.0]


def test_a_server_that_is_too_slow(server: Server) -> None:
    release = threading.Event()

    def slow(number: int, body: dict[str, Any]) -> Reply:
        release.wait(10)
        return Server.lengths(number, body)

    server.reply = slow
    with pytest.raises(RewardError, match="does not answer") as caught:
        reward(server.url, retries=0, timeout=0.05).score(ANSWERS)
    release.set()
    assert "0.05 s" in caught.value.why


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"<html>hello</html>", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1, 2]", "no list of scores"),
        (b'{"score": [1, 2]}', "no list of scores"),
        (b'{"scores": 1}', "no list of scores"),
        (b'{"scores": [1]}', "1 scores for 2 texts"),
        (b'{"scores": [1, 2, 3]}', "3 scores for 2 texts"),
        (b'{"scores": [1, NaN]}', "score 2 .* nan"),
        (b'{"scores": [Infinity, 1]}', "score 1 .* inf"),
        (b'{"scores": [1, null]}', "score 2 .* None"),
        (b'{"scores": [1, "2"]}', "score 2 .* '2'"),
        (b'{"scores": [true, 1]}', "score 1 .* True"),
        (b'{"scores": [[1.0], [2.0]]}', r"score 1 .* \[1.0\]"),
    ],
)
def test_nonsense_is_an_error_and_not_asked_for_again(server: Server, body: bytes, what: str) -> None:
    server.reply = lambda number, request: (200, body)
    with pytest.raises(RewardError, match=what):
        reward(server.url).score(ANSWERS)
    assert len(server.requests) == 1


def test_a_torn_answer_is_asked_for_again(server: Server) -> None:
    """A body shorter than its Content-Length: the connection broke."""

    class Torn(BaseHTTPRequestHandler):
        count = 0

        def do_POST(self) -> None:
            Torn.count += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            whole = b'{"scores": [1, 2]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole if Torn.count > 1 else whole[:5])

        def log_message(self, *_: Any) -> None:
            pass

    torn = ThreadingHTTPServer(("127.0.0.1", 0), Torn)
    threading.Thread(target=torn.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        assert reward(f"http://127.0.0.1:{torn.server_port}/").score(ANSWERS) == [1.0, 2.0]
    finally:
        torn.shutdown()
        torn.server_close()
    assert Torn.count == 2
