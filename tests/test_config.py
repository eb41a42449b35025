"""config.pbtxt as whole files, what is refused and how it is said, and that the real Triton takes what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonbuild import config, dtypes, message, repository, server, spec
from tritonbuild.errors import ConfigError, ServerError, SpecError

CONFIGS = Path(__file__).parent / "configs"
MODELS = [path.stem for path in sorted(CONFIGS.glob("*.pbtxt"))]


def signature(short: dict[str, Any]) -> dict[str, Any]:
    """Return a signature from its short form, where a tensor is [name, dtype, dims]."""
    tensors = {
        kind: [dict(zip(("name", "dtype", "dims"), tensor, strict=True)) for tensor in short[kind]]
        for kind in ("inputs", "outputs")
    }
    return {**tensors, "forward": short["forward"]}


def declared_signatures(pipeline: spec.Pipeline, name: str) -> dict[int, dict[str, Any]]:
    measured = signature(json.loads((CONFIGS / "signatures.json").read_text())[name])
    return dict.fromkeys(pipeline.models[name].versions, measured)


# Whole files


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_file(name: str) -> None:
    pipeline = spec.load(CONFIGS / "pipeline.yaml")
    assert config.check(pipeline) == []
    text = config.render(pipeline, name, declared_signatures(pipeline, name))
    assert text == (CONFIGS / f"{name}.pbtxt").read_text()


def test_every_declared_model_has_its_file() -> None:
    assert sorted(spec.load(CONFIGS / "pipeline.yaml").models) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_tritons_own_message_reads_it(name: str) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    message = text_format.Parse((CONFIGS / f"{name}.pbtxt").read_text(), model_config_pb2.ModelConfig())
    declared = spec.load(CONFIGS / "pipeline.yaml").models[name]
    assert (message.name, message.backend, message.platform) == (name, "pytorch", "pytorch_libtorch")
    assert message.max_batch_size == declared.max_batch_size
    assert message.version_policy.WhichOneof("policy_choice") is not None
    assert all(tensor.dims for tensor in [*message.input, *message.output])


def test_files_that_a_config_names_are_in_the_models_folder() -> None:
    pipeline = spec.load(CONFIGS / "pipeline.yaml")
    assert {name: config.files(pipeline, name) for name in MODELS if config.files(pipeline, name)} == {
        "resnet18": {"animals.txt": CONFIGS / "data/animals.txt"},
        "sequence": {"initial_state/zeros.bin": CONFIGS / "data/zeros.bin"},
        "text_encoder": {"warmup/ids.bin": CONFIGS / "data/ids.bin"},
    }


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_keys_does_not_matter(name: str) -> None:
    pipeline = spec.load(CONFIGS / "pipeline.yaml")
    model = pipeline.models[name]
    turned = model.model_copy(update={"config": reversed_keys(model.config), "versions": reversed_keys(model.versions)})
    other = pipeline.model_copy(update={"models": {name: turned}})
    text = config.render(other, name, declared_signatures(pipeline, name))
    assert text == (CONFIGS / f"{name}.pbtxt").read_text()


# What is refused before anything is traced

NET = """\
triton: "26.07"
models:
  net:
    entry_point: net:Net
    max_batch_size: 8
    axes:
      size: {example: 64, min: 32, max: 128, multiple_of: 32}
    inputs:
      image: {dtype: float32, shape: [batch, 3, size, size]}
      ids: {dtype: int64, shape: [batch, 4], range: [1, 9]}
    outputs: [boxes, scores]
    versions: {1: {}, 2: {}}
    config:
"""

SEQUENCE = """\
triton: "26.07"
models:
  net:
    entry_point: net:Net
    max_batch_size: 4
    inputs:
      INPUT__0: {dtype: int32, shape: [batch, 1], range: [0, 9]}
      STATE__1: {dtype: int32, shape: [batch, 2], range: [0, 9]}
      START__2: {dtype: int32, shape: [batch, 1], range: [0, 1]}
      CORRID__3: {dtype: int64, shape: [batch, 1], range: [0, 9]}
    config:
