"""The day that a card is there: tests on it, benchmarks at full size, and the table, in under ten minutes.

    make gpu                                             # `python3` is the one that has torch with CUDA
    make gpu PYTHON=/opt/torch/bin/python3 ARGS="--dtype float16"
    make gpu DEVICE=cpu ARGS="--shapes tiny --dtype float32 --tests tests/steering/test_placing.py"     # a rehearsal

Needs build/gpu-wheels, which `make gpu-wheels` fills on a machine with a network, and this machine's own torch.
Nothing is fetched and nothing is installed outside build/gpu. Rows and outcomes are kept one by one: what was cut
short, by the clock or by Ctrl-C, goes on where it was when the same command is given again. Only the standard library
is imported here.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import left_out, modules, outcomes, table, wheels

ROOT = Path(__file__).resolve().parents[2]
HERE = f"{sys.version_info[0]}{sys.version_info[1]}"
ASK = """
import json, sys, torch
kind = sys.argv[1].partition(":")[0]
told = {"torch": torch.__version__, "cards": torch.cuda.device_count()}
if kind == "cuda" and told["cards"]:
    free, total = torch.cuda.mem_get_info()
    told |= {"name": torch.cuda.get_device_name(), "free": free, "total": total}
print(json.dumps(told))
"""


class NotReady(Exception):
    """Something is missing; the text says what was found, what is expected and what to do."""


def installed(folder: Path, target: Path) -> None:
    """Unpack the wheels, which is all that installing them would do here; done once for the same files."""
    files = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if not files:
        raise NotReady(
            f"found no wheels in {folder}, expected those of `make gpu-wheels`: run it where there is a network"
        )
    for file in files:
        python, abi, _ = file.stem.split("-")[-3:]
        if python.startswith("cp") and "abi3" not in abi and f"cp{HERE}" not in python.split("."):
            raise NotReady(
                f"got {file.name}, but {sys.executable} is Python {sys.version.split()[0]}: gather them again with "
                f"`make gpu-wheels GPU_PYTHON={sys.version_info[0]}.{sys.version_info[1]}`"
            )
    mark, names = target / ".wheels.json", json.dumps([[file.name, file.stat().st_size] for file in files])
    if mark.exists() and mark.read_text() == names:
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in files:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(target)
    for data in target.glob("*.data"):
        for part in ("purelib", "platlib"):
            if (data / part).is_dir():
                shutil.copytree(data / part, target, dirs_exist_ok=True)
        shutil.rmtree(data)
    shutil.copy(left_out.__file__, target / "sitecustomize.py")
    if (folder / wheels.TOKENIZER).exists():
        with tarfile.open(folder / wheels.TOKENIZER) as archive:
            archive.extractall(target / "tokenizer", filter="data")
    mark.write_text(names)


def environment(target: Path, outcomes_file: Path) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    found |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CAA_LENS_OUTCOMES": str(outcomes_file)}
    if (target / "tokenizer").is_dir():
        found["CAA_LENS_TOKENIZER"] = str(target / "tokenizer")
    return found


def card(device: str, env: dict[str, str]) -> str:
    """What there is, in words."""
    done = subprocess.run([sys.executable, "-c", ASK, device], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NotReady(
            f"{sys.executable} cannot import torch ({last}): name the Python that has it, make gpu PYTHON=..."
        )
    told = json.loads(done.stdout.splitlines()[-1])
    if not device.startswith("cuda"):
        return f"{device}, torch {told['torch']}: a rehearsal"
    if not told["cards"]:
        raise NotReady(
            f"torch {told['torch']} of {sys.executable} sees no card, expected one for --device {device}: name the "
            "Python whose torch has CUDA (make gpu PYTHON=...), or rehearse without a card (make gpu DEVICE=cpu)"
        )
    return f"{told['name']}, {told['free'] / 1e9:.0f} of {told['total'] / 1e9:.0f} GB free, torch {told['torch']}"


def run(command: Sequence[str], env: dict[str, str], allowed: float) -> int | None:
    """A command's exit status; None if its time was up, and it was asked to end."""
    if allowed < 5:
        return None
    process = subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(allowed)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        for what in (signal.SIGINT, signal.SIGKILL):
            os.killpg(process.pid, what)
            try:
                process.wait(10)
                break
            except subprocess.TimeoutExpired:
                continue
        if isinstance(error, KeyboardInterrupt):
            raise
        return None


