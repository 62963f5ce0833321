"""Packages that only some of caa_lens needs, and the extra of the installation that has them.

What `import caa_lens` and the main job need (extract, sweep, steer, generate, lenses, files of our own) is installed in
any case. Everything else is imported where it is used, inside `with needed_for(...)`, whose error of a missing one
says what to install.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# Package as it is imported: (its name where it is installed from, the smallest extra that has it).
EXTRA_OF = {
    "anyio": ("anyio", "judge"),
    "gguf": ("gguf", "files"),
    "httpx2": ("httpx2", "judge"),
    "ipywidgets": ("ipywidgets", "explore"),
    "jinja2": ("jinja2", "cli"),
    "openai": ("openai", "judge"),
    "peft": ("peft", "finetune"),
    "platformdirs": ("platformdirs", "demo"),
    "pooch": ("pooch", "experiments"),
    "pyarrow": ("pyarrow", "files"),
    "pyrate_limiter": ("pyrate-limiter", "judge"),
    "requests": ("requests", "experiments"),
    "rich": ("rich", "cli"),
    "sentencepiece": ("sentencepiece", "files"),
    "sklearn": ("scikit-learn", "analysis"),
    "tenacity": ("tenacity", "judge"),
    "tornado": ("tornado", "explore"),
    "typer": ("typer", "cli"),
    "vaderSentiment": ("vaderSentiment", "text"),
    "zstandard": ("zstandard", "interop"),
}


@contextmanager
def needed_for(purpose: str, *, extra: str | None = None) -> Iterator[None]:
    """Around imports of packages that not every installation has.

    with needed_for("files in GGUF"):
        from gguf import GGUFWriter

    Args:
        purpose: what they are needed for, as the error begins: "files in GGUF".
        extra: the extra that has all that `purpose` takes, where it is another than the package's own.

    Raises:
        ImportError: such a package is missing; with what to install. Any other error is passed on.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA_OF:
            raise
        name, own = EXTRA_OF[missing]
        raise ImportError(
            f"for {purpose}, the package {name} is missing: pip install 'caa-lens[{extra or own}]'",
            name=missing,
        ) from None
