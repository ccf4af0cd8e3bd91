"""Kills a run with SIGKILL again and again, resumes it, and compares it with one left alone.

    python -m experiments.reliability kill 50       50 kills on one rank: equal bit for bit
    python -m experiments.reliability kill 10 2     10 kills of one of two ranks: the other ends,
                                                    and the metrics are equal to 1e-6
    python -m experiments.reliability growth        500 steps: memory and disk

The kills come at random moments of the stages in turn: sampling, update, weight push, the writing
of a checkpoint. What these commands printed is in experiments/results/reliability.md.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import train  # first: it sets what torch reads when it is imported
from diagnose import read_metrics
from record import RunLog, checkpoints

OUT = Path("runs/reliability")
STEPS = 30
SMALL = [
    *"--method par --prompts_per_step 8 --group_size 4 --updates_per_rollout 2".split(),
    *"--eval_prompts 8 --eval_samples 4 --eval_every 5 --save_every 1".split(),
]
# {stage: (the name of its function in train.py, about how many seconds it takes here)}
STAGES = {
    "sampling": ("sample_batch", 0.08),
    "update": ("update", 0.05),
    "push": ("full_tensors", 0.003),
    "checkpoint": ("save_checkpoint", 0.04),
}


# ---- a run that kills itself ---------------------------------------------------------------------


class Killer:
    """Knows the stage that train.py is in, and kills the process in one of them."""

    def __init__(self, target, calls, delay):
        """It dies `delay` seconds into the given call of the target stage, on the last rank."""
        self.target = target
        self.calls = calls
        self.delay = delay
        self.stage = "between the stages"

    def watch(self, stage, name):
        """Replaces train.NAME by a function that tells when its stage begins and ends."""
        function = getattr(train, name)

        def watched(*args, **kwargs):
            self.begin(stage)
            result = function(*args, **kwargs)
            if stage != "push":  # a generator: its work is done until the next stage begins
                self.stage = "between the stages"
            return result

        setattr(train, name, watched)

    def begin(self, stage):
        self.stage = stage
        if stage != self.target:
            return
        self.calls -= 1
        last_rank = int(os.environ["WORLD_SIZE"]) - 1
        if self.calls == 0 and int(os.environ["RANK"]) == last_rank:
            threading.Timer(self.delay, self.die).start()

    def die(self):
        """Notes where the run was, and ends it."""
        with open(OUT / "kills", "a") as file:
            print(self.stage, file=file)
        os.kill(os.getpid(), signal.SIGKILL)


def worker(target, calls, delay, *arguments):
    """train.py with a Killer; it runs undisturbed if the target is no stage."""
    killer = Killer(target, int(calls), float(delay))
    for stage, (name, _) in STAGES.items():
        killer.watch(stage, name)
    train.main(list(arguments))


# ---- kill and resume -----------------------------------------------------------------------------


def start(name, ranks, target="none", calls=0, delay=0.0):
    """The exit code of a worker with the SMALL settings, and what it printed."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["-m", "experiments.reliability", "worker", target, str(calls), str(delay)]
    command += [*SMALL, "--steps", str(STEPS), "--out", str(OUT), "--name", name]
    command.append("--resume" if checkpoints(OUT / name) else "--overwrite")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stdout + done.stderr


def stages_of_death():
    """Where the run was at each kill so far."""
    file = OUT / "kills"
    return file.read_text().splitlines() if file.exists() else []


def kill(kills, ranks=1):
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    code, text = start("whole", ranks)
    assert code == 0, text
    slowest = kill_again_and_again(kills, ranks)
    code, text = start("killed", ranks)
    assert code == 0, text
    whole = metrics_without_times("whole")
    killed = metrics_without_times("killed")
    died = stages_of_death()
    where = [f"{count} in {stage}" for stage, count in Counter(died).most_common()]
    print(
        f"{len(died)} kills on {ranks} rank(s) ({', '.join(where)}), as many resumes; "
        f"{len(whole)} rows of metrics; largest difference to the run left alone: "
        f"{largest_difference(whole, killed):g}; slowest attempt, start to end: {slowest:.0f} s"
    )


def kill_again_and_again(kills, ranks):
    """Seconds of the slowest attempt, from start to end."""
    rng = random.Random(0)
    stages = list(STAGES)
    slowest = 0.0
    died = []
    while len(died) < kills:
        if (OUT / "killed" / f"checkpoint-{STEPS}").exists():
            shutil.rmtree(OUT / "killed")  # it reached the end: once more from the start
        stage = stages[len(died) % len(stages)]
        _, seconds = STAGES[stage]
        began = time.perf_counter()
        code, text = start("killed", ranks, stage, rng.randint(1, 3), rng.uniform(0, seconds))
        slowest = max(slowest, time.perf_counter() - began)
        before = len(died)
        died = stages_of_death()
        assert code == 0 or len(died) > before, text  # it ended by itself, with an error
    return slowest


def metrics_without_times(name):
    rows = []
    for row in read_metrics(OUT / name):
        rows.append({key: row[key] for key in row if not key.startswith("time/")})
    return rows


def largest_difference(whole, killed):
    """Between the metrics of two runs, which must have the same ones at the same steps."""
    assert [row.keys() for row in whole] == [row.keys() for row in killed]
    differences = []
    for row, other in zip(whole, killed):
        differences += [abs(row[key] - other[key]) for key in row]
    return max(differences)


# ---- memory and disk -----------------------------------------------------------------------------


def growth(steps=500):
    """Resident memory and the bytes on disk along a long run."""
    write = RunLog.write
    seen = []

    def measured(self, row):
        write(self, row)
        status = Path("/proc/self/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        disk = sum(path.stat().st_size for path in files) / 2**20
        seen.append(f"step {row['step']}: {resident:.0f} MiB resident, {disk:.1f} MiB on disk")

    RunLog.write = measured
    train.main(
        [
            *SMALL,
            *f"--steps {steps} --save_every 10 --out {OUT} --name long --overwrite".split(),
        ]
    )
    print("; ".join(seen[100::100]))


def main(task, *words):
    if task == "worker":
        worker(*words)
    elif task == "kill":
        kill(*map(int, words))
    elif task == "growth":
        growth(*map(int, words))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
