"""The engine of a vLLM server, beside a stand-in that samples from the files it is given."""

import signal
import threading
from pathlib import Path

import pytest
import torch

from rlhf_fast import http, signals
from rlhf_fast.data.encoding import Prompt
from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.loading import load_model
from rlhf_fast.models.tiny import tiny
from rlhf_fast.rollout import agreement, roll_out
from rlhf_fast.rollout.engines.vllm import VLLM, answers
from tests.rollout.vllm_server import Server, until
from tests.training.interruptions import contents, run
from tests.training.tiny_runs import config_of, folder, scramble, values_of

TOKENIZER = tiny(0, hidden_size=32, layers=1, heads=2)[1]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http, "pause", lambda attempt, asked=None: 0.02)
    server = Server(folder() / "model").start()
    yield server
    server.kill()


@pytest.fixture
def backbone() -> Backbone:
    backbone = Backbone(load_model(str(folder() / "model"), dtype=torch.float32))
    backbone.add_adapter("policy", rank=2, seed=0)
    torch.manual_seed(1)
    scramble(backbone)
    return backbone


def rolled(backbone, engine, texts=("a", "bc", "bc", "bc"), **options):
    torch.manual_seed(0)
    prompts = [Prompt("", [257, *text.encode()], text, {"prompt": text}) for text in texts]
    given = {"max_new_tokens": 4, "keep_logprobs": True, "engine": engine, **options}
    return roll_out(backbone, TOKENIZER, prompts, **given)


def test_the_adapter_samples_as_the_scoring_says_and_rows_do_not_depend_on_each_other(server, backbone, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    engine = VLLM(server.url)
    rollout = rolled(backbone, engine)
    found = agreement(backbone, rollout.batch, rollout.sampler, 1.0)
    assert found.holds, found
    assert rollout.sampler.spread is None
    assert rolled(backbone, engine, role=None).completion_ids() != rollout.completion_ids()
    sent = server.sent("completions")
    assert [body["n"] for body in sent[:2]] in ([1, 3], [3, 1]), "a request for each prompt"
    alone = rolled(backbone, engine, ("bc", "a"), row_ids=[2, 0])
    assert alone.completion_ids() == [rollout.completion_ids()[row] for row in (2, 0)]
    assert len({tuple(ids) for ids in rollout.completion_ids()}) == 4
    assert len(server.sent("load_lora_adapter")) == 1, "the same weights are loaded once"


def test_each_state_of_the_adapter_is_loaded_under_a_name_of_its_own_and_the_last_one_leaves(server, backbone):
    engine = VLLM(server.url)
    assert not torch.cuda.is_available()
    assert engine.folder.parent == Path("/dev/shm") or not Path("/dev/shm").is_dir()
    for _ in range(3):
        rolled(backbone, engine)
        scramble(backbone)
    loaded = [body["lora_name"] for body in server.sent("load_lora_adapter")]
    assert loaded == [f"{engine.run}-v{k}" for k in (1, 2, 3)]
    assert [body["lora_name"] for body in server.sent("unload_lora_adapter")] == loaded[:2]
    assert set(map(tuple, server.travelled.values())) == {("adapter_config.json", "adapter_model.safetensors")}
    assert [path.name for path in engine.folder.iterdir()] == loaded[2:]
    engine.close()
    assert not engine.folder.exists()
    assert server.backbone.adapters == {}


@pytest.mark.parametrize(("change", "message"), [
    (lambda s, b: b.add_adapter("policy", rank=2, use_dora=True), "magnitudes (use_dora), which vLLM does not know"),
    (lambda s, b: b.add_adapter("policy", rank=9), "takes no adapter of rank 9: start it with --max-lora-rank 16"),
    (lambda s, b: b.add_adapter("policy", rank=600), "rank 600, which is more than vLLM takes, 512"),
    (lambda s, b: b.add_adapter("policy") or b.add_head("policy"), "a head of its own, which vLLM does not take"),
    (lambda s, b: setattr(s, "takes_adapters", False), "start it with --enable-lora and with VLLM_ALLOW_RUNTIME_LORA"),
    (lambda s, b: setattr(s, "context", 6), "are 7 tokens, its --max-model-len is 6"),
    (lambda s, b: s.faults.append((400, "no such thing")), "status 400 (no such thing)"),
    (lambda s, b: s.faults.extend([(500, "later")] * 3), "gave no answer in 3 tries, the last: status 500 (later);"),
    (lambda s, b: s.faults.append((200, "<html>")), "answers in another form than vLLM's: "),
    (lambda s, b: s.faults.append((200, '{"choices": [{}]}')), "in another form than vLLM's completions: KeyError"),
    (lambda s, b: s.faults.append((200, '{"choices": []}')), "gave 0 completions of a prompt, "),
], ids=lambda x: x[:24] if isinstance(x, str) else "")  # fmt: skip
def test_what_the_server_cannot_do_is_one_line(change, message, server, backbone, monkeypatch):
    if "use_dora" in message or "rank" in message or "head" in message:
        backbone.remove_adapter("policy")
    change(server, backbone)
    with pytest.raises(UserError) as caught:
        rolled(backbone, VLLM(server.url, retries=2, concurrency=1))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"engine vllm {server.url}")


