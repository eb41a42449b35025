"""Decides whether torchvision's models build, pass the proof and are served: the sweep behind docs/torchvision.md.

    python benchmarks/torchvision_sweep.py --out sweep.json --page docs/torchvision.md
    python benchmarks/torchvision_sweep.py 'resnet*' 'swin_t' --out sweep.json

declares every classification, segmentation, quantizable-float and video model under 30 million parameters, and every
detection model, with random weights and the batch, height and width as axes; runs `doit` on them in slices, each a
project of its own in a temporary folder; and reads the results that the build itself wrote. `--out` holds the
rows so far: a sweep that was stopped goes on where it was, and models that are named again are run again.

Source: torchvision.models.list_models; the smallest sizes are those that the models' own pooling leaves something of.
"""

from __future__ import annotations

import argparse
import fnmatch
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch.utils._pytree import tree_flatten
from torchvision import models

DODO = "from tritonbuild.graph import *\n"
MOST_PARAMETERS = 30_000_000
DETECTION = "torchvision.models.detection"
OUTSIDE = ("torchvision.models.optical_flow",)
"""Kinds that the sweep is not about."""

SMALLEST = {"inception_v3": 75, "quantized_inception_v3": 75, "s3d": 224}
"""Lowest height and width, where it is not 32."""

FRAMES = {"s3d": 16}
"""Frames of a video, where they are not 8."""

DETECTION_KWARGS: dict[str, dict[str, Any]] = {
    # Random weights give each of 91 classes about the same score; the default threshold would leave no boxes. Few boxes
    # are kept, as each costs a mask or 17 keypoints.
    "fasterrcnn": {"min_size": 64, "max_size": 96, "box_score_thresh": 0.005, "box_detections_per_img": 8},
    "maskrcnn": {"min_size": 64, "max_size": 96, "box_score_thresh": 0.005, "box_detections_per_img": 8},
    "keypointrcnn": {"min_size": 64, "max_size": 96, "box_score_thresh": 0.005, "box_detections_per_img": 8},
    "retinanet": {"min_size": 64, "max_size": 96, "score_thresh": 0.005, "topk_candidates": 200},
    "fcos": {"min_size": 64, "max_size": 96, "score_thresh": 0.005, "topk_candidates": 200},
    # Up to 10 boxes of each of 90 classes, or 200 of each of 5 levels: above 1000, eager suppresses boxes otherwise.
    "ssd300": {"score_thresh": 0.005, "topk_candidates": 10},
    "ssdlite320": {"score_thresh": 0.005, "topk_candidates": 10},
}


@dataclass(frozen=True)
class Subject:
    """A model of torchvision, as the sweep declares it.

    Attributes:
        name: torchvision's name, such as `quantized_resnet18`.
        module: The module that defines it.
        parameters: How many it has.
    """

    name: str
    module: str
    parameters: int

    @property
    def kind(self) -> str:
        """classification, segmentation, quantizable, video or detection."""
        kinds = ("detection", "segmentation", "quantization", "video", "optical_flow")
        found = next((kind for kind in kinds if f".{kind}" in self.module), "classification")
        return "quantizable" if found == "quantization" else found

    @property
    def is_wanted(self) -> bool:
        """Whether the sweep runs it."""
        if self.module.startswith(OUTSIDE):
            return False
        return self.kind == "detection" or self.parameters < MOST_PARAMETERS

    @property
    def batch(self) -> int:
        """max_batch_size: detectors take a list of images, each of its own size, and so no batch."""
        return 0 if self.kind == "detection" else 2

    @property
    def frames(self) -> int:
        """How many a video has; 0 for images."""
        return FRAMES.get(self.name, 8) if self.kind == "video" else 0

    @property
    def axes(self) -> dict[str, dict[str, int]]:
        """The declared axes."""
        lowest = SMALLEST.get(self.name, 32)
        side = {"example": lowest + 16, "min": lowest, "max": lowest + 32}
        if self.kind == "detection":
            # Their resize rounds in float64 when eager and in float32 in TorchScript: at sides of 41, 47, 49, 55 and
            # 61, scaled to 64, one gets an image of 64 and the other one of 63 pixels.
            side["multiple_of"] = 16
        return {"height": side, "width": side}

    @property
    def size(self) -> str:
        """The sizes in words: `32 to 64`, or with frames before it."""
        side = self.axes["height"]
        steps = f" by {side['multiple_of']}" if "multiple_of" in side else ""
        return f"{f'{self.frames} x ' if self.frames else ''}{side['min']} to {side['max']}{steps}"

    def declaration(self) -> dict[str, Any]:
        """Return what stands under its name in pipeline.yaml."""
        builder = models.get_model_builder(self.name)
        takes = inspect.signature(builder).parameters
        kwargs: dict[str, Any] = {"weights": None}
        if "weights_backbone" in takes:
            kwargs["weights_backbone"] = None
        if self.kind == "quantizable":
            kwargs["quantize"] = False
        if "init_weights" in inspect.signature(_class_of(builder)).parameters:
            kwargs["init_weights"] = False
        for prefix, more in DETECTION_KWARGS.items():
            if self.name.startswith(prefix):
                kwargs |= more
        shape: list[Any] = [3, "height", "width"]
        if self.frames:
            shape.insert(1, self.frames)
        if self.batch:
            shape.insert(0, "batch")
        detects = self.kind == "detection"
        if detects:
            kwargs["name"] = self.name
        return {
            "entry_point": "torchvision_sweep:detector" if detects else f"{self.module}:{builder.__name__}",
            "kwargs": kwargs,
            "max_batch_size": self.batch,
            "axes": self.axes,
            "inputs": {"image": {"dtype": "float32", "shape": shape, "range": [0, 1] if not self.batch else [-2, 2]}},
            # Detectors ask whether they are traced, and are proved on 64 cases for that.
            "trace": {"cases": 6, "budget_s": 300 if detects else 5},
        }


