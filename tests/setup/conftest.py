import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tool():
    spec = importlib.util.spec_from_file_location("environment_tool", ROOT / "tools" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture
def tool():
    """tools/environment.py as a module, loaded anew so that a test may change it."""
    return load_tool()
