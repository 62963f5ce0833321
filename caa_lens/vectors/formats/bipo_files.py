"""The released vectors of BiPO's authors: one bare tensor a file, whose name says the epoch and the layer.

    power-seeking_llama-2/vec_ep20_layer15.pt       [d_model], behind block 15 counted from 0

The folder is called after the behavior and, roughly, the model. Source: CaoYuanpu/BiPO, arXiv 2406.00045.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from caa_lens.file_kinds import VectorFileError
from caa_lens.vectors.formats.tensor_files import read_tensors
from caa_lens.vectors.steering_vectors import SteeringVectors

_NAME = re.compile(r"vec_ep([0-9]{1,4})_layer([0-9]{1,4})(?:_gpu[0-9]+)?\.pt", re.IGNORECASE)


def is_bipo_name(name: str) -> bool:
    """Whether a file is called as the authors call a vector."""
    return _NAME.fullmatch(name) is not None


def read_bipo(path: Path, *, model: str | None = None) -> SteeringVectors:
    """The one vector of a file, at the layer that its name says.

    Raises:
        VectorFileError: for another name, or if the file holds anything but one finite 1-D tensor.
    """
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise VectorFileError(f"{path} is not called as BiPO's authors call a vector, vec_ep20_layer15.pt")
    epoch, layer = map(int, found.groups())
    vectors = read_tensors(path, layers=(layer,), model=model)
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    behavior = folder.partition("_")[0] or vectors.behavior
    about = vectors.provenance
    details = {**about.details, "source": f"BiPO, {path.name}, epoch {epoch}", "folder": folder}
    about = replace(about, behavior=behavior, expression=behavior, method="BiPO", details=details)
    return replace(vectors, provenance=about)
