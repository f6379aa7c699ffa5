"""The public names, their arguments, the facts of the package, and what importing it does."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import inspect
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import swavkit
from swavkit import CropGroup, PhotometricDistortion

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(swavkit.__file__).parent  # elsewhere if a wheel is tested
IMAGENET = "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)"
CROPS = (CropGroup(224, 2, (0.14, 1.0)), CropGroup(96, 6, (0.05, 0.14)))

# Names, order, kinds and defaults of the arguments. Keyword-only ones may be added, with a default
# that leaves the behaviour as it is; anything else breaks the code of users.
CALLS = {
    "sinkhorn_knopp": "(scores, *, epsilon=0.05, iterations=3, sample_weight=None, "
    "prototype_weight=None, process_group=None, synchronize=True, relaxation=inf, tolerance=None, "
    "hard=False, validate=False, dtype=None)",
    "marginal_error": "(codes, *, sample_weight=None, prototype_weight=None, process_group=None, "
    "synchronize=True)",
    "power_law_prior": "(num_prototypes, exponent=0.25)",
    "swapped_prediction_loss": "(scores, codes, *, temperature=0.1, sample_weight=None)",
    "code_prediction_loss": "(scores, codes, *, temperature=0.1, sample_weight=None, "
    "reduction='mean')",
    "CodePredictionLoss": "(temperature=0.1, reduction='mean')",
    "CodePredictionLoss.forward": "(self, scores, codes, sample_weight=None)",
    "multi_crop_forward": "(network, crops, *, key=None, together=True)",
    "crop_masks": "(masks, boxes, flips, size)",
    "SinkhornKnopp": "(epsilon=0.05, iterations=3, *, process_group=None, synchronize=True, "
    "relaxation=inf, tolerance=None, hard=False, validate=False, dtype=None)",
    "SinkhornKnopp.forward": "(self, scores, sample_weight=None, prototype_weight=None)",
    "PrototypeLayer": "(feature_dim, num_prototypes, *, gradient='tangent')",
    "PrototypeLayer.forward": "(self, features, *, frozen=None)",
    "PrototypeLayer.normalize_": "(self)",
    "PrototypeLayer.assign": "(self, features)",
    "PrototypeLayer.reset_parameters": "(self)",
    "PrototypeLayer.initialize_": "(self, features, *, generator=None)",
    "PrototypeLayer.reinitialize_": "(self, index, features, *, generator=None, "
    "process_group=None, synchronize=True)",
    "SwappedPredictionLoss": "(temperature=0.1)",
    "SwappedPredictionLoss.forward": "(self, scores, codes, sample_weight=None)",
    "FeatureQueue": "(length, feature_dim, num_views=2, *, dtype=None)",
    "FeatureQueue.push": "(self, features, *, valid=None)",
    "FeatureQueue.reset_parameters": "(self)",
    "FeatureQueue.__len__": "(self)",
    "FeatureQueue.__bool__": "(self)",
    "Diagnosis": "(name, text, remedies)",
    "check_sizes": "(batch_size, num_prototypes, *, processes=1, queue_length=0)",
    "ClusterMonitor": "(num_prototypes, *, window=100, process_group=None)",
    "ClusterMonitor.update": "(self, statistics, *, loss=None, features=None, prototypes=None)",
    "ClusterMonitor.compute": "(self)",
    "ClusterMonitor.diagnose": "(self, criterion=None)",
    "ClusterMonitor.plot": "(self)",
    "ClusterMonitor.reset": "(self)",
    "CropGroup": "(size, count, scale, ratio=(0.75, 1.3333333333333333), flip=0.5, "
    f"photometric={PhotometricDistortion()}, *, interpolation='bilinear')",
    "PhotometricDistortion": "(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, "
    "jitter_probability=0.8, greyscale_probability=0.2, blur_probability=0.5, "
    "blur_sigma=(0.1, 2.0), other_channels='error')",
    "PhotometricDistortion.__call__": "(self, crops, *, generator=None)",
    "MultiCropTransform": f"(crops={CROPS}, *, {IMAGENET}, smaller_first=False, eight_bit=False)",
    "MultiCropTransform.__call__": "(self, image, *, generator=None, seed=None, "
    "return_boxes=False)",
    "SwAVLoss": "(feature_dim, num_prototypes, *, num_code_views=2, temperature=0.1, "
    "epsilon=0.05, iterations=3, queue_length=0, queue_start=0, freeze_steps=0, "
    "memory='auto', reduction='mean', process_group=None, synchronize=True, "
    "prototype_gradient='tangent', queue_dtype=None, shard_prototypes=False, "
    "hard=False, relaxation=inf, tolerance=None, prototype_weight=None)",
    "SwAVLoss.check_ranks": "(self)",
    "SwAVLoss.reset_parameters": "(self)",
    "SwAVLoss.forward": "(self, features, *, code_features=None, code_prototypes=None, "
    "sample_weight=None, return_details=False, return_statistics=False)",
    "SwAVDetails": "(codes, scores)",
    "SwAVStatistics": "(samples, code_usage, assigned, code_entropy, prediction_entropy, "
    "code_rows, prediction_rows, agreeing, pairs)",
    "cluster_statistics": "(scores, codes, *, temperature=0.1, sample_weight=None)",
    "LoadReport": "(layout, loaded, renamed, missing, unused)",
    "load_pretrained": "(source, *, network=None, projection_head=None, prototypes=None)",
    "pretrained_state_dict": "(network, projection_head=None, prototypes=None)",
    "sharded_state_dict": "(module, *, checkpoint=None, process_group=None)",
    "load_sharded_state_dict": "(module, state_dict, *, strict=True, process_group=None)",
}
# What a class offers beyond the members of nn.Module and the fields of a dataclass.
MEMBERS = {
    "SinkhornKnopp": {"process_group"},
    "SwAVLoss": {"check_ranks", "reset_parameters"},
    "PrototypeLayer": {
        "directions",
        "normalize_",
        "assign",
        "reset_parameters",
        "initialize_",
        "reinitialize_",
    },
    "ClusterMonitor": {"update", "compute", "diagnose", "plot", "reset", "process_group"},
    "FeatureQueue": {"push", "age", "reset_parameters"},
}
CLASSES = [name for name in swavkit.__all__ if isinstance(getattr(swavkit, name), type)]


def resolve(path: str) -> Any:
    found: Any = swavkit
    for name in path.split("."):
        found = getattr(found, name)
    return found


def own_members(kind: type) -> dict[str, Any]:
    """Return the public methods and properties that a class defines itself."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    }


