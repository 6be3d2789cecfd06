"""A judge behind an endpoint, a real server in a process of its own: slow, failing, killed, and started again."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_fast import http
from rlhf_fast.data.notes import forget
from rlhf_fast.errors import UserError
from rlhf_fast.rewards.cache import Cache
from rlhf_fast.rewards.endpoint import Endpoint
from rlhf_fast.rewards.judge import Judge
from rlhf_fast.rewards.speakers import EndpointSpeaker
from tests.fuzz.answers import ANSWERS, endpoint
from tests.training.interruptions import contents, run
from tests.training.tiny_runs import values_of


class Server:
    """The process, its port, and the requests that it answered."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.process = log, None
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self, mode="digits", *failures: int) -> "Server":
        script = Path(__file__).with_name("chat_server.py")
        words = [str(self.port), str(self.log), mode, *([",".join(map(str, failures))] if failures else [])]
        self.process = subprocess.Popen([sys.executable, str(script), *words])
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.05)
        raise AssertionError("the server does not listen")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def answered(self) -> list:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(http, "pause", lambda attempt, asked=None: float(asked or 0.05))
    forget()
    server = Server(tmp_path / "answered.jsonl")
    yield server
    if server.process is not None:
        server.kill()


def judge_at(server, tmp_path, form="score", **options):
    endpoint = Endpoint(server.url, "m", cache=Cache(tmp_path / "cache" / "answers.sqlite"), **options)
    return Judge(EndpointSpeaker(endpoint), form=form, principles=["Short words."])


def rated(judge, texts):
    return judge.scores(["q"] * len(texts), texts, {})[:, 0].tolist()