@pytest.mark.parametrize(("mode", "options", "message"), [
    ("raw", {"temperature": 0.7}, "with temperature 0.7, start it with --logprobs-mode processed_logprobs"),
    ("processed", {"top_k": 3}, "with top_k 3 and top_p 1.0, start it with --logprobs-mode raw_logprobs"),
    ("raw", {"top_k": 3, "temperature": 0.7}, "temperature 0.7 is without those, got top_k 3 and top_p 1.0"),
    ("raw", {"temperature": 2.5}, "samples at temperatures from 0.01 to 2.0, got 2.5"),
    ("raw", {"top_k": 3}, None), ("processed", {"temperature": 0.7}, None), ("processed", {}, None),
    ("raw", {"top_k": 3, "temperature": 0.7, "keep_logprobs": False}, None),
], ids=str)  # fmt: skip
def test_log_probabilities_are_those_at_the_temperature_and_before_truncation(mode, options, message, server, backbone):
    server.mode = mode
    engine = VLLM(server.url)
    if message is not None:
        with pytest.raises(UserError) as caught:
            rolled(backbone, engine, **options)
        assert message in str(caught.value)
        return
    rollout = rolled(backbone, engine, **options)
    if rollout.sampler is not None:
        found = agreement(backbone, rollout.batch, rollout.sampler, options.get("temperature", 1.0))
        assert found.holds, found


def test_servers_without_ids_name_them_in_the_log_probabilities(server, backbone):
    choice = server.choice
    server.choice = lambda body, index: {**choice(body, index), "token_ids": None}
    texts = rolled(backbone, VLLM(server.url)).completion_ids()
    server.choice = choice
    assert rolled(backbone, VLLM(server.url)).completion_ids() == texts


def test_the_name_of_the_base_model_is_checked(server):
    assert VLLM(server.url).base.name == "base"
    with pytest.raises(UserError, match=r"serves base, not 'bass' \(engine.model\)"):
        VLLM(server.url, model="bass").base  # noqa: B018
    with pytest.raises(UserError, match=r"engine.folder .*: Not a directory"):
        VLLM(server.url, folder=__file__)


def test_a_signal_ends_the_wait_for_a_server():
    held = threading.Event()
    with signals.listening():
        signals.hold(lambda: True)
        coming = answers([0, 1], lambda job: held.wait() if job else "first", 2)
        assert next(coming) == (0, "first")
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(signals.Interrupted):
            next(coming)
        held.set()


def grpo(server, output, **changes):
    engine = {"kind": "vllm", "url": server.url, "retries": 200}
    return values_of("grpo", steps=3, save_every=1, num_minibatches=1, ppo_epochs=1, reference_refresh_every=None,
                     engine=engine, output_dir=str(output), **changes)  # fmt: skip


def test_a_run_pushes_its_adapter_at_every_step_and_survives_the_servers_restart(server, tmp_path):
    run(grpo(server, tmp_path / "whole"))
    asked, whole = len(server.requests), contents(tmp_path / "whole")
    assert len(server.sent("load_lora_adapter")) == 4, "the start, and after each of three steps"
    first, *later = whole["metrics.jsonl"]
    assert first["sampler_gap"] <= first["sampler_gap_limit"]
    assert all(row["correction_mean"] == pytest.approx(1.0, abs=1e-4) for row in (first, *later))
    assert not list(tmp_path.glob("whole/warnings.jsonl"))
    server.requests.clear()

    def kill_and_restart():
        for part in (0.4, 0.7):
            until(lambda part=part: len(server.requests) > part * asked)
            server.kill()
            server.start()

    disturber = threading.Thread(target=kill_and_restart)
    disturber.start()
    run(grpo(server, tmp_path / "killed"))
    disturber.join()
    assert len(server.sent("load_lora_adapter")) > 4
    assert contents(tmp_path / "killed") == whole


def test_a_run_whose_server_is_gone_stops_and_goes_on_with_the_completions_that_had_come(server, tmp_path):
    run(grpo(server, tmp_path / "whole"))
    server.requests.clear()
    values = grpo(server, tmp_path / "run")
    values["engine"] |= {"retries": 1, "concurrency": 1}
    complete, asked = server.complete, []  # the trial, the evaluation before, and each step, of two prompts each

    def seven_times(body):
        asked.append((body["prompt"], body["seed"]))
        return complete(body) if len(asked) <= 7 else (503, {})

    server.complete = seven_times
    with pytest.raises(UserError, match=r"gave no answer in 2 tries, the last: status 503 .*--resume auto goes on"):
        run(values)
    server.complete = complete
    server.requests.clear()
    run(values, resume="auto")
    again = [(body["prompt"], body["seed"]) for body in server.sent("completions")]
    assert asked[7] in again
    assert asked[6] not in again, "the first prompt of the second step had its completions"
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_server_with_another_model_is_found_before_the_run(server, tmp_path):
    with torch.no_grad():
        server.backbone.model.get_input_embeddings().weight.mul_(4)
    with pytest.raises(UserError, match="samples from another model than the one that trains"):
        run(grpo(server, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_correction_is_on(server):
    engine = {"kind": "vllm", "url": server.url}
    assert config_of("grpo", engine=engine).sampler_correction
    assert not config_of("grpo").sampler_correction
    with pytest.raises(ValueError, match="sampler_correction false leaves a sampler of other rounding uncorrected"):
        config_of("grpo", engine=engine, sampler_correction=False)


@pytest.mark.parametrize(("algorithm", "changes", "message"), [
    ("online_dpo", {"rival": "mixture"}, "samples from policy and reference together, which engine vllm cannot"),
    ("ilql", {}, "steers what it samples by Q, which engine vllm cannot"),
    ("grpo", {"url": "127.0.0.1:8000"}, "engine.url must be the server's, such as http"),
    ("grpo", {"kind": "transformers"}, "engine.url is of kind vllm, got 'http://h/v1' for transformers"),
], ids=str)  # fmt: skip
def test_what_an_engine_cannot_do_is_refused_with_the_config(algorithm, changes, message):
    engine = {"kind": "vllm", "url": "http://h/v1"}
    engine |= {name: changes.pop(name) for name in ("kind", "url") if name in changes}
    with pytest.raises(ValueError, match=message):
        config_of(algorithm, engine=engine, **changes)
