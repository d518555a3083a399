"""The versions of what the other scripts use."""

import json
import platform

import torch
import transformers

print(json.dumps({"Python": platform.python_version(), "PyTorch": torch.__version__, "transformers": transformers.__version__}))