def test_confidence_comes_from_the_log_probabilities_of_the_verdict_where_there_are_any(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.start("digits")
    # P(3) = 0.75 and P(1) = 0.125 + 0.125 of two spellings; 10 is among the likeliest, so that 1 is not its beginning.
    expected = (3 * 0.75 + 1 * 0.25 + 10 * 0.0001) / 1.0001
    assert rated(judge_at(server, tmp_path), ["abc"]) == pytest.approx([expected])
    assert server.answered[0][0] == "Bearer secret"


def test_an_endpoint_that_refuses_log_probabilities_is_read_as_text_and_says_so(server, tmp_path, capsys):
    server.start("refuses")
    assert rated(judge_at(server, tmp_path), ["abc", "abcd"]) == [3.0, 4.0]
    assert "gives no log-probabilities: verdicts are read from its text" in capsys.readouterr().out


def test_answers_are_asked_for_once_and_the_cache_outlives_the_server(server, tmp_path):
    server.start("text")
    first = rated(judge_at(server, tmp_path), ["abc", "abcd"])
    assert len(server.answered) == 2
    server.kill()
    judge = judge_at(server, tmp_path, retries=0)
    assert rated(judge, ["abcd", "abc"]) == first[::-1] == [4.0, 3.0]
    assert judge.metrics()["judge_calls"] == 0


def test_statuses_that_pass_are_tried_again_after_what_the_server_asks_for(server, tmp_path):
    server.start("text", 429, 500, 503)
    judge = judge_at(server, tmp_path, concurrency=1)
    before = time.perf_counter()
    assert rated(judge, ["abc"]) == [3.0]
    assert time.perf_counter() - before > 0.2
    assert judge.metrics()["judge_calls"] == 4


@pytest.mark.parametrize(("failures", "message"), [
    ([401], r"judge http://127\.0\.0\.1:\d+/v1: status 401 .*not now"),
    ([500, 500], r"gave no answer in 2 tries, the last: status 500 .*; the answers so far are kept"),
])  # fmt: skip
def test_what_does_not_pass_is_one_line(failures, message, server, tmp_path):
    server.start("text", *failures)
    with pytest.raises(UserError, match=message):
        rated(judge_at(server, tmp_path, retries=1), ["abc"])


def test_a_slow_answer_is_a_failure_after_the_time_out(server, tmp_path):
    server.start("slow")
    with pytest.raises(UserError, match=r"gave no answer in 2 tries, the last: ReadTimeout"):
        rated(judge_at(server, tmp_path, retries=1, timeout=0.2), ["abc"])


def test_whatever_an_endpoint_answers_is_an_answer_or_a_line(monkeypatch):
    monkeypatch.setattr("rlhf_fast.rewards.endpoint.LARGEST", 1 << 20)
    said = []
    with endpoint() as url:
        for number, (status, headers, body) in enumerate(ANSWERS):
            asked = Endpoint(f"{url}/{number}/v1", "m", retries=0, timeout=0.5)
            try:
                (answer,) = asked.ask([[{"role": "user", "content": "q"}]], 4)
                assert status == 200
                assert isinstance(answer["text"], str), body[:100]
                json.dumps(answer, allow_nan=False)
            except UserError as error:
                said.append(str(error).removeprefix(f"judge {url}/{number}/v1 "))
                assert len(said[-1]) < 500, headers
    for wanted in (
        "answers with more than 1 MiB", "gave no answer in 1 tries, the last: ReadTimeout: it is still answering",
        "answers in another form than chat completions: choices.0.message.content: Input should be a valid string",
        "answers in another form than chat completions: choices.0.logprobs.content.0.top_logprobs.0.logprob: Input",
        "wants to be asked again in 1e+07 s",
    ):  # fmt: skip
        assert any(line.startswith(wanted) for line in said), wanted


def test_a_key_or_an_address_that_no_request_can_have(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "clé")
    for url in ("http://[/v1", "http://a/v1"):
        with pytest.raises(UserError, match="cannot be asked"):
            Endpoint(url, "m")


def test_questions_are_asked_in_parallel_and_no_more_than_allowed(server, tmp_path):
    server.start("slow")
    before = time.perf_counter()
    assert len(rated(judge_at(server, tmp_path, concurrency=4), ["a", "ab", "abc", "abcd", "abcde"])) == 5
    assert 2.0 < time.perf_counter() - before < 4.5


def test_the_budget_counts_requests_and_what_was_paid_for_stays(server, tmp_path):
    server.start("text")
    with pytest.raises(UserError, match=r"2 requests were sent, which is the budget \(judge.max_calls\)"):
        rated(judge_at(server, tmp_path, max_calls=2, concurrency=1), ["a", "ab", "abc"])
    assert rated(judge_at(server, tmp_path, max_calls=1), ["a", "ab", "abc"]) == [1.0, 2.0, 3.0]
    assert len(server.answered) == 3


def test_a_judge_that_never_gives_a_verdict_is_an_error(server, tmp_path):
    server.start("prose")
    with pytest.raises(UserError, match=r"gave no verdict of 1, 2, .* to any of 2 questions; say in judge.prompt"):
        rated(judge_at(server, tmp_path), ["a", "ab"])


def test_a_comparison_asks_in_both_orders(server, tmp_path):
    server.start("text")
    judge = judge_at(server, tmp_path, form="compare")
    # Of equal lengths the server always takes the first: the orders contradict each other.
    compared = judge.compare(["q", "q"], ["abc", "abc"], ["a", "xyz"], {})
    assert compared.probability.tolist() == [1.0, 0.5]
    assert judge.metrics() == {"judge_unreadable": 0.0, "judge_calls": 4.0, "judge_inconsistent": 0.5}
    assert len(server.answered) == 4


def test_a_server_killed_while_a_run_asks_is_waited_for_and_the_run_ends_as_an_undisturbed_one(server, tmp_path):
    values = values_of("grpo", steps=3, save_every=1)
    values["judge"] = {"by": server.url, "model": "m", "retries": 40, "cache": str(tmp_path / "a.sqlite")}
    server.start("text")
    run({**values, "output_dir": str(tmp_path / "whole")})
    asked = len(server.answered)
    server.kill()
    values["judge"]["cache"] = str(tmp_path / "b.sqlite")
    server.log.unlink()
    server.start("text")

    def kill_and_restart():
        while len(server.answered) < asked // 2:
            time.sleep(0.005)
        server.kill()
        time.sleep(0.3)
        server.start("text", 500, 429)

    disturber = threading.Thread(target=kill_and_restart)
    disturber.start()
    run({**values, "output_dir": str(tmp_path / "killed")})
    disturber.join()
    ours, theirs = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    for found in (ours, theirs):
        for row in found["metrics.jsonl"]:
            row.pop("judge_calls")
        for row in found["eval.jsonl"]:
            row["metrics"].pop("judge_calls")
    assert ours == theirs


def test_a_run_whose_judge_is_gone_for_good_stops_and_resumes_with_nothing_asked_twice(server, tmp_path):
    values = values_of("grpo", steps=3, save_every=1, output_dir=str(tmp_path / "run"))
    values["judge"] = {"by": server.url, "model": "m", "retries": 1, "concurrency": 1, "max_calls": 500,
                       "cache": str(tmp_path / "a.sqlite")}  # fmt: skip
    server.start("text")
    stopper = threading.Thread(target=lambda: (_until(lambda: len(server.answered) > 8), server.kill()))
    stopper.start()
    with pytest.raises(UserError, match="gave no answer in 2 tries"):
        run(values)
    stopper.join()
    before = server.answered
    server.start("text")
    run(values, resume="auto")
    questions = [question for _, question in server.answered]
    assert len(questions) > len(before) > 8
    whole = {**values, "output_dir": str(tmp_path / "whole"), "judge": {**values["judge"]}}
    run(whole)
    assert [q for _, q in server.answered] == questions, "every answer was in the cache"
    ours, theirs = contents(tmp_path / "run"), contents(tmp_path / "whole")
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]


def _until(holds):
    while not holds():
        time.sleep(0.005)