"""


def refused(name: str) -> list[Any]:
    """Return the blocks of a file: a title, the text of `config:` on one line, its problems indented."""
    blocks = [block.splitlines() for block in (CONFIGS / name).read_text().split("\n\n")]
    return [
        pytest.param(text, [problem.strip() for problem in problems], id=title.removeprefix("# "))
        for title, text, *problems in blocks
    ]


def load(folder: Path, text: str, base: str = NET) -> spec.Pipeline:
    path = folder / "pipeline.yaml"
    path.write_text(base + textwrap.indent(textwrap.dedent(text), " " * 6) + "\n")
    return spec.load(path)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folder with a few files that a config may name."""
    (tmp_path / "ten.bin").write_bytes(bytes(10))
    (tmp_path / "ids.bin").write_bytes(bytes(32))
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("labels.txt", "other/labels.txt", "other/.labels", "config.pbtxt", "warmup"):
        (tmp_path / name).write_text("cat\ndog\n")
    (tmp_path / "link.txt").symlink_to("/etc/hostname")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    return tmp_path


@pytest.mark.parametrize(("text", "problems"), refused("refused.txt"))
def test_what_is_refused_and_how_it_is_said(project: Path, text: str, problems: list[str]) -> None:
    pipeline = load(project, text)
    assert config.check(pipeline) == [f"pipeline.yaml:14: models.net.config.{what}" for what in problems]
    with pytest.raises(ConfigError):
        config.render(pipeline, "net", {})


@pytest.mark.parametrize(("text", "problems"), refused("refused_sequence.txt"))
def test_what_is_refused_of_sequences(project: Path, text: str, problems: list[str]) -> None:
    pipeline = load(project, text, SEQUENCE)
    assert config.check(pipeline) == [f"pipeline.yaml:12: models.net.config.{what}" for what in problems]


def test_each_problem_has_its_line_and_all_models_are_checked(project: Path) -> None:
    text = """\
        instance_group:
          - count: 1
          - kind: KIND_CPU
            gpus:
              - 0
        dynamic_batching:
          max_queue_delay_microseconds: 500
          preferred_batch_size:
            - 4
            - 16
        model_warmup:
          - name: w
            batch_size: 1
            inputs:
              image:
                zero_data: true
              ids:
                input_data_file: ids.bin
                dims:
                  - 5
        parameters:
          inference_mode: "true"
        """
    second = "  other:\n    entry_point: net:Net\n    inputs: {x: {dtype: float32, shape: [4]}}\n"
    second += "    config:\n      platform: x\n"
    path = project / "pipeline.yaml"
    path.write_text(NET + textwrap.indent(textwrap.dedent(text), " " * 6) + second)
    assert config.check(spec.load(path)) == [
        (
            "pipeline.yaml:17: models.net.config.instance_group[1].gpus: "
            "found [0], but KIND_CPU takes no GPUs; leave gpus out, or write kind: KIND_GPU"
        ),
        (
            "pipeline.yaml:23: models.net.config.dynamic_batching.preferred_batch_size[1]: "
            "found 16, expected at most max_batch_size, 8"
        ),
        "pipeline.yaml:33: models.net.config.model_warmup[0].inputs.ids.dims[0]: found 5, expected 4, as declared",
        (
            "pipeline.yaml:35: models.net.config.parameters.inference_mode: "
            'is ignored by the PyTorch backend; did you mean "INFERENCE_MODE"?'
        ),
        (
            "pipeline.yaml:40: models.other.config.platform: "
            'always "pytorch_libtorch", for what is built is TorchScript; leave it out'
        ),
    ]


PLAIN = """\
triton: "26.07"
models:
  net:
    entry_point: net:Net
    inputs:
      x: {dtype: bool, shape: [4]}
    config:
"""

