"""The package's face: cheap to import, every name there."""

import subprocess
import sys

import pytest

import core.data


def test_importing_the_package_loads_nothing_heavy():
    heavy = "{'torch', 'torchvision', 'timm', 'mmengine', 'numpy', 'PIL', 'decord', 'cv2'}"
    script = f"import sys, core.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there():
    for name in core.data.__all__:
        assert getattr(core.data, name).__name__ == name
    assert set(core.data.__all__) <= set(dir(core.data))
    with pytest.raises(AttributeError, match=r"'core.data' has no attribute 'Nothing'"):
        core.data.Nothing  # noqa: B018