# Names and arguments


def test_the_public_names_are_these() -> None:
    assert sorted(swavkit.__all__) == sorted({path.split(".")[0] for path in CALLS})
    assert len(set(swavkit.__all__)) == len(swavkit.__all__)
    public = {name for name, value in vars(swavkit).items() if not name.startswith("_")}
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert public - modules == set(swavkit.__all__)


@pytest.mark.parametrize("name", swavkit.__all__)
def test_a_public_name_is_public_in_its_own_file_too(name: str) -> None:
    module = sys.modules[resolve(name).__module__]
    assert name in module.__all__
    assert set(module.__all__) <= {*swavkit.__all__, "IMAGENET_MEAN", "IMAGENET_STD"}


@pytest.mark.parametrize("path", CALLS)
def test_the_arguments_are_those_of_the_contract(path: str) -> None:
    signature = inspect.signature(resolve(path))
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    assert str(inspect.Signature(bare)) == CALLS[path]
    assert all(parameter.annotation for parameter in signature.parameters.values())


@pytest.mark.parametrize("name", CLASSES)
def test_the_members_of_a_class_are_these(name: str) -> None:
    members = {member for member in own_members(resolve(name)) if not hasattr(nn.Module, member)}
    assert members == MEMBERS.get(name, set())


def test_details_have_two_fields() -> None:
    assert swavkit.SwAVDetails._fields == ("codes", "scores")