WITHOUT_BATCH = {
    "dynamic_batching: {}": "dynamic_batching: "
    "has nothing to batch, for max_batch_size is 0; set it, and write batch first in every shape",
    "model_warmup: [{batch_size: 2, inputs: {x: {zero_data: true}}}]": "model_warmup[0].batch_size: "
    "found 2, expected at most 1, for max_batch_size is 0",
    "model_warmup: [{batch_size: 1, inputs: {x: {random_data: true}}}]": "model_warmup[0].inputs.x.random_data: "
    "found random bytes, which for bool are values outside of every range; use zero_data or input_data_file",
    "output: [{name: logits}]": "output[0].name: "
    'found "logits", which is not declared under outputs; declared are none, so they are OUTPUT__0, ...',
    "output: [{label_filename: labels.txt}]": "output[0]: "
    "found no name, expected that of one of the outputs: OUTPUT__0, ...",
    "sequence_batching: {}": "sequence_batching: "
    'found inputs called "x": with sequence_batching the PyTorch backend loads only models whose tensors are all '
    "called <name>__<index>, such as x__0",
}


@pytest.mark.parametrize("text", WITHOUT_BATCH)
def test_what_is_refused_without_a_batch(project: Path, text: str) -> None:
    pipeline = load(project, text, PLAIN)
    assert config.check(pipeline) == [f"pipeline.yaml:8: models.net.config.{WITHOUT_BATCH[text]}"]


def test_one_server_has_one_number_of_threads(project: Path) -> None:
    one, two = (f'config: {{parameters: {{INTER_OP_THREAD_COUNT: "{count}"}}}}' for count in (1, 2))
    models = "".join(
        f"  {name}: {{entry_point: 'n:N', inputs: {{x: {{dtype: float32, shape: [4]}}}}, {extra}}}\n"
        for name, extra in (("a", "seed: 1"), ("b", one), ("c", two), ("d", one))
    )
    path = project / "pipeline.yaml"
    path.write_text('triton: "26.07"\nmodels:\n' + models)
    why = "a server has one setting, and the model that loads first wins: write the same for both"
    assert config.check(spec.load(path)) == [
        f'pipeline.yaml:5: models.c.config.parameters.INTER_OP_THREAD_COUNT: found "2", but b has "1"; {why}',
        f'pipeline.yaml:6: models.d.config.parameters.INTER_OP_THREAD_COUNT: found "1", but c has "2"; {why}',
    ]


def test_a_release_that_does_not_know_a_field(project: Path) -> None:
    base = PLAIN.replace("26.07", "24.10")
    text = "model_metrics: {metric_control: [{metric_identifier: {family: f}, histogram_options: {buckets: [1]}}]}"
    assert config.check(load(project, text)) == []
    assert config.check(load(project, text, base)) == [
        (
            "pipeline.yaml:8: models.net.config.model_metrics: "
            "Triton 24.10 does not know it; take a newer one, or leave it out"
        )
    ]


@pytest.mark.parametrize("value", ["true", "FALSE", "on", "Off", "1", "0"])
def test_every_way_to_write_a_switch_that_the_backend_reads_is_taken(project: Path, value: str) -> None:
    assert config.check(load(project, f'parameters: {{INFERENCE_MODE: "{value}", MINE: anything}}')) == []


# The device


def test_with_device_cpu_every_instance_is_pinned_to_the_cpu(project: Path) -> None:
    base = "device: cpu\n" + PLAIN
    for text, groups in {
        "{}": "instance_group {\n  kind: KIND_CPU\n}\n",
        "instance_group: [{count: 2}, {kind: KIND_AUTO, name: b}, {kind: KIND_MODEL}]": (
            "instance_group {\n  kind: KIND_CPU\n  count: 2\n}\n"
            'instance_group {\n  name: "b"\n  kind: KIND_CPU\n}\n'
            "instance_group {\n  kind: KIND_MODEL\n}\n"
        ),
    }.items():
        pipeline = load(project, text, base)
        assert config.check(pipeline) == []
        assert config.render(pipeline, "net", {1: X}).endswith("}\n" + groups)


