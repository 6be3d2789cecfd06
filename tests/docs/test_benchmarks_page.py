"""docs/benchmarks.md is made of the committed results, of all that can be there or of none."""

import json

import pytest

from benchmarks import catalogue
from benchmarks.catalogue import NOT_YET, PLOTS, ROOT, with_tables

PAGE = ROOT / "docs" / "benchmarks.md"
CPU = json.loads((catalogue.RESULTS / "cpu.json").read_text())


def growing() -> dict:
    """A run in which a context and a vocabulary double."""
    case = next(case for case in CPU["cases"] if case["case"] == "token_logprobs forward")
    sizes = [{"N": n, "V": v, "s": 4} for n, v in ((16, 64), (32, 64), (16, 128))]
    return {**CPU, "cases": [{**case, "group": "scaling", "sizes": size, "shape": str(size)} for size in sizes]}


def steps(algorithm: str) -> dict:
    step = {"generation": 0.0, "scoring": 0.1, "update": 0.2}
    repeat = {
        "seconds": [step] * 3, "losses": [1.0, 0.9, 0.8], "rewards": [],
        "held_bytes": 1, "resident_bytes": 1, "peak_bytes": 1,
    }  # fmt: skip
    contender = {"version": "1", "repeats": [repeat], "tensor_peak_bytes": 1}
    setting = {
        "algorithm": algorithm, "model": "tiny", "batch_size": 8, "steps": 3, "lora_rank": 8, "max_new_tokens": 4,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return {
        "machine": CPU["machine"], "versions": {}, "setting": setting, "absent": {},
        "contenders": {"rlhf_fast": contender, "trl": contender},
    }  # fmt: skip


@pytest.fixture
def made_of(monkeypatch, tmp_path):
    """The page's text of the given results, and the names of its plots."""

    def make(results: dict[str, dict]) -> tuple[str, set[str]]:
        monkeypatch.setattr(catalogue, "RESULTS", tmp_path)
        monkeypatch.setattr(catalogue, "PLOTS", tmp_path / "benchmarks")
        for name, result in results.items():
            (tmp_path / name).write_text(json.dumps(result))
        catalogue.draw()
        return with_tables(PAGE), {path.stem for path in (tmp_path / "benchmarks").iterdir()}

    return make


def test_the_plots_are_those_of_the_committed_results_and_small():
    expected = {path: source for path, (source, _) in catalogue.pictures().items()}
    assert set(PLOTS.iterdir()) == set(expected)
    for path, source in expected.items():
        drawn = path.read_bytes()
        assert source.encode() in drawn, f"{path.name} is of other results: python -m benchmarks.catalogue"
        assert len(drawn) < 60_000


def test_without_results_the_page_says_that_nothing_is_measured(made_of):
    text, plots = made_of({})
    assert plots == set()
    assert "|" not in text
    assert text.count(NOT_YET.capitalize()) == len(catalogue.PAGES[PAGE])


def test_every_result_that_is_there_is_on_the_page(made_of):
    runs = {"cpu.json": CPU, "cpu_torchtune.json": CPU, "gpu.json": CPU, "scaling_cpu.json": growing()}
    runs |= {
        name: json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        for name in ("memory.json", *catalogue.GPU_RUNS)
    }
    text, plots = made_of(runs | {f"steps_{name}.json": steps(name) for name in ("ppo", "grpo", "dpo")})
    assert plots == {"cpu_speed", "cpu_memory", "cpu_roofline", "scaling_context", "scaling_vocabulary", "steps"}
    assert all(f"](benchmarks/{plot}.png)" in text for plot in plots)
    assert NOT_YET.capitalize() not in text
    assert all(f"### {heading}\n" in text for heading in ("Every op", "Growing contexts and vocabularies", "GRPO"))


def test_a_plot_of_results_that_are_gone_is_removed(made_of, tmp_path):
    assert made_of({"scaling_cpu.json": growing()})[1]
    (tmp_path / "scaling_cpu.json").unlink()
    assert made_of({})[1] == set()