@pytest.mark.parametrize("name", swavkit.__all__)
def test_everything_public_has_a_docstring(name: str) -> None:
    value = resolve(name)
    members = own_members(value) if isinstance(value, type) else {}
    for path, described in {name: value, **members}.items():
        text = described.__doc__
        assert text, path
        assert not text.startswith(f"{name}("), "a docstring that Python made up"
        assert text.strip().splitlines()[0].endswith("."), path


# The facts of the package


def test_the_version_is_a_literal_and_that_of_the_distribution() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    literals = [
        ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and [target.id for target in statement.targets] == ["__version__"]
    ]
    assert literals == [swavkit.__version__]
    assert re.fullmatch(r"\d+\.\d+\.\d+", swavkit.__version__)
    assert importlib.metadata.version("swavkit") == swavkit.__version__


def test_the_package_is_typed_and_free() -> None:
    assert (PACKAGE / "py.typed").is_file()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["options.package_data"]["swavkit"] == "py.typed"
    assert setup["metadata"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")


BUILD = """
from setuptools import build_meta
build_meta.build_sdist("built")
build_meta.build_wheel("built")
"""
# What is in the folder of the sources and not a source.
MADE = (".*", "__pycache__", "_build", "*.egg-info", "build", "dist", "runs")


def files_below(folder: Path, *names: str) -> set[str]:
    """Return the files in some folders of a folder, as paths in it."""
    found = (path for name in names for path in (folder / name).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found}


def test_distributions_hold_every_file(tmp_path: Path) -> None:
    """Also of subpackages: the sdist passes its own tests, and the wheel is the whole package."""
    pytest.importorskip("setuptools", "77", reason="setuptools 77 is not installed")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("swavkit", *MADE))
    shutil.copytree(PACKAGE, tree / "swavkit", ignore=shutil.ignore_patterns(*MADE))
    inner = tree / "swavkit" / "one" / "inner"
    inner.mkdir(parents=True)
    for package in (inner, inner.parent):
        (package / "__init__.py").touch()
    command = [sys.executable, "-c", BUILD]
    build = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    with tarfile.open(next(tree.glob("built/*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert files_below(tree, "swavkit", "tests", "docs", "benchmarks") <= held
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"} <= held
    assert {"pyproject.toml", "setup.cfg"} <= held
    with zipfile.ZipFile(next(tree.glob("built/*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == files_below(tree, "swavkit")
    assert {"swavkit/py.typed", "swavkit/one/inner/__init__.py"} <= inside


def test_the_core_needs_torch_and_numpy_only() -> None:
    requirements = importlib.metadata.requires("swavkit") or []
    core = [re.split(r"\W", text)[0] for text in requirements if "extra" not in text]
    assert sorted(core) == ["numpy", "torch"]


def test_tests_are_skipped_without_other_solvers() -> None:
    """A file that imports one unconditionally could not be collected without it."""
    others = {"cv2", "geomloss", "ot", "scipy", "torchvision"}
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)
        guarded = re.findall(r"^pytest\.importorskip\(\s*\"(\w+)", text, flags=re.MULTILINE)
        assert not (others & set(imported)) - set(guarded), path


# Importing it

IMPORT = """
import json, os, random, sys, warnings
import numpy, torch
def state():
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "python": str(random.getstate()),
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "cuda": torch.cuda.is_initialized(),
        "distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "path": sys.path,
        "filters": len(warnings.filters),
    }
before, modules = state(), set(sys.modules)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import swavkit
print(json.dumps({
    "changed": [name for name, value in state().items() if before[name] != value],
    "added": sorted(set(sys.modules) - modules),
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What importing swavkit changes and loads in a process that has done nothing else."""
    process = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_importing_loads_no_optional_dependency(imported: dict[str, list[str]]) -> None:
    # What torch loads by itself (tqdm, for one, if there is any) is not ours: see `modules` above.
    roots = {module.split(".")[0] for module in imported["added"]}
    assert "swavkit" in roots
    assert roots <= {"swavkit", "torch", "numpy", *sys.stdlib_module_names}
    assert "torch._dynamo" not in imported["added"]


def test_importing_changes_nothing(imported: dict[str, list[str]]) -> None:
    assert imported["changed"] == []