def test_with_device_cpu_a_gpu_is_refused(project: Path) -> None:
    base = "device: cpu\n" + PLAIN
    why = "but device: cpu says that models are proved and served on the CPU; set device: cuda, or leave this out"
    for group, found in {"{kind: KIND_GPU}": "KIND_GPU", "{gpus: [0, 1]}": "[0, 1]"}.items():
        field = "kind" if "KIND" in found else "gpus"
        assert config.check(load(project, f"instance_group: [{group}]", base)) == [
            f"pipeline.yaml:9: models.net.config.instance_group[0].{field}: found {found}, {why}"
        ]


# What is refused when the signature is known

X = signature({"inputs": [["x", "bool", [4]]], "outputs": [["OUTPUT__0", "float32", [4]]], "forward": ["x"]})


def rendered(folder: Path, base: str, text: str, signatures: dict[int, dict[str, Any]]) -> str:
    """Return the whole message of the refusal."""
    pipeline = load(folder, text, base)
    assert config.check(pipeline) == []
    with pytest.raises(ConfigError) as caught:
        config.render(pipeline, "net", signatures)
    return str(caught.value)


def net(**changes: Any) -> dict[str, Any]:
    short = {
        "inputs": [["image", "float32", [3, -1, -1]], ["ids", "int64", [4]]],
        "outputs": [["boxes", "float32", [-1, 4]], ["scores", "float32", [-1]]],
        "forward": ["image", "ids"],
    }
    return signature({**short, **changes})


def test_versions_that_differ_are_told_apart_in_every_tensor(tmp_path: Path) -> None:
    other = net(
        inputs=[["image", "float16", [3, -1, -1]], ["ids", "int64", [4]]],
        outputs=[["boxes", "float32", [100, 4]]],
    )
    assert rendered(tmp_path, NET, "{}", {1: net(), 2: other}) == (
        "config net: its versions have different signatures, but one config.pbtxt serves them all: "
        "version 1: input image float32 [3, -1, -1], output boxes float32 [-1, 4], output scores float32 [-1]; "
        "version 2: input image float16 [3, -1, -1], output boxes float32 [100, 4], output scores none\n"
        "    make them equal, or declare a model of its own for each"
    )


def test_versions_that_differ_in_order_only_differ(tmp_path: Path) -> None:
    other = net(outputs=[["scores", "float32", [-1]], ["boxes", "float32", [-1, 4]]])
    assert rendered(tmp_path, NET, "{}", {1: net(), 2: other}).splitlines()[0] == (
        "config net: its versions have different signatures, but one config.pbtxt serves them all: "
        "version 1: input image at 0, input ids at 1, output boxes at 2, output scores at 3; "
        "version 2: input image at 0, input ids at 1, output boxes at 3, output scores at 2"
    )


def test_where_an_output_comes_from_and_names_of_arguments_may_differ(tmp_path: Path) -> None:
    first, second = net(), net(forward=["argument_1", "argument_2"])
    second["outputs"] = [{**tensor, "source": "['out']"} for tensor in second["outputs"]]
    pipeline = load(tmp_path, "{}")
    assert config.render(pipeline, "net", {1: first, 2: second}) == config.render(pipeline, "net", {1: first, 2: first})


