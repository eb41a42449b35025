"""Decides how an entry point becomes a fresh eager model: import, kwargs, seed, weights, eval, device.

Hides everything that can be wrong with a user's model before it runs, and the traces that user code leaves in the
process: random state, default dtype and default device are put back. The traceback of the user's code goes to the log;
the error has its last line of the project.

Source: docs/pipeline.md, "entry_point"; https://pytorch.org/docs/stable/notes/serialization.html (weights_only).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import random
import sys
import traceback
import urllib.error
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tritonbuild import calling, memory, weights
from tritonbuild.errors import BuildError, TraceError
from tritonbuild.wrap import Flat, Interface, flat
from tritonbuild.yamlfile import closest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tritonbuild.spec import ModelVersion

_NETWORKS = {"requests", "urllib3", "httpx", "huggingface_hub"}


class Builder:
    """Builds the same fresh model each time it is called; all of them share one measured interface.

    Args:
        version: The declaration.
        root: The project's folder; entry points import from it and from its src/.
        device: Where the models go.

    Raises:
        TraceError: The entry point cannot be imported, or is nothing that builds a model.
    """

    def __init__(self, version: ModelVersion, root: Path, device: torch.device) -> None:
        self.version = version
        self.root = root
        self.device = device
        self.interface: Interface | None = None
        self.submodules: dict[str, type[nn.Module]] = {}
        self._where = f"trace {version.label}"
        self._entry = f'entry point "{version.entry_point}"'
        module, _, attributes = version.entry_point.partition(":")
        search(root)
        with seeded(version.seed):
            self._attribute = self._found(self._imported(module), attributes)
        self._weights = weights.read(version, root) if version.weights else None

    def __call__(self) -> Flat:
        """Return a fresh model behind its interface: in eval mode, on the device, without gradients.

        Raises:
            TraceError: It cannot be built, its weights do not fit, or its forward does not fit the inputs.
        """
        with seeded(self.version.seed):
            module = self._built()
        if self._weights is not None:
            weights.load(module, self._weights, self.version)
        self._check_parameters(module)
        try:
            module.eval()
            module.to(self.device)
            for parameter in module.parameters():
                parameter.requires_grad_(False)
        except Exception as error:
            raise self.raised(f"moving the model to {self.device}", error) from error
        if self.interface is None:
            self.interface = Interface(self.version, calling.styles(module, self.version))
            self.submodules = {name: type(part) for name, part in module.named_modules() if name}
        return flat(module, self.interface)

    def raised(self, what: str, error: BaseException, *advice: str) -> TraceError:
        """Return the error for an exception of the user's code, and print its traceback to the log.

        Args:
            what: What was done, such as `forward`: "forward raises ValueError: ...".
            error: The exception.
            advice: What to do, where more is known than the exception says.
        """
        if isinstance(error, BuildError):
            raise error
        sys.stdout.write("".join(traceback.format_exception(error)))
        if _is_network(error):
            advice = (
                "nothing can be downloaded here; fetch the file elsewhere, declare weights: {path: ...}, and",
                "leave out the kwarg that asks for the download",
            )
        text = " ".join(str(error).split())
        if len(text) > 400:
            text = f"{text[:400]}..."
        line = last_line(error, self.root)
        at = f" ({line})" if line else ""
        kind = type(error).__name__ + (": " if text else "")
        return TraceError(self._where, f"{what} raises {kind}{text}{at}", *advice)

    def _imported(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise self.raised(self._entry, error) from error
            folders = [".", *(["src"] if (self.root / "src").is_dir() else [])]
            known = _module_names(self.root, error.name.rpartition(".")[0])
            raise TraceError(
                self._where,
                f'{self._entry}: no module "{error.name}"{closest(error.name, known)}',
                f"looked in the project's folder ({', '.join(folders)}) and in the installed packages",
            ) from None
        except (Exception, SystemExit) as error:
            raise self.raised(self._entry, error) from error

    def _found(self, module: Any, attributes: str) -> Any:
        found = module
        for attribute in attributes.split("."):
            try:
                found = getattr(found, attribute)
            except AttributeError:
                known = [name for name in vars(found) if not name.startswith("__")]
                owner = module.__name__ if found is module else f"{module.__name__}:{getattr(found, '__name__', found)}"
                raise TraceError(
                    self._where,
                    f'{self._entry}: {owner} has no "{attribute}"{closest(attribute, known)}',
                    f"its file is {shown_path(getattr(module, '__file__', None) or '', self.root)}",
                ) from None
        if isinstance(found, nn.Module):
            raise TraceError(
                self._where,
                f"{self._entry} is {_kind(found)} that exists already, expected a class or function that builds one",
                "tracing needs fresh ones: return it from a function",
            )
        if not callable(found):
            raise TraceError(
                self._where,
                f"{self._entry} is {_kind(found)}, expected a class or function that builds a torch.nn.Module",
            )
        return found

    def _built(self) -> nn.Module:
        kwargs = self.version.kwargs
        self._check_kwargs(kwargs)
        try:
            # A copy: a model that keeps and changes its kwargs must not change those of the next one.
            module = self._attribute(**_copied(kwargs))
        except (Exception, SystemExit) as error:
            raise self.raised(self._entry, error) from error
        if not isinstance(module, nn.Module):
            raise TraceError(
                self._where,
                f"{self._entry} returned {_kind(module)}, expected a torch.nn.Module",
                *(["return the model alone"] if isinstance(module, (tuple, list, dict)) else []),
            )
        return module

    def _check_parameters(self, module: nn.Module) -> None:
        if type(module).__name__ == "OptimizedModule":
            raise TraceError(
                self._where,
                f"{self._entry} returned what torch.compile made, which cannot become TorchScript",
                "return the model itself",
            )
        lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise TraceError(
                self._where,
                f"{self._entry}: the parameter {lazy[0]} has no size before the first call",
                "use the module that is not lazy, such as Linear for LazyLinear, or declare weights",
            )

    def _check_kwargs(self, kwargs: dict[str, Any]) -> None:
        try:
            signature = inspect.signature(self._attribute)
        except (ValueError, TypeError):
            return  # built-in: the call itself will tell
        try:
            signature.bind(**kwargs)
        except TypeError as error:
            name = self.version.entry_point.partition(":")[2]
            unknown = [key for key in kwargs if key not in signature.parameters]
            hint = closest(unknown[0], signature.parameters) if unknown else ""
            raise TraceError(
                self._where,
                f"kwargs do not fit {name}{_short(signature)}: {error}{hint}",
                "kwargs are the entry point's keyword arguments",
            ) from None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch; afterwards put their state, the default dtype and the default device back."""
    import numpy as np

    python, numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    device, grad = torch.get_default_device(), torch.is_grad_enabled()
    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=cuda):
        memory.seed_all(seed)
        if not torch.cuda.is_initialized() and _has_driver():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)  # once it is initialized: by the entry point, maybe
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)
            torch.set_grad_enabled(grad)


