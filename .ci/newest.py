"""What `make newest` has to know of the packages that it found. Run with their folder on PYTHONPATH.

python .ci/newest.py asks       what transformers asks of the packages that are released together with it
python .ci/newest.py versions   which versions are imported
"""

import sys
from importlib.metadata import requires, version

TOGETHER = ("huggingface-hub", "safetensors", "tokenizers")

if sys.argv[1:] == ["asks"]:
    for requirement in requires("transformers") or []:
        if requirement.startswith(TOGETHER) and ";" not in requirement:
            print(requirement)
elif sys.argv[1:] == ["versions"]:
    for package in ("transformer-lens", "transformers", *TOGETHER, "torch"):
        print(f"{package} {version(package)}")
else:
    raise SystemExit(__doc__)