BACKEND = "config net: the PyTorch backend would give the input"
BY_NAME = "\n    name the inputs exactly like forward's arguments, or like none of them"
MEASURED = {
    "inputs that are not the declared ones": (
        net(inputs=[["ids", "int64", [4]], ["image", "float32", [3, -1, -1]]]),
        "config net: found inputs ids, image, expected image, ids, as declared",
    ),
    "an output too many": (
        net(outputs=[["boxes", "float32", [4]], ["scores", "float32", [1]], ["OUTPUT__2", "float32", [1]]]),
        "config net: found outputs boxes, scores, OUTPUT__2, expected boxes, scores, as declared",
    ),
    "an output that Triton has no type for": (
        net(outputs=[["boxes", "float32", [-1, 4]], ["scores", "bfloat16", [-1]]]),
        (
            "config net: scores: bfloat16 cannot be served: Triton's PyTorch backend refuses it when the model loads; "
            "use float32 and cast to bfloat16 inside forward"
        ),
    ),
    "an output that is always empty": (
        net(outputs=[["boxes", "float32", [0, 4]], ["scores", "float32", [-1]]]),
        (
            "config net: boxes has dims [0, 4], expected sizes from 1, or -1 where the size varies\n"
            "    it was empty at every case of the proof, which says nothing then: give weights, a range or values "
            "with which it is not, or leave it out of what forward returns; Triton has no dims for an empty tensor"
        ),
    ),
    "forward with another number of arguments": (
        net(forward=["image"]),
        "config net: forward of version 1 takes image, expected one argument for each input: image, ids",
    ),
    "forward with no arguments": (
        net(forward=[]),
        "config net: forward of version 1 takes nothing, expected one argument for each input: image, ids",
    ),
    "arguments of the same names in another order": (
        net(forward=["ids", "image"]),
        f'{BACKEND} "image" to the argument "image" of forward of version 1, but it is proved as "ids"{BY_NAME}',
    ),
}


@pytest.mark.parametrize("case", MEASURED)
def test_what_is_refused_once_the_signature_is_known(tmp_path: Path, case: str) -> None:
    measured, message = MEASURED[case]
    assert rendered(tmp_path, NET, "{}", {1: measured, 2: measured}) == message


def test_a_scalar_without_a_batch_is_refused(tmp_path: Path) -> None:
    measured = signature({"inputs": [["x", "bool", [4]]], "outputs": [["OUTPUT__0", "float32", []]], "forward": ["x"]})
    assert rendered(tmp_path, PLAIN, "{}", {1: measured}) == (
        "config net: OUTPUT__0 has no dims, and Triton has no scalars\n    give it one: x.reshape(1) in forward"
    )


def test_an_addition_to_an_output_that_the_model_does_not_return_is_refused(project: Path) -> None:
    text = "output: [{name: OUTPUT__1, label_filename: labels.txt}]"
    assert rendered(project, PLAIN, text, {1: X}) == (
        "config net: config names the output OUTPUT__1, but the model returns OUTPUT__0"
    )


def test_outputs_that_the_backend_would_mix_up_are_refused(tmp_path: Path) -> None:
    outputs = [["OUTPUT__1", "float32", [4]], ["OUTPUT__0", "float32", [4]]]
    measured = signature({"inputs": [["x", "bool", [4]]], "outputs": outputs, "forward": ["x"]})
    assert rendered(tmp_path, PLAIN, "{}", {1: measured}) == (
        "config net: the PyTorch backend would mix up the outputs OUTPUT__1, OUTPUT__0: "
        "it reads <name>__<index> as a place\n    number all of them from 0 in order, or none"
    )


def test_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    outputs = [["OUTPUT__0", "float32", [4]], ["OUTPUT__0", "float32", [4]]]
    measured = signature({"inputs": [["x", "bool", [4]]], "outputs": outputs, "forward": ["x"]})
    assert (
        rendered(tmp_path, PLAIN, "{}", {1: measured}) == "config net: two outputs have one name: OUTPUT__0, OUTPUT__0"
    )


def test_sequence_tensors_named_like_arguments_are_refused(tmp_path: Path) -> None:
    names = ["INPUT__0", "STATE__1", "START__2", "CORRID__3"]
    inputs = [[name, "int32", [1]] for name in names]
    measured = signature({"inputs": inputs, "outputs": [["OUTPUT__0", "int32", [1]]], "forward": names})
    assert rendered(tmp_path, SEQUENCE, "sequence_batching: {}", {1: measured}) == (
        "config net: the inputs INPUT__0, STATE__1, START__2, CORRID__3 are named like arguments of forward, and then "
        "the PyTorch backend does not take sequence_batching\n"
        "    name the inputs <name>__<index>, and the arguments of forward otherwise"
    )


def test_a_file_that_may_not_be_read_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert config.check(load(project, "output: [{name: boxes, label_filename: labels.txt}]")) == [
        "pipeline.yaml:14: models.net.config.output[0].label_filename: labels.txt: may not be read by this user"
    ]


