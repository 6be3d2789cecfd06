"""A vLLM server, which holds the base model a second time and is given the adapter alone, as files.

Its protocol: POST {url}/completions with ids of tokens, and {url}/load_lora_adapter with a name and a folder.
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html

Every state of the adapter has a name of its own, NAME-v1, NAME-v2 ..., with which vLLM also keys what it keeps of
prompts. A server that starts again knows none of them: what answers 404 is loaded again.
"""

import hashlib
import math
import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from itertools import groupby
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import httpx2
import torch

from rlhf_fast import signals
from rlhf_fast.data.notes import say
from rlhf_fast.errors import UserError
from rlhf_fast.http import Client
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.rollout.engines.protocol import Ask, Coming, Rule, Sampled

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
TEMPERATURES = (0.01, 2.0)  # vLLM samples at 0.01 below the first, and refuses what is above the second
RAM_DISK = Path("/dev/shm")

J = TypeVar("J")
R = TypeVar("R")


class Base(NamedTuple):
    """The model that the server was started with. context: the tokens of a prompt and its completion."""

    name: str
    context: int


class Published(NamedTuple):
    """An adapter that the server has: the digest of its values, its rank, its name there and where its files are."""

    digest: str
    rank: int
    name: str
    folder: Path


class VLLM:
    """The server at `url` (".../v1").

    model: the name of its base model; default: the first that it names. folder: where it finds adapters; default: a RAM
    disk where there is one. timeout: seconds of a request; what is lost is asked for again as http.Client says.
    concurrency: requests at a time, one for each prompt and all of its completions.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        folder: str | None = None,
        key_variable: str = "VLLM_API_KEY",
        timeout: float = 600.0,
        retries: int = 10,
        concurrency: int = 64,
    ) -> None:
        self.name = f"engine vllm {url.rstrip('/')}"
        self.model, self.concurrency, self.retries = model, concurrency, retries
        self.client = Client(
            url, "engine vllm", timeout=timeout, retries=retries, concurrency=concurrency, key_variable=key_variable,
            kept="the completions so far are kept",
        )  # fmt: skip
        self.run = f"rlhf_fast-{secrets.token_hex(4)}"
        self.folder = _folder(folder, self.run)
        self.published: dict[str, Published] = {}  # by role
        self._versions = 0
        self._lock = threading.Lock()
        self._loads = 0
        self._base: Base | None = None
        self._processed: bool | None = None
        self.close = weakref.finalize(self, _end, self.client, self.folder, self.published)

    def sample(self, backbone: Backbone, role: str | None, asked: Sequence[Ask], rule: Rule) -> Coming:
        low, high = TEMPERATURES
        if not low <= rule.temperature <= high:
            raise UserError(f"{self.name} samples at temperatures from {low} to {high}, got {rule.temperature}")
        longest = max(len(ask.ids) for ask in asked) + rule.max_new_tokens
        if longest > self.base.context:
            raise UserError(f"{self.name}: a prompt and max_new_tokens {rule.max_new_tokens} are {longest} tokens, its "
                            f"--max-model-len is {self.base.context}")  # fmt: skip
        if rule.logprobs:
            self._check_logprobs(asked[0].ids, rule)
        published = None if role is None else self._publish(backbone, role)
        requests = [list(group) for group in _groups(asked)]

        def answer(places: list[int]) -> list[Sampled]:
            return self._sampled([asked[place] for place in places], rule, published)

        for number, completions in answers(requests, answer, self.concurrency):
            yield from zip(requests[number], completions, strict=True)

    @property
    def base(self) -> Base:
        if self._base is None:
            served = self._json("GET", "/models")
            try:
                cards = [card for card in served["data"] if not card.get("parent")]
                bases = {card["id"]: Base(card["id"], int(card["max_model_len"])) for card in cards}
                first = next(iter(bases))
            except (KeyError, TypeError, StopIteration, AttributeError, ValueError) as error:
                raise UserError(f"{self.name}: /models answers in another form than vLLM's: {error!r}") from None
            if self.model is not None and self.model not in bases:
                raise UserError(f"{self.name} serves {', '.join(bases)}, not {self.model!r} (engine.model)")
            self._base = bases[self.model or first]
        return self._base

    def _sampled(self, group: Sequence[Ask], rule: Rule, published: Published | None) -> list[Sampled]:
        """The completions of one prompt, whose rows follow each other: the server adds 1 to the seed for each."""
        body = self._body(group[0].ids, rule) | {"n": len(group), "seed": rule.seed + group[0].row}
        answer = self._completions(body, published)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [_sampled(choice, rule) for choice in choices]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{self.name} answers in another form than vLLM's completions: {error!r}") from None
        if len(found) != len(group):
            raise UserError(f"{self.name} gave {len(found)} completions of a prompt, {len(group)} were asked for")
        return found

    def _body(self, ids: Sequence[int], rule: Rule) -> dict[str, Any]:
        """All that decides the distribution: for what is left open, the server takes the checkpoint's own settings."""
        return {
            "prompt": list(ids), "max_tokens": rule.max_new_tokens, "temperature": rule.temperature,
            "top_k": rule.top_k, "top_p": rule.top_p, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": list(rule.stops),
            "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip

    def _completions(self, body: dict[str, Any], published: Published | None) -> Any:
        name = self.base.name if published is None else published.name
        for _ in range(self.retries + 1):
            loads = self._loads
            response = self.client.request("POST", "/completions", {"model": name, **body})
            if response.status_code != 404 or published is None:
                return self._parsed(response)
            with self._lock:
                if loads == self._loads:  # no other request has noticed it
                    self._load(published)
        raise UserError(f"{self.name} loads {name} and then does not know it")

    def _publish(self, backbone: Backbone, role: str) -> Published:
        """The adapter of `role` as it is now, loaded; the one before is not needed any more."""
        digest, last = digest_of(backbone, role), self.published.get(role)
        if last is not None and last.digest == digest:
            return last
        rank = self._checked_rank(backbone, role)
        self._versions += 1
        name = f"{self.run}-v{self._versions}"
        new = Published(digest, rank, name, self.folder / name)
        try:
            save_adapter(backbone, role, new.folder, checked=False)
        except OSError as error:
            raise UserError(f"{new.folder} cannot be written: {error.strerror} (engine.folder)") from None
        with self._lock:
            self._load(new)
        self.published[role] = new
        if last is not None:
            response = self.client.request("POST", "/unload_lora_adapter", {"lora_name": last.name})
            if response.status_code not in (200, 404):
                say(f"{self.client.refusal(response)}: {last.name} stays loaded")
            shutil.rmtree(last.folder)
        return new

    def _load(self, published: Published) -> None:
        body = {"lora_name": published.name, "lora_path": str(published.folder)}
        response = self.client.request("POST", "/load_lora_adapter", body, final=_refuses)
        if response.status_code == 404 and "adapter" not in response.text:
            raise UserError(f"{self.name} does not take adapters: start it with --enable-lora and with "
                            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment")  # fmt: skip
        if "max_lora_rank" in response.text and published.rank <= RANKS[-1]:
            least = next(rank for rank in RANKS if rank >= published.rank)
            raise UserError(f"{self.name} takes no adapter of rank {published.rank}: start it with --max-lora-rank "
                            f"{least}")  # fmt: skip
        if response.status_code != 200 and "already been loaded" not in response.text:
            raise self.client.refusal(response)
        self._loads += 1

    def _checked_rank(self, backbone: Backbone, role: str) -> int:
        """The greatest of the adapter's ranks. UserError for an adapter that vLLM cannot have."""
        shapes = [pair.shape for pair in backbone.adapters[role].values()]
        if any(shape.use_dora for shape in shapes):
            raise UserError(f"{self.name}: adapter {role!r} has DoRA magnitudes (use_dora), which vLLM does not know")
        if role in backbone.heads:
            raise UserError(f"{self.name}: adapter {role!r} has a head of its own, which vLLM does not take")
        rank = max(shape.rank for shape in shapes)
        if rank > RANKS[-1]:
            raise UserError(
                f"{self.name}: adapter {role!r} has rank {rank}, which is more than vLLM takes, {RANKS[-1]}"
            )
        return rank

    def _check_logprobs(self, ids: Sequence[int], rule: Rule) -> None:
        """UserError where the log-probabilities that the server gives are not those at the temperature and before top_k
        and top_p: they are either before all of these, or behind all."""
        truncated, scaled = rule.truncates, rule.temperature != 1
        if truncated and scaled:
            raise UserError(f"{self.name} gives log-probabilities before the temperature, or behind top_k and top_p: "
                            f"temperature {rule.temperature} is without those, got top_k {rule.top_k} and top_p "
                            f"{rule.top_p}")  # fmt: skip
        if not (truncated or scaled):
            return
        if self._processed is None:
            bodies = [self._body(ids, Rule(1, (), 0, temperature)) | {"logprobs": 1} for temperature in (1.0, 2.0)]
            first, second = (self._completions(body, None)["choices"][0]["logprobs"] for body in bodies)
            self._processed = max(first["top_logprobs"][0].values()) != max(second["top_logprobs"][0].values())
        if self._processed != scaled:
            mode = "processed_logprobs" if scaled else "raw_logprobs"
            asks = f"temperature {rule.temperature}" if scaled else f"top_k {rule.top_k} and top_p {rule.top_p}"
            raise UserError(f"{self.name}: with {asks}, start it with --logprobs-mode {mode}")

    def _json(self, method: str, path: str) -> Any:
        return self._parsed(self.client.request(method, path))

    def _parsed(self, response: httpx2.Response) -> Any:
        if response.status_code != 200:
            raise self.client.refusal(response)
        try:
            return response.json()
        except ValueError as error:
            raise UserError(f"{self.name} answers in another form than vLLM's: {error}") from None


def _end(client: Client, folder: Path, published: dict[str, Published]) -> None:
    """The last adapters are unloaded, where the server is still there, and their files are gone."""
    client.retries = 0
    for last in published.values():
        try:
            client.request("POST", "/unload_lora_adapter", {"lora_name": last.name})
        except UserError:
            break
    shutil.rmtree(folder, ignore_errors=True)


def _folder(wanted: str | None, name: str) -> Path:
    """An empty folder of that name: in `wanted`, on a RAM disk where there is one, or with temporary files."""
    try:
        if wanted is not None:
            folder = Path(wanted).absolute() / name
            folder.mkdir(parents=True)
            return folder
        ram = RAM_DISK.is_dir()
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=RAM_DISK if ram else None))
    except OSError as error:
        raise UserError(f"engine.folder {wanted or RAM_DISK}: {error.strerror}") from None