def tests_row(file: Path, status: int | None) -> table.Row:
    """The tests as a row of the table."""
    counts = Counter(outcomes.read(file).values())
    said = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "none was run"
    ended = {None: "; the time was up, run again for the rest", 0: "", 1: ""}.get(
        status, f"; pytest ended with {status}"
    )
    met = None if status not in (0, 1) else not counts["failed"]
    return table.Row(
        work="tests on the card", figure=f"{said}{ended}", aim="none failed", met=met, failed=status is None
    )


def report(options: argparse.Namespace, keep: Path, outcomes_file: Path, status: int | None, words: str) -> str:
    text = table.markdown(keep)
    row = tests_row(outcomes_file, status)
    failed = [test for test, outcome in outcomes.read(outcomes_file).items() if outcome == "failed"]
    lines = [words, "", text, f"Tests on {options.device}: {row.figure}.", *(f"- failed: `{test}`" for test in failed)]
    markdown = "\n".join(lines) + "\n"
    table.write_whole(keep.with_suffix(".md"), markdown)
    return markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="*", default=["7b", "13b"], help="of Llama 2; none without a word behind it")
    parser.add_argument("--tests", nargs="*", default=list(modules.RUN), help="modules; none without a word behind it")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes of tests on one card"
    )
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--anew", action="store_true", help="forget what an earlier run kept")
    parser.add_argument("more", nargs="*", help="behind --, for benchmarks/full_size.py: -- --tokens 128 --compile")
    options = parser.parse_args()
    began, end = time.monotonic(), time.monotonic() + 60 * options.minutes
    keep, outcomes_file = options.out / f"table-{options.device}.json", options.out / f"outcomes-{options.device}.jsonl"
    status: int | None = None
    try:
        site = options.out / "site"
        installed(options.wheels, site)
        env = environment(site, outcomes_file)
        words = card(options.device, env)
    except NotReady as error:
        sys.exit(f"make gpu: {error}")
    print(words, flush=True)
    if options.anew:
        keep.unlink(missing_ok=True)
        outcomes_file.unlink(missing_ok=True)
    try:
        for i, shape in enumerate(options.shapes):
            # The tests get at least a third of the time, and a shape no more than its part of the rest.
            left = end - time.monotonic()
            allowed = left * (2 / 3 if options.tests else 1) / (len(options.shapes) - i)
            command = [
                "benchmarks/full_size.py",
                "--shape",
                shape,
                "--dtype",
                options.dtype,
                "--device",
                options.device,
            ]
            command += ["--keep", str(keep), *(["--load"] if i == 0 else []), *options.more]
            if run(command, env, allowed) is None:
                print(f"{shape}: its time was up; the rows so far are kept, run again for the rest", flush=True)
        if options.tests:
            command = [
                "-m",
                "pytest",
                "--device",
                options.device,
                "-p",
                "benchmarks.gpu.plugin",
                "-p",
                "no:cacheprovider",
            ]
            command += ["-n", str(options.workers), "--dist", "worksteal", "--tb=short", "--color=no", *options.tests]
            status = run(command, env, end - time.monotonic())
    except KeyboardInterrupt:
        print(report(options, keep, outcomes_file, None, words))
        sys.exit(
            f"make gpu: interrupted; what is above is kept in {options.out}, and the same command goes on from there"
        )
    print(report(options, keep, outcomes_file, status, words))
    print(f"{time.monotonic() - began:.0f} s; {keep}, and {keep.with_suffix('.md')} for docs/performance.md")
    if status not in (0, 5) and options.tests:
        sys.exit(1)


if __name__ == "__main__":
    main()