def test_a_file_that_changes_after_the_check_is_refused_with_its_place(project: Path) -> None:
    text = "model_warmup: [{batch_size: 1, inputs: {image: {zero_data: true}, ids: {input_data_file: ids.bin}}}]"
    pipeline = load(project, text)
    assert config.check(pipeline) == []
    (project / "ids.bin").write_bytes(bytes(31))
    with pytest.raises(ConfigError) as caught:
        config.render(pipeline, "net", {1: net(), 2: net()})
    assert str(caught.value) == (
        "pipeline.yaml:14: models.net.config.model_warmup[0].inputs.ids.input_data_file: "
        "ids.bin has 31 bytes, expected 32: one item of int64 [4], little-endian, without a header"
    )


# Names of inputs, config order -> forward's arguments -> the place of each, measured on the C++ backend; "wrong" where
# the backend loads the model and serves other answers than were proved.
BINDING: list[tuple[list[str], list[str], bool]] = [
    (["x", "y"], ["x", "y"], True),
    (["x", "y"], ["y", "x"], False),
    (["a", "b"], ["x", "y"], True),
    (["x", "b"], ["x", "y"], True),
    (["y", "b"], ["x", "y"], True),
    (["A__0", "B__1"], ["x", "y"], True),
    (["q__1", "q__0"], ["q__1", "q__0"], False),
    (["a__b", "c__d"], ["x", "y"], True),
    (["a__", "b__1"], ["x", "y"], True),
]


@pytest.mark.parametrize(("names", "arguments", "right"), BINDING)
def test_names_bind_as_the_backend_binds_them(
    tmp_path: Path, names: list[str], arguments: list[str], right: bool
) -> None:
    inputs = "".join(f"      {name}: {{dtype: float32, shape: [4]}}\n" for name in names)
    path = tmp_path / "pipeline.yaml"
    path.write_text(PLAIN.replace("      x: {dtype: bool, shape: [4]}\n", inputs).replace("    config:\n", ""))
    try:
        pipeline = spec.load(path)
    except SpecError:
        assert not right
        return
    tensors = [[name, "float32", [4]] for name in names]
    measured = signature({"inputs": tensors, "outputs": [["y0", "float32", [4]]], "forward": arguments})
    if right:
        assert "dims: [4]" in config.render(pipeline, "net", {1: measured})
    else:
        with pytest.raises(ConfigError, match="would give the input"):
            config.render(pipeline, "net", {1: measured})


# Which versions are served


@pytest.mark.parametrize(
    ("text", "versions"),
    [
        ("{}", (1, 2, 7)),
        ("version_policy: {all: {}}", (1, 2, 7)),
        ("version_policy: {latest: {num_versions: 2}}", (2, 7)),
        ("version_policy: {latest: {num_versions: 9}}", (1, 2, 7)),
        ("version_policy: {specific: {versions: [7, 1]}}", (1, 7)),
    ],
)
def test_served_versions(tmp_path: Path, text: str, versions: tuple[int, ...]) -> None:
    pipeline = load(tmp_path, text, NET.replace("{1: {}, 2: {}}", "{7: {}, 1: {}, 2: {}}"))
    assert config.check(pipeline) == []
    assert config.served(pipeline.models["net"]) == versions