def _groups(asked: Sequence[Ask]) -> list[list[int]]:
    """Places of the same prompt whose rows follow each other."""
    keyed = groupby(range(len(asked)), key=lambda place: (asked[place].ids, asked[place].row - place))
    return [list(places) for _, places in keyed]


def _sampled(choice: dict[str, Any], rule: Rule) -> Sampled:
    """A completion; servers that do not give its tokens write them as the names of the log-probabilities."""
    names, logprobs = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
    ids = choice.get("token_ids") or [int(name.removeprefix("token_id:")) for name in names]
    if not rule.logprobs:
        return Sampled(ids, [], [])
    return Sampled(ids, logprobs, [math.nan] * len(ids) if rule.truncates else logprobs)


def _refuses(response: httpx2.Response) -> bool:
    """Whether a server that answers 500 to an adapter says what it has against it, and lives."""
    return response.status_code == 500 and "lora" in response.text.lower()


def digest_of(backbone: Backbone, role: str) -> str:
    """A hash of the adapter's values and scales."""
    digest = hashlib.sha256()
    for name, pair in backbone.adapters[role].items():
        digest.update(f"{name} {pair.shape.scale}".encode())
        for parameter in pair.parameters.values():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def answers(jobs: Sequence[J], work: Callable[[J], R], threads: int) -> Generator[tuple[int, R], None, None]:
    """(place, what `work` gives) as they come, by so many threads; the first failure ends it.

    A signal is obeyed while they work, and an end of the program waits for none of them.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    for place in range(len(jobs)):
        waiting.put(place)
    done: SimpleQueue[tuple[int, R | None, BaseException | None]] = SimpleQueue()
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            try:
                place = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((place, work(jobs[place]), None))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the result raises it
                done.put((place, None, error))
                return

    for _ in range(min(threads, len(jobs))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in jobs:
            while True:
                signals.heed()
                try:
                    place, result, error = done.get(timeout=0.1)
                    break
                except Empty:
                    continue
            if error is not None:
                raise error
            yield place, result  # type: ignore[misc]
    finally:
        ended.set()
