"""Keys with entries of their own: what a stage produced, a program that checks, a language model that judges."""

import re
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class FromStage(BaseModel):
    """`{from: NAME}`: what the stage NAME of the same run produced.

    In stages that repeat it is of this round, or, where NAME comes later or is the stage itself, of the round before.
    first: what there is instead in the first round, a stage before the rounds, a folder or a file. rounds: all: the
    data of every round so far.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    stage: str = Field(alias="from")
    first: str | None = None
    rounds: Literal["last", "all"] = "last"


class VerifyConfig(BaseModel):
    """The entries of the key `verify`: a program that knows whether an answer is right."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)

    kind: Literal["exact", "math", "regex", "json_schema", "code", "choice"] = Field(description="of the answer")
    answer: str | None = Field(None, description="column of the right answers; default: answer, and tests for code")
    extract: str | None = Field(None, description="regular expression: its last match, or group 1, is the answer")
    normalize: bool = Field(True, description="exact: ignore case, repeated spaces and a full stop at the end")
    choices: str = Field("ABCDE", min_length=2, description="choice: the letters")
    pattern: str | None = Field(None, description="regex: the same for all rows, in place of the column")
    schema_file: str | None = Field(None, description="json_schema: the same for all rows, in place of the column")
    partial: bool = Field(False, description="code: the share of the tests that hold; else 0 unless all do")
    timeout: float = Field(10.0, gt=0, description="processor seconds of a check; of code, by the clock, of a process")
    memory: int = Field(512, ge=64, description="code: MiB of each process")
    processes: int = Field(8, ge=4, description="code: processes and threads at a time, two of the sandbox's")

    OWNERS: ClassVar[dict[str, str]] = {
        "normalize": "exact", "choices": "choice", "pattern": "regex", "schema_file": "json_schema", "partial": "code",
        "memory": "code", "processes": "code",
    }  # fmt: skip

    @model_validator(mode="after")
    def _of_its_kind(self) -> "VerifyConfig":
        for name, kind in self.OWNERS.items():
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"verify.{name} is of kind {kind}, got {getattr(self, name)!r} for {self.kind}")
        if self.kind == "code" and self.extract is not None:
            raise ValueError(f"verify.extract: of code, the last fenced block counts, got {self.extract!r}")
        if not self.choices.isalnum() or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"verify.choices must be different letters or digits, got {self.choices!r}")
        for name in ("extract", "pattern"):
            try:
                re.compile(getattr(self, name) or "")
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"verify.{name} {getattr(self, name)!r} is no regular expression: {error}") from None
        return self

    @property
    def column(self) -> str:
        return self.answer or ("tests" if self.kind == "code" else "answer")


class JudgeConfig(BaseModel):
    """The entries of the key `judge`: a language model that rates or compares answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)

    by: str | FromStage = Field("backbone", description="backbone, a model folder, or the URL of an endpoint (.../v1)")
    adapter: str | FromStage | None = Field(None, description="of the backbone: policy, reference, or a folder")
    model: str | None = Field(None, description="the model's name at the endpoint")
    form: Literal["score", "compare"] = Field("score", description="a rating of each answer, or the better of two")
    scale: str = Field("1-10", description="lowest and highest rating")
    labels: list[str] = Field(["1", "2"], min_length=2, max_length=2, description="of the two answers")
    prompt: str | None = Field(None, description="template, or a file of it; {prompt}, {completion}, any {column}")
    ending: str | None = Field(None, description="what stands before the verdict")
    principles: str | list[str] | None = Field(None, description="one is drawn each time; a list, or a file of lines")
    criteria: list[str] | None = Field(None, description="each is asked by itself")
    thought_tokens: int = Field(0, ge=0, description="tokens to think aloud before the verdict")
    clamp: float = Field(0.0, ge=0, lt=0.5, description="probabilities stay in [clamp, 1 - clamp]")
    debate: int = Field(0, ge=0, description="turns of an advocate of each answer, which the judge reads")
    argument_tokens: int = Field(96, ge=1, description="of one turn of a debate")
    against: str | None = Field(None, description="compare with this column, not with other completions of the prompt")
    timeout: float = Field(60.0, gt=0, description="seconds of a request")
    retries: int = Field(6, ge=0, description="further tries, with growing pauses")
    concurrency: int = Field(8, ge=1, description="requests at a time")
    max_calls: int | None = Field(None, ge=1, description="requests that the run may send")
    cache: str = Field("~/.cache/rlhf_fast/judge.sqlite", description="file of an endpoint's answers")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable with the endpoint's key")

    @field_validator("scale", mode="after")
    @classmethod
    def _scale(cls, value: str) -> str:
        low, _, high = value.partition("-")
        if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
            raise ValueError(f"judge.scale must be two whole numbers such as 1-10, got {value!r}")
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels(cls, value: Any) -> Any:
        return [str(label) for label in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits(self) -> "JudgeConfig":
        if self.is_endpoint and self.model is None:
            raise ValueError(f"judge.by {self.by} is an endpoint: judge.model must name its model")
        if self.adapter is not None and self.by != "backbone":
            raise ValueError(f"judge.adapter {self.adapter} is one of the backbone; judge.by is {self.by}")
        for key in ("debate", "against"):
            if getattr(self, key) and self.form != "compare":
                raise ValueError(f"judge.{key} is for form: compare, got {getattr(self, key)!r}")
        return self

    @property
    def is_endpoint(self) -> bool:
        return isinstance(self.by, str) and self.by.startswith(("http://", "https://"))


class EngineConfig(BaseModel):
    """The entries of the key `engine`: what samples completions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)

    kind: Literal["local", "transformers", "vllm"] = Field(
        "local", description="the weights that train, by our decoder or transformers'; or a server of vLLM"
    )
    continuous: bool = Field(False, description="transformers: its continuous batching, in place of generate")
    url: str | None = Field(None, description="vllm: of the server, http://HOST:PORT/v1")
    model: str | None = Field(None, description="vllm: its name of the base model; default: the first that it has")
    folder: str | None = Field(
        None, description="vllm: where it finds adapters; default: a RAM disk, where there is one"
    )
    timeout: float = Field(600.0, gt=0, description="vllm: seconds of a request")
    retries: int = Field(10, ge=0, description="vllm: further tries, with growing pauses: about two minutes")
    concurrency: int = Field(64, ge=1, description="vllm: prompts at a time")
    key_variable: str = Field("VLLM_API_KEY", description="vllm: environment variable with the server's key")

    @model_validator(mode="after")
    def _of_its_kind(self) -> "EngineConfig":
        for name in self.model_fields_set - {"kind"}:
            kind = "transformers" if name == "continuous" else "vllm"
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"engine.{name} is of kind {kind}, got {getattr(self, name)!r} for {self.kind}")
        if self.kind == "vllm" and not str(self.url).startswith(("http://", "https://")):
            raise ValueError(f"engine.url must be the server's, such as http://127.0.0.1:8000/v1, got {self.url!r}")
        return self