# Anything whatever, and what is imported

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
FIELDS = st.sampled_from([field for field in message.fields() if field != "name"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(FIELDS, JSON, max_size=3))
def test_anything_under_config_is_taken_or_refused_in_words(declared: dict[str, Any]) -> None:
    pipeline = spec.load(CONFIGS / "pipeline.yaml")
    model = pipeline.models["plain"].model_copy(update={"config": declared})
    pipeline = pipeline.model_copy(update={"models": {"plain": model}})
    problems = config.check(pipeline)
    config.files(pipeline, "plain")
    assert all(problem.startswith("pipeline.yaml:") for problem in problems)
    if not problems:
        config.render(pipeline, "plain", declared_signatures(pipeline, "plain"))


def test_a_check_imports_protobuf_alone_and_files_not_even_that() -> None:
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from tritonbuild import config, spec
        heavy = {{"torch", "numpy", "grpc", "tritonclient", "google.protobuf"}}
        pipeline = spec.load(Path({str(CONFIGS / "pipeline.yaml")!r}))
        for name, model in pipeline.models.items():
            config.files(pipeline, name)
            config.served(model)
        print(sorted(heavy & set(sys.modules)))
        assert config.check(pipeline) == []
        print(sorted(heavy & set(sys.modules)))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n['google.protobuf']\n"


# The real Triton


def write_torchscript(measured: dict[str, Any], batched: bool, path: Path) -> None:
    """Write a module with this signature, whose outputs are zeros."""
    import torch

    arguments = ", ".join(f"{name}: Tensor" for name in measured["forward"])

    def zeros(tensor: dict[str, Any]) -> str:
        sizes = ["n"] * batched + [str(abs(size)) for size in tensor["dims"]]
        return f"torch.zeros([{', '.join(sizes)}], dtype=torch.{tensor['dtype']})"

    class Module(torch.jit.ScriptModule):  # type: ignore[misc]
        """A class of its own: methods of one class cannot be defined twice."""

    module = Module()
    module.define(
        f"def forward(self, {arguments}):\n"
        f"    n = {measured['forward'][0]}.size(0)\n"
        f"    return ({', '.join(map(zeros, measured['outputs']))},)\n"
    )
    module.save(str(path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_real_triton_takes_every_file(tmp_path: Path) -> None:
    import numpy as np
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    pipeline = spec.load(CONFIGS / "pipeline.yaml")
    names = [name for name in MODELS if name != "metrics"]  # model_metrics is newer than the embedded 2.51
    for name in names:
        signatures = declared_signatures(pipeline, name)
        for version, measured in signatures.items():
            write_torchscript(measured, pipeline.models[name].max_batch_size > 0, tmp_path / "model.pt")
            repository.publish(tmp_path, name, {"model.pt": tmp_path / "model.pt"}, version)
        text = (CONFIGS / f"{name}.pbtxt").read_bytes()
        repository.publish(tmp_path, name, {"config.pbtxt": text, **config.files(pipeline, name)})
    with server.embedded(tmp_path / "models", tmp_path / ".build") as triton:
        with pytest.raises(ServerError, match=r"sequence_batching\.state is not served by the embedded server"):
            triton.load("sequence")  # Triton took the file; that the backend here keeps no state is another matter
        triton.load(*(name for name in names if name != "sequence"))
        for name in set(names) - {"sequence"}:
            model = pipeline.models[name]
            index = triton.get(f"/v2/models/{name}")
            assert sorted(map(int, index["versions"])) == list(config.served(model))
            assert [tensor["name"] for tensor in index["inputs"]] == list(model.inputs)
        client = InferenceServerClient(triton.url)

        # One number for each item: requests and answers have shape [batch, 1], the model sees and returns [batch].
        tensors = []
        for name, declared in pipeline.models["numbers"].inputs.items():
            dtype = dtypes.BY_TORCH[declared.dtype]
            tensor = InferInput(name, [3, *(declared.shape[1:] or [1])], dtype.kserve)
            tensors.append(tensor.set_data_from_numpy(np.zeros(tensor.shape(), dtype.numpy)))
        answer = client.infer("numbers", tensors)
        assert answer.as_numpy("word").shape == (3, 1)
        assert answer.as_numpy("double").shape == (3, 2)

        # Labels are found in the model's folder.
        image = InferInput("image", [1, 3, 224, 224], "FP32").set_data_from_numpy(
            np.zeros((1, 3, 224, 224), np.float32)
        )
        answer = client.infer("resnet18", [image], outputs=[InferRequestedOutput("logits", class_count=1)])
        assert answer.as_numpy("logits").item() in {b"0.000000:0:cat", b"0.000000:1:dog"}
