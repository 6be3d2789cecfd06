"""`make gpu` runs where there is no network: what it imports must be torch, pytest and what stands in its comment."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("hypothesis", "xdist", "pytest_benchmark", "matplotlib", "trl", "liger_kernel", "transformers", "pydantic")


def test_the_gpu_tests_and_benchmarks_import_with_torch_and_pytest_alone():
    hide = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"
    imports = "import benchmarks.__main__, tests.conftest, tests.gpu.test_ops"
    subprocess.run([sys.executable, "-c", hide + imports], cwd=ROOT, check=True)


def test_the_gpu_target_runs_no_other_tests():
    recipe = (ROOT / "Makefile").read_text().split("\ngpu:\n")[1].split("\n\n")[0]
    assert "-m pytest -m gpu tests/gpu\n" in recipe
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text()]
    assert {path.parent.name for path in marked if path.name != "test_gpu_target.py"} == {"gpu"}