def detector(name: str, **kwargs: Any) -> torch.nn.Module:
    """Return a detector that sees its input, random weights or not: the entry point that the sweep declares.

    Untrained batch norms let a deep backbone's features fade until every box scores the same; then rounding decides
    in which order the boxes come. Here their statistics are those of noise. The scores of classes are brought to about
    the same size, or the background would win everywhere.
    """
    model = models.get_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.backbone.train()(torch.rand(2, 3, 320, 320))
    model.eval()
    assert isinstance(model, torch.nn.Module)
    if hasattr(model, "roi_heads"):
        scores: list[torch.Tensor] = []
        predictor = model.roi_heads.box_predictor.cls_score
        watch = predictor.register_forward_hook(lambda *called: scores.append(called[2]))
        with torch.no_grad():
            model([torch.rand(3, 64, 64)])
            watch.remove()
            predictor.weight /= scores[0].std()
            predictor.bias.zero_()
    return model


def _class_of(builder: Any) -> Any:
    """Return googlenet's and inception's class, whose weights take a flag, or the builder itself."""
    return {"googlenet": models.GoogLeNet, "inception_v3": models.Inception3}.get(builder.__name__, builder)


def subjects(patterns: list[str]) -> list[Subject]:
    """Return the models that match a pattern (all for none) and are wanted, smallest first."""
    found = []
    for name in models.list_models():
        if patterns and not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        subject = Subject(name, models.get_model_builder(name).__module__, _parameters(name))
        if subject.is_wanted:
            found.append(subject)
    return sorted(found, key=lambda subject: (subject.kind == "detection", subject.parameters))


def _parameters(name: str) -> int:
    """Return the number of parameters, counted without memory; regnet computes with tensors, so its own word counts."""
    if name.startswith("regnet"):
        return int(models.get_model_weights(name).DEFAULT.meta["num_params"])
    takes = inspect.signature(models.get_model_builder(name)).parameters
    kwargs: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in takes else {}
    if name.endswith(("googlenet", "inception_v3")):
        kwargs["init_weights"] = False
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **kwargs)
    return sum(parameter.numel() for parameter in model.parameters())


def sweep(chosen: list[Subject], folder: Path, processes: int = 1) -> list[dict[str, Any]]:
    """Build, prove and serve the models in a project of their own.

    Args:
        chosen: What to run.
        folder: An empty folder; the project is written there.
        processes: For `doit -n`.

    Returns:
        One row of the table per model, in order.
    """
    declared = {"triton": "26.07", "device": "cpu", "models": {each.name: each.declaration() for each in chosen}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(declared, sort_keys=False))
    (folder / "dodo.py").write_text(DODO)
    shutil.copy(__file__, folder / "torchvision_sweep.py")
    command = [sys.executable, "-m", "doit", "-n", str(processes)]
    ran = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    sys.stdout.write(ran.stdout)
    rows = [row(each, folder, ran.stdout) for each in chosen]
    return [
        {**found, **compare(each, folder / f"models/{each.name}/1/model.pt")} if found["smoke"] == "passed" else found
        for each, found in zip(chosen, rows, strict=True)
    ]


