"""Mutants: one line of the program changed, and a test must turn red.

    python -m experiments.mutants                    all of them; prints a table per file, and the survivors
    python -m experiments.mutants rollout.py         those of one file

The mutants of losses.py's mathematics stand in test_all.py (MUTANTS), where a test runs them in seconds. Those here change
what connects the functions: the loop, the ranks, the files, the flags. Each is tried on a copy of the project, in a process
of its own, with the tests that its last column names (an expression for `pytest -k`).
"""
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TIME_LIMIT = 180  # seconds; a mutant that hangs counts as killed

# file, text that stands in it exactly once, what replaces it, tests that should see it
MUTANTS = []


def copy_of_the_project(folder):
    """The project's Python files and test data in another folder; runs/, with the base policy, is shared."""
    ignore = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*cache", "*.png")
    shutil.copytree(HERE, folder, ignore=ignore)
    (HERE / "runs").mkdir(exist_ok=True)
    (folder / "runs").symlink_to(HERE / "runs")


def run_tests(folder, expression, log):
    """Exit code of pytest in a forked process that has torch imported already: 0 means that the mutant is alive."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
            del sys.modules[name]  # or the tests would import the project that is not mutated
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", expression, "--rootdir", str(folder)])
        os._exit(int(code))
    end = time.monotonic() + TIME_LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def try_mutant(file, old, new, expression, log):
    """Whether the tests see the mutant; ValueError if the text is not there exactly once or no test is chosen."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "project"
        copy_of_the_project(folder)
        source = (folder / file).read_text()
        if source.count(old) != 1:
            raise ValueError(f"{file}: {old!r} stands there {source.count(old)} times, not once")
        (folder / file).write_text(source.replace(old, new))
        code = run_tests(folder, expression, log)
        if code == 5:
            raise ValueError(f"-k {expression!r} chooses no test")
        return code != 0


def main(files):
    import datasets, matplotlib, torch, transformers  # noqa: E401, F401  once, before the forks

    chosen = [mutant for mutant in MUTANTS if not files or mutant[0] in files]
    killed, alive = Counter(), []
    for file, old, new, expression in chosen:
        if try_mutant(file, old, new, expression, "/dev/null"):
            killed[file] += 1
        else:
            alive.append((file, old, new, expression))
            print("alive:", file, repr(old), "->", repr(new), flush=True)
    for file in dict.fromkeys(mutant[0] for mutant in chosen):
        count = sum(mutant[0] == file for mutant in chosen)
        print(f"{file:12} {count:4} mutants, {killed[file]:4} killed")
    print(f"{'in all':12} {len(chosen):4} mutants, {len(chosen) - len(alive):4} killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
