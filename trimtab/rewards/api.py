"""A reward from a server: finished dialogues go out as text, numbers come back.

    POST URL   {"model": "...", "messages": ["<whole rendered dialogue>", ...]}   ->   {"scores": [1.5, ...]}

This is the protocol of LLaMA-Factory's reward servers and of `trimtab`'s own scoring endpoint. Texts hold the special tokens, the end
marker last. A server that does not answer is asked again, with pauses of 1, 2, 4 ... seconds; one that answers nonsense is not.
Either way the run ends with an error and a checkpoint, never with a 0.0 in place of an answer.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.errors import RewardError
from trimtab.rewards import Answer

_AGAIN = frozenset({408, 429, 500, 502, 503, 504})  # a server that is starting, busy or behind a proxy that lost it


class ApiReward:
    """Scores of a server at `url`."""

    name = "api"

    def __init__(
        self,
        url: str,
        decode: Callable[[Sequence[int]], str],
        *,
        model: str = "model",
        timeout: float = 60.0,
        retries: int = 4,
        where: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            decode: text of token ids, special tokens kept.
            model: what the server is told under "model".
            timeout: seconds to wait for a connection, and for each part of an answer.
            retries: how often to ask again.
            where: the place in the user's file, for errors.
        """
        self._url, self._decode, self._model, self._where = url, decode, model, where
        self._timeout, self._retries, self._sleep = timeout, retries, sleep

    def score(self, answers: Sequence[Answer]) -> list[float]:
        if not answers:
            return []
        texts = [self._decode(answer.row.token_ids) for answer in answers]
        return self._read(self._ask(texts), len(texts))

    def _ask(self, texts: list[str]) -> bytes:
        body = json.dumps({"model": self._model, "messages": texts}, ensure_ascii=False).encode("utf-8")
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
        tried = self._retries + 1
        for attempt in range(tried):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(200).decode("utf-8", "replace").strip()
                reason = f"it answers {error.code} {error.reason}" + (f": {said.splitlines()[0]}" if said else "")
                if error.code not in _AGAIN:
                    raise self._error("the reward server refuses the request", reason) from None
            except TimeoutError:
                reason = f"no answer within {self._timeout:g} s (reward_timeout)"
            except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                late = isinstance(cause, TimeoutError)
                reason = f"no answer within {self._timeout:g} s (reward_timeout)" if late else f"{cause}"
            if attempt < self._retries:
                self._sleep(2.0**attempt)
        raise self._error(f"the reward server does not answer, asked {tried} times", reason)

    def _read(self, body: bytes, count: int) -> list[float]:
        try:
            answer: Any = json.loads(body)
        except ValueError as error:
            shown = body[:80].decode("utf-8", "replace")
            raise self._error("the reward server's answer is not JSON", f"{error}: {shown!r}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            keys = ", ".join(answer) if isinstance(answer, dict) else type(answer).__name__
            raise self._error("the reward server's answer holds no list of scores", f"it holds: {keys or 'nothing'}")
        if len(scores) != count:
            raise self._error(
                f"the reward server gave {len(scores)} scores for {count} texts", "one is needed for each"
            )
        for number, score in enumerate(scores, 1):
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise self._error(f"score {number} of the reward server is {score!r}", "a score is a finite number")
        return [float(score) for score in scores]

    def _error(self, what: str, why: str) -> RewardError:
        return RewardError(
            what,
            where=f"{self._where}: {self._url}" if self._where else self._url,
            why=why,
            remedy='it must answer POST {"model": ..., "messages": [texts]} with {"scores": [numbers]}; mend it, then go on with '
            "--resume",
        )
