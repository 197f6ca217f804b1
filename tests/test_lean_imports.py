"""The shorter import of transformers: what it leaves out can still be had."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from lumos import lean_imports

assert lean_imports.import_lean()
import lumos.models.lumos1.pipeline, lumos.models.stiv.pipeline, lumos.runtime
import transformers

package = transformers
assert [type(sys.modules[name]) for name in lean_imports.PACKAGES] == [lean_imports.Unread] * 2
assert transformers.utils is sys.modules["transformers.utils"]
assert not hasattr(package, "__nothing__")
from transformers import GPT2Config, PreTrainedModel, T5EncoderModel

assert PreTrainedModel is sys.modules["transformers.modeling_utils"].PreTrainedModel
assert issubclass(T5EncoderModel, PreTrainedModel) and GPT2Config().model_type == "gpt2"
assert sys.modules["transformers"] is not package and package.GPT2Config is GPT2Config
assert not hasattr(package, "NoSuchModel")
assert sys.modules["transformers"].__version__ == package.__version__
assert not lean_imports.import_lean()
"""
TOO_LATE = """
import sys, transformers
from lumos import lean_imports

assert not lean_imports.import_lean() and "transformers.modeling_utils" not in sys.modules
assert sys.modules["transformers"] is transformers and not isinstance(transformers, lean_imports.Unread)
"""
OTHER_VERSION = """
import sys
from lumos import lean_imports

sys.modules["transformers.core_model_loading"] = None  # its import fails, and so does that of modeling_utils
assert not lean_imports.import_lean()
del sys.modules["transformers.core_model_loading"]
from transformers import GPT2Config, PreTrainedModel

assert not isinstance(sys.modules["transformers"], lean_imports.Unread)
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [PROGRAM, TOO_LATE, OTHER_VERSION], ids=["names", "too late", "other version"])
def test_all_of_transformers_can_still_be_had(repo, program):
    done = subprocess.run([sys.executable, "-c", program], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
