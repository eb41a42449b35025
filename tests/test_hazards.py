"""The list of hazards, its page, and the proof agree; every example of the page does what the page says."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritonbuild import archive, hazards, proof
from tritonbuild.candidates import candidates
from tritonbuild.entry import Builder
from tritonbuild.hazards import HAZARDS
from tritonbuild.spec import Axis, Input, ModelVersion, Trace

if TYPE_CHECKING:
    from tritonbuild.proof import Verdict

PAGE = (Path(__file__).parent.parent / "docs" / "hazards.md").read_text()


class Example(NamedTuple):
    """One block of code of the page: the hazard that it shows, or "" for its mended form."""

    hazard: str
    section: str
    declaration: str
    code: str


def sections() -> dict[str, str]:
    parts = re.split(r"^## (\S+)\n", PAGE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True)) if len(parts) > 1 else {}


SECTIONS = {name: text for name, text in sections().items() if name in HAZARDS}


def examples() -> list[Example]:
    found = []
    for name, text in SECTIONS.items():
        for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.S)):
            first, _, code = block.partition("\n")
            found.append(Example("" if i else name, name, first.removeprefix("# "), code))
    return found


def test_the_page_has_one_section_per_hazard_in_the_order_of_the_list() -> None:
    assert list(SECTIONS) == list(HAZARDS)


@pytest.mark.parametrize("name", HAZARDS)
def test_a_section_says_what_the_list_says(name: str) -> None:
    first = " ".join(SECTIONS[name].strip().split("\n\n")[0].split())
    meaning, way_out = HAZARDS[name]
    assert first == f"{meaning[0].upper()}{meaning[1:]}."
    assert f"\n**Way out:** {way_out}.\n" in SECTIONS[name]
    blocks = [example for example in examples() if example.section == name]
    assert len(blocks) == (1 if name == "crash" else 2)
    assert len(blocks[0].code.splitlines()) <= 5


@pytest.mark.parametrize("name", HAZARDS)
def test_texts_of_the_list_are_one_line_in_the_form_of_messages(name: str) -> None:
    for text in HAZARDS[name]:
        assert "\n" not in text
        assert not text.endswith(".")
        assert text[0].islower() or text.startswith(("Python", "TorchScript", "NaN"))
        assert len(text) <= 140


@pytest.fixture(scope="module", autouse=True)
def _custom_operator() -> None:
    @torch.library.custom_op("example::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize(
    "example", examples(), ids=lambda example: f"{example.section}{'' if example.hazard else '-mended'}"
)
def test_an_example_shows_its_hazard_and_its_mended_form_none(example: Example, tmp_path: Path) -> None:
    if "not run here" in example.declaration:
        pytest.skip(example.declaration.rpartition(": ")[2])
    verdict = proved(example, tmp_path)
    if not example.hazard:
        assert list(map(str, verdict.hazards)) == []
        return
    found = {hazard.hazard: hazard for hazard in verdict.hazards}
    assert example.hazard in found, list(map(str, verdict.hazards))
    hazard = found[example.hazard]
    if hazard.where:
        file, _, line = hazard.where.rpartition(":")
        assert Path(file).name == f"{example.section.replace('-', '_')}.py"
        assert Path(file).read_text().splitlines()[int(line) - 1].strip() in example.code


def proved(example: Example, root: Path) -> Verdict:
    """Write the example as a module, trace it as its first line declares, and return the verdict."""
    name = example.section.replace("-", "_") + ("" if example.hazard else "_mended")
    head = "import numpy as np\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"
    head += "class Model(nn.Module):\n    scale: float\n\n    def __init__(self):\n        super().__init__()\n"
    head += "        self.linear, self.scale = nn.Linear(8, 8), 1.0\n\n"
    (root / f"{name}.py").write_text(head + textwrap.indent(example.code, "    "))
    version = declared(f"{name}:Model", example.declaration)
    build = Builder(version, root, torch.device("cpu"))
    inputs = proof.example(version, "cpu", root)
    with torch.no_grad():
        build()(*[tensor.clone() for tensor in inputs])
    description, make = next(iter(candidates(version, build, inputs)))
    made = archive.canonical(make())
    reference = proof.Reference(version, build, "cpu", root)

    def load() -> Any:
        return torch.jit.load(io.BytesIO(made))

    traced = description != "script"
    return proof.prove(version, build, load, "cpu", make.warnings, reference, traced=traced)


def declared(entry_point: str, text: str) -> ModelVersion:
    """Return the declaration that stands in the first line of an example."""
    inputs = {
        name: Input(dtype=dtype, shape=tuple(int(s) if s.isdigit() else s for s in shape.split(", ")))
        for name, dtype, shape in re.findall(r"(\w+): (\w+) \[([^]]*)\]", text)
    }
    axes = {}
    for name, low, high, multiple in re.findall(r"(\w+): (\d+)\.\.(\d+)(?: multiple_of (\d+))?", text):
        step = int(multiple or 1)
        axes[name] = Axis(example=8, min=int(low), max=int(high), multiple_of=step)
    batched = any("batch" in declared.shape for declared in inputs.values())
    release = re.search(r"triton: (\S+)", text)
    return ModelVersion.model_construct(
        model="example",
        version=1,
        entry_point=entry_point,
        kwargs={},
        seed=0,
        weights=None,
        device="cpu",
        triton=release[1] if release else "26.08",
        max_batch_size=8 if batched else 0,
        axes=axes,
        inputs=inputs,
        outputs=(),
        trace=Trace(method="script" if "method: script" in text else "trace"),
    )


def test_a_hazard_is_told_on_one_line_and_recorded_with_its_way_out() -> None:
    found = hazards.found("state", "calls changes", case="batch=2 draw=plain seed=0", where="src/zoo/text.py:12")
    assert str(found) == "state: case batch=2 draw=plain seed=0: src/zoo/text.py:12: calls changes"
    assert str(hazards.found("crash", "it died")) == "crash: it died"
    assert found.record() == {
        "hazard": "state",
        "case": "batch=2 draw=plain seed=0",
        "where": "src/zoo/text.py:12",
        "detail": "calls changes",
        "way_out": HAZARDS["state"].way_out,
    }
    assert [nn, F, np]  # what the examples use
