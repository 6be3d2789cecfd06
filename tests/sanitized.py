"""A pytest plugin: the native module of `make sanitize-cpu` in the place of the one that is installed."""

import importlib.util
import os
import sys
from pathlib import Path

(_PATH,) = Path(os.environ["RLHF_FAST_SANITIZED"]).glob("_native*.so")
_spec = importlib.util.spec_from_file_location("rlhf_fast._native", _PATH)
assert _spec is not None
assert _spec.loader is not None
sys.modules["rlhf_fast._native"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["rlhf_fast._native"])