def compare(subject: Subject, path: Path, draws: int = 8) -> dict[str, Any]:
    """Compare the TorchScript with eager at random sizes, without any code of tritonbuild: a proof of the proof.

    Args:
        subject: Which model.
        path: Its model.pt.
        draws: How many sizes and inputs.

    Returns:
        `apart`, the largest difference (infinity where shapes differ or one raises), where (`apart_at`), and `moved`,
        how far the eager output moves with the input: where it does not, a pass means little.
    """
    declared = subject.declaration()
    torch.manual_seed(0)
    build = detector if subject.kind == "detection" else models.get_model_builder(subject.name)
    eager = build(**declared["kwargs"]).eval()
    script = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    sizes = torch.Generator().manual_seed(1)
    apart, where, moved = 0.0, "", 0.0
    before: list[torch.Tensor] = []
    for number in range(draws):
        side = {
            name: int(torch.randint(axis["min"] // step, axis["max"] // step + 1, (1,), generator=sizes)) * step
            for name, axis in subject.axes.items()
            for step in [axis.get("multiple_of", 1)]
        }
        side["batch"] = 1 + number % 2
        shape = [side.get(size, size) for size in declared["inputs"]["image"]["shape"]]
        image = torch.rand(shape, generator=sizes)
        if number % 4 == 3:  # smooth, as photographs are
            coarse = torch.rand((1, math.prod(shape[:-2]), 3, 3), generator=sizes)
            image = torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear").reshape(shape)
        low, high = declared["inputs"]["image"]["range"]
        image = (low + (high - low) * image) / (1 + number % 3)
        with torch.no_grad():
            expected = tree_flatten(eager(image if subject.batch else [image]))[0]
            try:
                found = tree_flatten(script(image))[0]
            except RuntimeError as error:
                return {"apart": math.inf, "apart_at": f"{side}: {error}"[:500], "moved": moved}
        expected = [each for each in expected if each is not None]
        same = [each.shape for each in expected] == [each.shape for each in found]
        far = max((_far(*pair) for pair in zip(expected, found, strict=True)), default=0.0) if same else math.inf
        if far > apart:
            apart, where = far, str(side)
        first = [each[:1].flatten() for each in expected]  # of one item; as much of it as both sizes have
        moved = max([moved, *(_far(*_cut(*pair)) for pair in zip(first, before, strict=False))])
        before = first
    return {"apart": apart, "apart_at": where, "moved": moved}


def _cut(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length = min(len(one), len(other))
    return one[:length], other[:length]


def _far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def row(subject: Subject, folder: Path, said: str = "") -> dict[str, Any]:
    """Return what the build wrote about a model: a row of the table, with the reason where there is one."""
    proof = _read(folder / f".build/proof/{subject.name}/1.json")
    smoke = _read(folder / f".build/smoke/{subject.name}/1.json")
    passed = proof.get("verdict") == "passed"
    errors = [float(error or 0) for error in [*proof.get("max_abs_error", {}).values()]]
    served = smoke.get("verdict", "not run")
    reason = "" if passed else proof.get("error") or "; ".join(_words(hazard) for hazard in proof.get("hazards", []))
    if passed and served != "passed":
        reason = "; ".join(str(failure) for failure in smoke.get("failures", []))
    if not reason and not (passed and served == "passed"):
        about = re.escape(subject.name)
        found = re.search(rf"^!! (.*\b{about}\b.*(?:\n    .*)*)", said, re.MULTILINE)
        reason = found[1] if found else "no result"
    return {
        "model": subject.name,
        "kind": subject.kind,
        "parameters": subject.parameters,
        "size": subject.size,
        "axes": [*(["batch"] if subject.batch else []), *subject.axes],
        "verdict": proof.get("verdict", "no proof"),
        "candidate": proof.get("candidate", ""),
        "tried": proof.get("tried", []),
        "notes": proof.get("notes", []),
        "cases": proof.get("cases", 0),
        "max_abs_error": max(errors, default=math.nan) if passed else None,
        "seconds": proof.get("seconds"),
        "smoke": served,
        "smoke_max_abs_error": max((float(e or 0) for e in smoke.get("max_abs_error", {}).values()), default=None),
        "reason": re.sub(r"/\S*/site-packages/", "", " ".join(str(reason).split())),
    }


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _words(hazard: dict[str, Any]) -> str:
    return ": ".join(str(hazard[key]) for key in ("hazard", "case", "where", "detail") if hazard.get(key))


BY_HAND = "<!-- written by hand from here -->\n"
"""What follows this line in the page stays."""

INTRODUCTION = """\
# torchvision, swept

Do torchvision's models build, pass the proof and get served? Measured {date} with torch {torch}, torchvision
{torchvision}, on a CPU with 2 cores, by

```
python benchmarks/torchvision_sweep.py --out sweep.json --page docs/torchvision.md
```

Every classification, segmentation, quantizable (in float) and video model under 30 million parameters, and every
detection model, with random weights, at its smallest sensible size; the batch (1 to 2) and height and width are axes.
Detectors take one image of any size, with `max_batch_size: 0`. `trace: {{cases: 6, budget_s: 5}}` keeps the sweep
cheap: fewer cases than the default proof runs, though at both ends of each axis; detectors, which ask whether they are
traced, are proved on 64 cases at least. *largest error* is the proof's, against eager, absolute; *proof* is its
time, on a machine that did other things, too. *served* is the answer of the embedded tritonserver to the smoke test.
*checked* is a second look without tritonbuild: model.pt against eager at 8 random sizes, and in brackets how far the
eager output moves from input to input: with random weights, some nets hardly look at their input.

{passed} pass and are served, {failed} do not, {missing} were not run.
"""


def page(rows: list[dict[str, Any]], missing: list[Subject], date: str) -> str:
    """Return the text of docs/torchvision.md.

    Args:
        rows: What was run.
        missing: What was not.
        date: Of the measurement, such as 2026-11-23.
    """

    rows = [{**each, "reason": each["reason"] or _wrong_though_passed(each)} for each in rows]
    good = [each for each in rows if not each["reason"]]
    bad = [each for each in rows if each["reason"]]
    versions = {"torch": torch.__version__.split("+")[0], "torchvision": torchvision.__version__.split("+")[0]}
    counts = {"passed": len(good), "failed": len(bad), "missing": len(missing)}
    parts = [INTRODUCTION.format(date=date, **versions, **counts)]
    if good:
        parts += ["## Pass and are served\n", _table(good)]
    if bad:
        parts += ["## Stop, and why\n"]
        parts += [
            f"* **{each['model']}** ({each['axes_text']}): {_escaped(each['reason'])}" for each in map(_named, bad)
        ]
        parts += [""]
    if missing:
        parts += ["## Not run\n", ", ".join(f"`{each.name}`" for each in missing) + "\n"]
    return "\n".join(parts)


def _wrong_though_passed(each: dict[str, Any]) -> str:
    """Return what the second look found against a pass."""
    if each.get("apart", 0.0) <= 1e-4 * max(each.get("moved", 0.0), 1.0):
        return ""
    return f"passed, but the second look finds model.pt {each['apart']:.1e} from eager at {each['apart_at']}"


def _named(each: dict[str, Any]) -> dict[str, Any]:
    return {**each, "axes_text": f"{each['parameters'] / 1e6:.1f} M, {', '.join(each['axes'])}, {each['size']}"}


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | parameters | sizes | axes | passed as | cases | largest error | proof | served | checked |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each['model']} | {each['parameters'] / 1e6:.1f} M | {each['size']} | {', '.join(each['axes'])} | "
        f"{each['candidate']} | {each['cases']} | {each['max_abs_error']:.1e} | {each['seconds']:.0f} s | "
        f"{each['smoke']} | {each['apart']:.1e} ({each['moved']:.0e}) |"
        for each in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the sweep; write its rows, and the page, after each slice."""
    parser = argparse.ArgumentParser(description="Build, prove and serve torchvision's models.")
    parser.add_argument("names", nargs="*", help="names or patterns, such as resnet18 'swin*'; none: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON with the rows; rows in it are kept")
    parser.add_argument("--page", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--limit", type=int, help="run at most so many models")
    parser.add_argument("--slice", type=int, default=6, help="models per run of doit (6)")
    parser.add_argument("--processes", type=int, default=1, help="processes of doit (1)")
    parser.add_argument("--date", default="2026-11-23", help="date of the measurement, for the page")
    options = parser.parse_args()

    kept: dict[str, dict[str, Any]] = {}
    if options.out.exists():
        kept = {each["model"]: each for each in json.loads(options.out.read_text())}
    chosen = [each for each in subjects(options.names) if options.names or each.name not in kept][: options.limit]
    everything = subjects([])
    slices = [chosen[first : first + options.slice] for first in range(0, len(chosen), options.slice)]
    for some in [*slices, []]:
        if some:
            with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
                kept |= {each["model"]: each for each in sweep(some, Path(folder), options.processes)}
        rows = [kept[each.name] for each in everything if each.name in kept]
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        if options.page:
            missing = [each for each in everything if each.name not in kept]
            by_hand = options.page.read_text().partition(BY_HAND)[2] if options.page.exists() else ""
            options.page.write_text(page(rows, missing, options.date) + (f"\n{BY_HAND}{by_hand}" if by_hand else ""))


if __name__ == "__main__":
    main()
