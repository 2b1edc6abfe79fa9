"""What flash-attn-4 warns of, imported or compiled, ends nothing under -W error."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest

from longvila.ops.backends import fa4

SOURCE = """
import warnings
warnings.warn("LayoutEnum is deprecated", DeprecationWarning)
def compile():
    warnings.warn("Argument aux_data (position 17) cannot be converted to a JitArgument")
    warnings.warn(
        "warpgroup.OperandMajorMode is deprecated, use cute.nvgpu.OperandMajorMode instead",
        DeprecationWarning,
    )
    warnings.warn(
        "cutlass.utils.smem_allocator.SmemAllocator is deprecated; use cutlass.memory",
        DeprecationWarning,
    )
def other():
    warnings.warn("torch.something is deprecated", DeprecationWarning)
"""


def test_warnings_of_the_kernels_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "interface.py").write_text(SOURCE)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    fa4._load.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module = fa4._load()
            assert not isinstance(module, str), module
            module.compile()
            with pytest.raises(DeprecationWarning, match="torch"):
                module.other()
    finally:
        fa4._load.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]
