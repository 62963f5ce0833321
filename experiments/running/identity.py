"""What a run folder is held to, and what is noted beside it.

The whole run is held to its settings, its contrast sets, its model's contents
(`caa_lens.models.loading.fingerprint`: a name
can come to mean other weights) and the library versions (`run_identity`, in `run.json`): with others the folder is
refused, and so is one that was begun before contents were recorded. Settings and data that only some experiments use
(`settings.OF_SOME`: the base model, the kind of finetuning, the judge; the questions of MMLU and TruthfulQA, open-ended
prompts, rubrics) are no part of that.
Each experiment is held to its own and to those of what it needs (`Experiment.own`, in `<experiment>/identity.json`):

- they can be given, or left out, at any later start: an experiment that lacks its own is skipped and keeps what it has;
- given differently, once the experiment has a finished unit, the command is refused before anything is done, and every
  result stays; the experiment's folder can be deleted to have it done anew;
- the results of all other experiments are not touched either way.

The base model is held to its contents too. A judge's weights lie behind its endpoint: it is held to its name, the
endpoint, the settings and the rubrics, and what stands behind a name there is the endpoint's to say.

How patiently a judge is asked (`settings.OF_NONE`) may change from start to start. Every start is noted, in
`starts.json`, with its time, command, device, commit, versions and settings.
"""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from experiments.running.behavior_sets import behavior_sets
from experiments.running.experiment import Experiment
from experiments.running.run_folder import OtherRunError, RunFolder, differences
from experiments.running.settings import OF_NONE, OF_SOME, RunConfig

LIBRARIES = ("caa-lens", "torch", "transformer-lens", "transformers", "numpy", "pandas", "scikit-learn")


def run_identity(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Everything that must not change while a run goes on."""
    from caa_lens.models.loading.fingerprint import model_fingerprint

    return {
        "config": config.model_dump(mode="json", exclude={*OF_SOME, *OF_NONE}),
        "data": _data_hashes(config),
        "model": {"sha256": model_fingerprint(config.model)},
        "versions": library_versions(),
    }


def _data_hashes(config: RunConfig) -> dict[str, str]:
    hashes = {}
    for behavior in config.behaviors:
        sets = behavior_sets(config, behavior)
        hashes[f"{behavior}/generate"] = sets.generate.content_hash
        hashes[f"{behavior}/test"] = sets.test.content_hash
        if sets.validation is not None:
            hashes[f"{behavior}/validation"] = sets.validation.content_hash
    return hashes


def lacking_here(
    held: Mapping[str, Any],
    identities: Mapping[str, Mapping[str, Any]],
    experiments: Sequence[Experiment],
    config: RunConfig,
) -> list[str]:
    """A line for all that a run is `held` to, and this machine has otherwise: versions, data, the model's contents.

    Args:
        identities: what each experiment is held to beside that; none of those that the machine need not do.
    """
    here: dict[str, Mapping[str, Any]] = {"versions": {name: library_versions()[name] for name in held["versions"]}}
    if "data" in held:
        here["data"] = _data_hashes(config)
    if "model" in held:
        from caa_lens.models.loading.fingerprint import model_fingerprint

        here["model"] = {"sha256": model_fingerprint(config.model)}
    lines = [line for kind, found in here.items() for line in differences(kind, held[kind], found)]
    by_name = {one.name: one for one in experiments}
    for name, identity in identities.items():
        lines += differences(name, identity, own_identity(by_name[name], experiments, config))
    return lines


def own_identity(experiment: Experiment, experiments: Sequence[Experiment], config: RunConfig) -> dict[str, Any]:
    """What an experiment and all that it needs are held to beside the run, by name."""
    by_name = {one.name: one for one in experiments}
    identity: dict[str, Any] = {}
    for name in experiment.needs(config):
        if name in by_name:
            identity |= own_identity(by_name[name], experiments, config)
    return identity | dict(experiment.own(config))


def hold(experiments: Sequence[Experiment], config: RunConfig, folder: RunFolder) -> Mapping[str, Mapping[str, Any]]:
    """Hold every experiment to its own settings and data; they are returned by the experiments' names.

    Raises:
        OtherRunError: some have results with others. Nothing is changed then.
    """
    identities = {one.name: own_identity(one, experiments, config) for one in experiments}
    different = [line for name, identity in identities.items() for line in folder.differs(name, identity)]
    for name, identity in identities.items():
        if not different:
            different = folder.hold(name, identity)
    if different:
        listed = "\n  ".join(different)
        names = ", ".join(dict.fromkeys(line.split(".")[0] for line in different))
        raise OtherRunError(
            f"{folder.path} has results with other settings or data:\n  {listed}\nthey stay. Choose another folder "
            f"with --out, give the settings of then, leave out these experiments, or delete their folders ({names}) in "
            f"{folder.path} to have them done anew"
        )
    return identities


def prompts_hash(config: RunConfig) -> dict[str, str]:
    """Of every behavior's open-ended prompts, as they are used."""
    prompts = {behavior: behavior_sets(config, behavior).open_ended for behavior in config.behaviors}
    return {f"{behavior}/open_ended": content_hash(asked) for behavior, asked in prompts.items() if asked}


def content_hash(content: Any) -> str:
    """SHA-256 of something that JSON can say."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def without_password(url: str | None) -> str | None:
    """A URL without user name, password and query, to be written down."""
    if url is None:
        return None
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


def run_notes(experiments: Sequence[str]) -> dict[str, Any]:
    """When and from what code a run began, and the order of its report."""
    return {**_when_and_from_what(), "experiments": [*experiments]}


def start_notes(
    config: RunConfig, experiments: Sequence[str], *, device: str | None = None, command: str | None = None
) -> dict[str, Any]:
    """When, from what code and with what settings a run was started, whether for the first time or again.

    Args:
        device: as torch names it, where the model is run; None where workers choose theirs.
        command: as it was given; addresses in it are written down without passwords.
    """
    settings = config.model_dump(mode="json") | {"judge_url": without_password(config.judge_url)}
    versions = {**library_versions(), "python": platform.python_version()}
    return {
        **_when_and_from_what(),
        "command": None if command is None else _without_passwords(command),
        "device": None if device is None else _device_told(device),
        "versions": versions,
        "settings": settings,
        "experiments": [*experiments],
    }


def _device_told(device: str) -> str:
    """With the card's name, or the processor's kind."""
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()})"


def _without_passwords(command: str) -> str:
    """A command's addresses as `without_password` writes them."""
    return re.sub(r"[\w+.-]+://[^\s'\"]+", lambda found: str(without_password(found[0])), command)


def library_versions() -> dict[str, str]:
    """Of the libraries that numbers depend on."""
    return {library: version(library) for library in LIBRARIES}


def _when_and_from_what() -> dict[str, Any]:
    return {"began": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit()}


def _commit() -> str | None:
    """The commit of this code, `+` behind it if there are changes; None outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
