"""How fast tritonbuild is, beside build tools that copy files: `python benchmarks/run.py`, about a quarter of an hour.

Every number of docs/benchmarks.md comes from this one command. Tools are measured in turn, round after round, and the
best of the rounds counts: other work on the machine only adds. It needs make, and the package index for the peers,
which get a virtual environment of their own under .build/benchmarks. Prints a table, writes a JSON file beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".build" / "benchmarks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", "DVC_NO_ANALYTICS": "1"}
DOIT = [sys.executable, "-m", "doit"]
BUILD = ["check", "trace", "config", "repository"]


@dataclass
class Cost:
    """What the best of some runs took."""

    wall_s: float = 1e9
    cpu_s: float = 1e9
    peak_mb: float = 0.0

    def best(self, other: Cost) -> Cost:
        return Cost(min(self.wall_s, other.wall_s), min(self.cpu_s, other.cpu_s), max(self.peak_mb, other.peak_mb))


@dataclass
class Line:
    """One line of the table: a measured cost, and how it stands to another one."""

    what: str
    cost: Cost
    beside: str = ""
    ratio: float | None = None
    budget: float | None = None
    notes: str = ""


@dataclass
class Report:
    """All that was measured."""

    lines: list[Line] = field(default_factory=list)

    def add(self, line: Line) -> None:
        self.lines.append(line)
        print(shown(line), flush=True)


def shown(line: Line) -> str:
    ratio = f"{line.ratio:.2f} x {line.beside}" if line.ratio is not None else ""
    if line.budget is not None and line.ratio is not None:
        ratio += f", budget {line.budget:g}" + ("" if line.ratio <= line.budget else ": MISSED")
    cost = f"{line.cost.wall_s:.2f} s | {line.cost.cpu_s:.2f} s | {line.cost.peak_mb:.0f} MB"
    return f"| {line.what} | {cost} | {' '.join(filter(None, [ratio, line.notes]))} |"


_PR_SET_CHILD_SUBREAPER = 36


def run(
    command: Sequence[str], folder: Path, *, limit_s: float = 900, orphans: bool = False, **environment: str
) -> Cost:
    """Run a command to its end; its output goes to a file that is shown when it fails.

    With `orphans` the CPU time of processes that outlive it counts too, once they have ended.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(orphans))
    log = folder / ".log"
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env={**ENVIRONMENT, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
        peak_mb = 0.0
        while True:
            peak_mb = max(peak_mb, _peak_mb(process.pid))
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                break
            if time.perf_counter() - started > limit_s:
                process.kill()
                process.wait()
                raise TimeoutError(f"{command} took more than {limit_s} s")
            time.sleep(0.002)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - started
    cpu_s = usage.ru_utime + usage.ru_stime
    with contextlib.suppress(ChildProcessError):
        while orphans:  # the fork server, whose children count for it, ends after doit
            _, _, usage = os.wait4(-1, 0)
            cpu_s += usage.ru_utime + usage.ru_stime
    if process.returncode:
        raise SystemExit(f"{command} in {folder} failed:\n{log.read_text()[-3000:]}")
    return Cost(wall_s, cpu_s, peak_mb)


def _peak_mb(pid: int) -> float:
    """Return the peak memory of a process so far; that of wait4 counts what its parent had when it was forked."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def rounds(works: dict[str, Callable[[], Cost]], count: int) -> dict[str, Cost]:
    """Run each work in turn, round after round; return the best of each."""
    best = {name: Cost() for name in works}
    for _ in range(count):
        for name, work in works.items():
            best[name] = best[name].best(work())
    return best


def fresh(name: str) -> Path:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ------------------------------------------------------------------------------------------------------------ peers


def peer(tool: str, count: int, programs: Path) -> tuple[Path, list[str]]:
    """Make a project of so many tasks, each of which copies one file; return its folder and the command."""
    folder = fresh(f"{tool}-{count}")
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    for number in range(count):
        (folder / "in" / str(number)).write_text(str(number))
    names = range(count)
    if tool == "make":
        rules = "".join(f"out/{n}: in/{n}\n\tcp in/{n} out/{n}\n" for n in names)
        (folder / "Makefile").write_text(f"all: {' '.join(f'out/{n}' for n in names)}\n{rules}")
        return folder, ["make", "-s"]
    if tool == "ninja":
        rules = "".join(f"build out/{n}: cp in/{n}\n" for n in names)
        (folder / "build.ninja").write_text(f"rule cp\n  command = cp $in $out\n{rules}")
        return folder, [str(programs / "ninja"), "--quiet", "-j2"]
    if tool == "doit":
        (folder / "dodo.py").write_text(
            textwrap.dedent(
                f"""
                import shutil

                def task_copy():
                    for n in range({count}):
                        source, target = f"in/{{n}}", f"out/{{n}}"
                        yield {{
                            "name": str(n),
                            "actions": [(shutil.copyfile, [source, target])],
                            "file_dep": [source],
                            "targets": [target],
                        }}
                """
            )
        )
        return folder, [str(programs / "python"), "-m", "doit"]
    if tool == "snakemake":
        (folder / "Snakefile").write_text(
            f"rule all:\n    input: expand('out/{{n}}', n=range({count}))\n"
            "rule copy:\n    input: 'in/{n}'\n    output: 'out/{n}'\n    shell: 'cp {input} {output}'\n"
        )
        return folder, [str(programs / "snakemake"), "-c2", "--quiet", "all"]
    stages = "".join(f"  s{n}:\n    cmd: cp in/{n} out/{n}\n    deps: [in/{n}]\n    outs: [out/{n}]\n" for n in names)
    (folder / "dvc.yaml").write_text(f"stages:\n{stages}")
    run([str(programs / "dvc"), "init", "--no-scm", "-q"], folder)
    return folder, [str(programs / "dvc"), "repro", "-q"]


def programs_of_peers() -> Path:
    """Return the folder with the peers' programs, installed when they are not yet."""
    if os.environ.get("BENCHMARK_PEERS"):
        return Path(os.environ["BENCHMARK_PEERS"])
    venv = FOLDER / "peers"
    if not (venv / "done").exists():
        print("installing the peers ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        requirements = ["-r", HERE / "requirements.txt"]
        subprocess.run([venv / "bin" / "pip", "install", "-q", *requirements], check=True)
        (venv / "done").touch()
    return venv / "bin"


# ------------------------------------------------------------------------------------------------------------- ours

NETS = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(width, 10),
        )

    def forward(self, image):
        return self.layers(image)
"""


def project(name: str, count: int, *, store: str = "", same: bool = True, edited: int | None = None) -> Path:
    """Make a project of so many models. With `same` they differ in their names alone, so that one is traced."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    models = []
    for number in range(count):
        seed = 0 if same else number
        width = 16 if number == edited else 8
        models.append(
            f"  m{number}:\n    entry_point: nets:Net\n    kwargs: {{width: {width}}}\n    seed: {seed}\n"
            "    max_batch_size: 8\n    inputs:\n      image: {dtype: float32, shape: [batch, 3, 16, 16]}\n"
            "    outputs: [scores]\n    trace: {cases: 4, budget_s: 2}\n"
            "    config: {dynamic_batching: {max_queue_delay_microseconds: 500}}\n"
        )
    store = f"store: {store}\n" if store else ""
    (folder / "pipeline.yaml").write_text(f'triton: "26.07"\ndevice: cpu\n{store}models:\n{"".join(models)}')
    (folder / "nets.py").write_text(NETS)
    (folder / "dodo.py").write_text("from tritonbuild.graph import *\n")
    return folder


# Puts a verdict on every version into the store, as a machine that had served them would have: for the cost of a run
# with nothing to do it does not matter who asked the server.
SMOKED = """
import pathlib, time
from tritonbuild import keys, serving, spec, state, store
from tritonbuild.results import describe, reads
memory = state.State(".build/state.sqlite")
declared = spec.load(pathlib.Path("pipeline.yaml"))
results = store.of(declared.root, None)
server = serving.ServerChoice(declared, "embedded", docker=False)
verdict = ('{"verdict": "passed", "server": {"kind": "embedded", "version": "", "url": ""}, "cases": 4, '
           '"max_abs_error": {"scores": 0.0}, "latency_ms": 1.0, "failures": []}')
out = declared.root / ".build" / "smoked"
for version in declared.all_versions():
    key = keys.action_key(serving.smoke_parts(declared.root, serving.smoke_files(declared, version), server))
    out.mkdir(exist_ok=True)
    (out / "smoke.json").write_text(verdict)
    results.keep(describe(key, key, out, ["smoke.json"], reads((), ()), 1.0), out)
    (out / "smoke.json").unlink()
memory.dump()
"""


def built(name: str, count: int) -> Path:
    """Return a project of so many models in which every task has been done, smoke tests included."""
    folder = project(name, count)
    run([*DOIT, *BUILD], folder)
    run([sys.executable, "-c", SMOKED], folder)
    run(DOIT, folder)
    time.sleep(2.5)  # younger files are digested again by the next run: their time stamps do not prove anything yet
    run(DOIT, folder)
    return folder


def nothing_to_do(report: Report, counts: Sequence[int], repeat: int) -> None:
    """A run with nothing to do, beside the peers, and their first runs."""
    programs = programs_of_peers()
    for count in counts:
        ours = built(f"ours-{count}", count)
        works: dict[str, Callable[[], Cost]] = {"tritonbuild": lambda ours=ours: run(DOIT, ours)}  # type: ignore[misc]
        first: dict[str, Cost] = {}
        peers = [("doit", count), ("doit", 3 * count), ("make", count), ("ninja", count), ("snakemake", count)]
        for tool, tasks in [*peers, *([("dvc", count)] if count <= 100 else [])]:
            label = f"{tool}, {tasks} tasks"
            folder, command = peer(tool, tasks, programs)
            first[label] = run(command, folder)
            works[label] = lambda folder=folder, command=command: run(command, folder)  # type: ignore[misc]
        best = rounds(works, repeat)
        mine = best.pop("tritonbuild")
        budgets = {f"doit, {count} tasks": 4.0, f"doit, {3 * count} tasks": 3.0, f"snakemake, {count} tasks": 0.5}
        report.add(Line(f"nothing to do, {count} model versions ({3 * count + 2} tasks)", mine))
        for label, cost in best.items():
            budget = budgets.get(label) if count == 1000 else None
            ratio = mine.wall_s / cost.wall_s
            report.add(Line(f"... {label}", cost, f"tritonbuild / {label.split(',')[0]}", ratio, budget))
        for label, cost in first.items():
            report.add(Line(f"first run, {label}", cost))


def touched(report: Report) -> None:
    """Every file has another time stamp, as after a fresh checkout: digested once, then no more."""
    folder = FOLDER / "ours-1000"
    before = run(DOIT, folder)
    for path in [*folder.glob("*.*"), *(folder / "models").rglob("*"), *(folder / ".build" / "cases").rglob("*")]:
        os.utime(path, (time.time() - 100, time.time() - 100))
    time.sleep(2.5)
    first = run(DOIT, folder)
    second = run(DOIT, folder).best(run(DOIT, folder))
    report.add(
        Line(
            "every file touched, 1000 model versions: the first run",
            first,
            "nothing to do",
            first.wall_s / before.wall_s,
        )
    )
    report.add(Line("... and the next", second, "nothing to do", second.wall_s / before.wall_s, 1.2))


def large(report: Report) -> None:
    """Ten times as many models: the cost must grow as their number does, and one change must cost one."""
    few = run(DOIT, FOLDER / "ours-1000")
    folder = built("ours-10000", 10_000)
    many = run(DOIT, folder).best(run(DOIT, folder))
    report.add(Line("nothing to do, 10000 model versions", many, "1000 of them", many.wall_s / few.wall_s, 12.0))
    project("ours-10000", 10_000, edited=4321)
    one = run([*DOIT, *BUILD], folder)
    report.add(Line("one of 10000 changed, without smoke", one, "nothing to do", one.wall_s / many.wall_s))


BARE = """
import os, torch, nets
os.makedirs("bare", exist_ok=True)
for seed in range({count}):
    torch.manual_seed(seed)
    model = nets.Net(8).eval()
    with torch.no_grad():
        torch.jit.trace(model, torch.zeros(2, 3, 16, 16), check_trace=False).save(f"bare/{{seed}}.pt")
"""


def cold(report: Report, count: int) -> None:
    """A cold build beside a loop that builds, traces and saves in one process, which proves nothing."""
    folder = project("cold", count, same=False)
    rest_s = []

    def ours() -> Cost:
        for name in (".build", "models"):
            shutil.rmtree(folder / name, ignore_errors=True)
        cost = run([*DOIT, *BUILD], folder, orphans=True, TRITONBUILD_STORE="off")
        proofs = [json.loads(path.read_text()) for path in (folder / ".build" / "proof").glob("*/*.json")]
        rest_s.append(cost.wall_s - sum(proof["seconds"] for proof in proofs))
        return cost

    best = rounds({"ours": ours, "bare": lambda: run([sys.executable, "-c", BARE.format(count=count)], folder)}, 3)
    bare = best["bare"].wall_s
    report.add(Line(f"build, trace and save {count} small models in a bare loop", best["bare"]))
    report.add(
        Line(
            "... the same by a cold doit, which proves them too", best["ours"], "bare loop", best["ours"].wall_s / bare
        )
    )
    ratio = best["ours"].cpu_s / best["bare"].cpu_s
    report.add(Line("... the CPU time of the two", Cost(0.0, best["ours"].cpu_s), "bare loop", ratio))
    rest = Cost(min(rest_s), 0.0)
    report.add(Line("... without the time of the proofs", rest, "bare loop", rest.wall_s / bare, 1.3))


RESNETS = """\
triton: "26.07"
device: cpu
store: {store}
models:
  resnet18:
    entry_point: torchvision.models:resnet18
    max_batch_size: 2
    inputs:
      image: {{dtype: float32, shape: [batch, 3, 64, 64]}}
    trace: {{cases: 4, budget_s: 5}}
    versions: {{{versions}}}
"""


def clone(report: Report, count: int) -> None:
    """A fresh clone with a warm store, beside a copy of what it holds."""
    shared = fresh("shared")
    versions = ", ".join(f"{number}: {{seed: {number}}}" for number in range(1, count + 1))
    text = RESNETS.format(store=shared, versions=versions)

    def make(name: str) -> Path:
        folder = fresh(name)
        (folder / "pipeline.yaml").write_text(text)
        (folder / "dodo.py").write_text("from tritonbuild.graph import *\n")
        return folder

    origin = make("origin")
    cold_run = run([*DOIT, *BUILD], origin)
    size_mb = sum(path.stat().st_size for path in (shared / "blobs").glob("*/*")) / 1e6
    works = {
        "clone": lambda: run([*DOIT, *BUILD], make("clone")),
        "cp": lambda: run(["cp", "-r", str(shared), "copy"], fresh("copies")),
    }
    best = rounds(works, 3)
    same = all(
        path.read_bytes() == (FOLDER / "clone" / path.relative_to(origin)).read_bytes()
        for path in (origin / "models").rglob("*.pt")
    )
    report.add(Line(f"build {count} x resnet18, cold", cold_run))
    report.add(
        Line(
            f"... in a fresh clone with a warm store in a folder ({size_mb:.0f} MB)",
            best["clone"],
            "cp -r of the store",
            best["clone"].wall_s / best["cp"].wall_s,
            notes="same bytes" if same else "OTHER BYTES",
        )
    )
    report.add(Line("... cp -r of the store", best["cp"]))


def one_of_fifty(report: Report, count: int = 50) -> None:
    """One of fifty models changed: what a person waits for, smoke test included."""
    folder = built("fifty", count)
    idle = rounds({"": lambda: run(DOIT, folder)}, 3)[""]
    project("fifty", count, edited=7)
    changed = run(DOIT, folder, TRITONBUILD_STORE="off")
    one = built("one", 1)
    project("one", 1, edited=0)
    alone = run(DOIT, one, TRITONBUILD_STORE="off")
    report.add(Line(f"nothing to do, {count} models", idle))
    more = changed.wall_s - alone.wall_s
    report.add(
        Line(f"one of {count} changed: trace, proof, config, smoke", changed, notes=f"{more:+.2f} s to one of one")
    )
    report.add(Line("... one of one changed", alone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 models and one round: shows that it works")
    parser.add_argument("--only", default="", help="parts, by comma: null, touched, large, cold, clone, fifty")
    parser.add_argument("--out", type=Path, default=FOLDER / "results.json", help="the JSON file [%(default)s]")
    chosen = parser.parse_args()
    quick = chosen.quick
    parts: dict[str, Callable[[Report], None]] = {
        "null": lambda report: nothing_to_do(report, [100] if quick else [100, 1000], 1 if quick else 7),
        "touched": touched,
        "large": large,
        "cold": lambda report: cold(report, 5 if quick else 40),
        "clone": lambda report: clone(report, 1 if quick else 8),
        "fifty": one_of_fifty,
    }
    names = (
        chosen.only.split(",")
        if chosen.only
        else [name for name in parts if not (quick and name in {"touched", "large"})]
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    report = Report()
    print("| what | wall | CPU | peak memory | |\n|---|---|---|---|---|", flush=True)
    for name in names:
        parts[name](report)
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    chosen.out.write_text(json.dumps({**about, "lines": [asdict(line) for line in report.lines]}, indent=2) + "\n")
    print(f"\n{chosen.out}: {about}")


if __name__ == "__main__":
    main()
