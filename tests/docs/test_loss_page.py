"""The functor that docs/adding_a_loss.md shows is that of its Python function."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding_a_loss.md").read_text(encoding="utf-8")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
MAIN = """
#include <cstdio>
#include <initializer_list>
#include "math/policy_losses.h"
namespace rlhf {
%s
}
int main() {
  rlhf::Numbers<double> p{};
  p.clip_eps_high = 0.2;
  for (double ratio : {0.5, 1.0, 1.1, 1.2, 1.5})
    for (double advantage : {-2.0, 1.0}) {
      const rlhf::Token<double> token{0, 0, advantage, std::log(ratio), ratio, 0};
      const auto out = rlhf::Spo::at(token, {}, p, [](double x) { return std::exp(x); });
      std::printf("%%.17g %%.17g %%.17g %%.17g %%g %%g\\n", ratio, advantage, out.loss, out.slope, out.low, out.high);
    }
}
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_functor_is_the_equation_of_the_page(tmp_path):
    (functor,) = re.findall(r"^```cpp\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "main.cpp").write_text(MAIN % functor)
    command = [COMPILER, "-std=c++17", "-I", str(ROOT / "csrc"), "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    lines = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 10
    for ratio, a, loss, slope, low, high in (map(float, line.split()) for line in lines):
        assert loss == pytest.approx(-(ratio * a - abs(a) / 0.4 * (ratio - 1) ** 2), rel=1e-12)
        assert slope == pytest.approx(-ratio * (a - abs(a) / 0.2 * (ratio - 1)), rel=1e-12, abs=1e-12)
        assert (low, high) == (a < 0 and ratio < 0.8, a > 0 and ratio > 1.2)
