"""Gather what `make gpu` needs on a machine with a card and no network: wheels of pinned versions, without torch.

    python -m benchmarks.gpu.wheels build/gpu-wheels --python 3.12

The wheels of requirements-gpu.txt in the versions of constraints.txt, that of caa_lens itself, and the demo model's
tokenizer (not its weights) if it is on this machine. Fails above 60 MB. What was gathered, and how large each is,
stands in `benchmarks/gpu/wheels.json`, which the tests hold to the pinned versions.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60_000_000  # bytes
SIZES = Path(__file__).with_name("wheels.json")
TOKENIZER = "tokenizer.tar.xz"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 26, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def requirements() -> list[str]:
    """The names in requirements-gpu.txt."""
    lines = (ROOT / "requirements-gpu.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def pinned() -> dict[str, str]:
    """Versions of constraints.txt by name, both as package indices compare them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {plain(name): version for name, _, version in (line.strip().partition("==") for line in lines) if version}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def unpinned() -> list[str]:
    return [name for name in requirements() if plain(name) not in pinned()]


def check(sizes: dict[str, int], limit: int = LIMIT) -> None:
    """
    Raises:
        ValueError: if all files together are larger than the limit.
    """
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes.items(), key=lambda one: -one[1])[:5]
        named = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in largest)
        raise ValueError(
            f"the wheels are {total / 1e6:.1f} MB, expected at most {limit / 1e6:.0f}: leave a package out of "
            f"requirements-gpu.txt (the largest are {named})"
        )


def gather(folder: Path, python: str) -> dict[str, int]:
    """Fill the folder anew, for one version of Python; file sizes by name."""
    if missing := unpinned():
        raise ValueError(
            f"requirements-gpu.txt names {', '.join(missing)}, which constraints.txt does not pin: add them"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    of = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    of += [word for platform in PLATFORMS for word in ("--platform", platform)]
    files = ["-c", str(ROOT / "constraints.txt"), "-r", str(ROOT / "requirements-gpu.txt")]
    subprocess.run([*pip, "download", "--no-deps", *of, *files, "-d", str(folder)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    pack_tokenizer(folder)
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def pack_tokenizer(folder: Path) -> None:
    """The demo model's text files, in one archive; without them the tests that need its tokenizer are skipped."""
    from caa_lens.models.loading.demo_model import demo_model_path

    try:
        found = demo_model_path()
    except Exception as error:
        print(f"the demo model's tokenizer is not taken along ({error})", file=sys.stderr)
        return
    with tarfile.open(folder / TOKENIZER, "w:xz") as archive:
        for name in TOKENIZER_FILES:
            if (found / name).exists():
                archive.add(found / name, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="that of the card")
    parser.add_argument("--write-sizes", action="store_true", help="write wheels.json, for the tests")
    options = parser.parse_args()
    try:
        sizes = gather(options.folder, options.python)
        check(sizes)
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"make gpu-wheels: {error}")
    if options.write_sizes:
        SIZES.write_text(json.dumps({"python": options.python, "bytes": sizes}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(sizes)} files for Python {options.python} in {options.folder}, {sum(sizes.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