@functools.cache
def _has_driver() -> bool:
    """Return whether a driver for GPUs is there; to ask torch takes milliseconds where there is none."""
    return any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/dxg"))


def search(root: Path) -> None:
    """Let modules be found in the project's folder and in its src/, before installed ones."""
    for folder in (str(root / "src"), str(root)):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)
        sys.path_importer_cache.pop(folder, None)  # what was there before may have been looked up


def last_line(error: BaseException, root: Path) -> str:
    """Return `src/zoo/text.py:12`: the last line of the project, or else of other user code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown_path(error.filename, root)}:{error.lineno}"
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [line for line in lines if is_own(line[0], root)] or [line for line in lines if is_user_code(line[0])]
    return f"{shown_path(own[-1][0], root)}:{own[-1][1]}" if own else ""


def is_own(file: str, root: Path) -> bool:
    """Return whether a source file belongs to the project."""
    path = Path(file)
    try:
        inside = path.resolve().relative_to(root.resolve())
    except ValueError:
        return False
    return not {"site-packages", "dist-packages"} & set(inside.parts)


_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)
_PYTHON = str(Path(contextlib.__file__).parent)


def is_user_code(file: str) -> bool:
    """Return whether a source file is neither torch's, nor ours, nor Python's own machinery."""
    if file.startswith(_PYTHON) and not {"site-packages", "dist-packages"} & set(Path(file).parts):
        return False
    return not file.startswith(("<", f"{_TORCH}/", f"{_OURS}/"))


def _is_network(error: BaseException) -> bool:
    while True:
        if isinstance(error, (urllib.error.URLError, ConnectionError, TimeoutError)):
            return True
        if type(error).__module__.partition(".")[0] in _NETWORKS:
            return True
        following = error.__cause__ or error.__context__
        if following is None:
            return False
        error = following


def _module_names(root: Path, package: str) -> list[str]:
    """Return the modules and packages of the project beside a name that is missing."""
    inside = Path(*package.split(".")) if package else Path()
    names = []
    for folder in (root / inside, root / "src" / inside):
        for path in folder.glob("*"):
            if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))):
                names.append(f"{package}.{path.stem}" if package else path.stem)
    return names


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _kind(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _short(signature: inspect.Signature) -> str:
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(inspect.Signature(parameters))
    return text if len(text) <= 160 else f"{text[:160]}...)"


def shown_path(file: str, root: Path) -> str:
    """Return a source file as people name it: relative to the project, or to the installed packages."""

    try:
        return Path(file).resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        parts = Path(file).parts
        return "/".join(parts[parts.index("site-packages") + 1 :]) if "site-packages" in parts else file


def builder(version: ModelVersion, root: Path, device: torch.device) -> Callable[[], Flat]:
    """Return what builds fresh eager models of a version.

    Raises:
        TraceError: The entry point cannot be imported, or is nothing that builds a model.
    """
    return Builder(version, root, device)
