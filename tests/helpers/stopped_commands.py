"""Commands that a real signal stops at a chosen moment, each in a process of its own that is forked off a warm one.

    results = run_commands([{"argv": [...], "at": "loading", "signal": "SIGINT"}, ...])

Moments: "loading" (a model has been read), "scoring" (the second batch of answers is about to run), "writing FILE" (a
file of that name is written beside its place, not yet renamed), "unit" (an experiment is to keep its second unit).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run_commands(commands: list[dict], cwd: Path) -> list[dict]:
    """Each command's exit code and what it said: `{"code": ..., "out": ..., "err": ...}`."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(commands),
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _stop_at(moment: str, how: int) -> None:
    """Arrange for the signal."""
    import caa_lens.atomic_files as files

    def stop() -> None:
        os.kill(os.getpid(), how)

    what, _, name = moment.partition(" ")
    if what == "writing":
        to_disk = files._to_disk

        def written(path: Path) -> None:
            to_disk(path)
            if path.is_file() and path.name.startswith(f".{Path(name).stem}.") and path.suffix == Path(name).suffix:
                stop()

        files._to_disk = written
        return
    if what == "loading":
        import caa_lens.models.loading.load as module

        place, attribute, calls = module, "_load_folder", 1
    elif what == "scoring":
        import caa_lens.measures.answers as module

        place, attribute, calls = module, "_score_as_rows", 2
    else:
        from experiments.running.run_folder import RunFolder

        place, attribute, calls = RunFolder, "save_bytes", 2
    real, met = getattr(place, attribute), [0]

    def stopped(*args, **kwargs):
        met[0] += 1
        if met[0] == calls:
            stop()
        return real(*args, **kwargs)

    setattr(place, attribute, stopped)


def _run(command: dict) -> dict:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
            if command.get("at"):
                _stop_at(command["at"], getattr(signal, command.get("signal", "SIGINT")))
            sys.argv = command["argv"]
            code = 1
            try:
                if command["argv"][0].endswith("__main__.py"):
                    import runpy

                    runpy.run_module("experiments", run_name="__main__", alter_sys=False)
                else:
                    from caa_lens.cli.commands import main

                    main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        found = {"code": os.waitstatus_to_exitcode(status)}
        for name, file in {"out": out, "err": err}.items():
            file.seek(0)
            found[name] = file.read().decode(errors="replace")
        return found


if __name__ == "__main__":
    import transformer_lens  # noqa: F401

    import caa_lens.demo.main_job
    import caa_lens.measures.answers

    # Few questions, and small batches of them, so that there is a second one.
    size = caa_lens.measures.answers._batch_size
    caa_lens.measures.answers._batch_size = lambda *args: min(4, size(*args))
    for constant, few in {"N_NEUTRAL": 8, "N_RANDOM": 1, "NEUTRAL_TOKENS": 3, "LENS_QUESTIONS": 2}.items():
        setattr(caa_lens.demo.main_job, constant, few)
    print(json.dumps([_run(command) for command in json.load(sys.stdin)]))
