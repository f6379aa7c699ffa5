"""The example learns, writes what it says, goes on after a kill, and names what is wrong."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
PROGRAM = EXAMPLES / "pretrain.py"
TINY = [
    *("--data", "digits", "--epochs", "12", "--prototypes", "20", "--queue", "200"),
    *("--warmup-steps", "50", "--threads", "1", "--device", "cpu"),
]  # fmt: skip
PICTURES = ["crops.png", "loss.png", "map.png", "nearest.png", "prototypes.png"]
ROWS = ["trained encoder", "random encoder", "raw pixels"]
COLUMNS = ["linear_10", "knn_10", "linear", "knn"]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("pretrain").main


def start(output: Path, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
    program = [str(PROGRAM), "--output", str(output), *arguments]
    command = [sys.executable, "-W", "error", *program]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [sys.executable, *torchrun, str(processes), *program]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The output folder of a whole run, and what it showed."""
    output = tmp_path_factory.mktemp("unbroken")
    process = start(output, *TINY)
    shown, progress = process.communicate()
    assert process.returncode == 0, progress
    return output, shown, progress


def test_a_run_shows_its_progress_and_a_table(unbroken: tuple[Path, str, str]) -> None:
    _, shown, progress = unbroken
    assert "1437 training and 360 test images of 1x8x8" in shown
    for row in ROWS:
        assert row in shown
    assert "images/s" in progress
    assert "loss" in progress
    assert "ln K -" in progress


def test_a_run_writes_what_it_says(unbroken: tuple[Path, str, str]) -> None:
    output, _, _ = unbroken
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [*PICTURES, "checkpoint.pt", "metrics.json"]
    )
    for picture in PICTURES:
        with Image.open(output / picture) as image:
            assert len(image.convert("L").getcolors()) > 10  # not blank
    metrics = metrics_of(output)
    assert metrics["settings"]["queue"] == 200
    assert metrics["seed"] == 0
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["seconds"]["this run"] > metrics["seconds"]["training, all runs"] > 0
    assert len(metrics["losses"]) == 12 * (1437 // 64)
    assert metrics["ln_k"] == pytest.approx(np.log(20))
    assert list(metrics["accuracies"]) == ROWS
    for row in ROWS:
        assert list(metrics["accuracies"][row]) == COLUMNS
        assert all(10 < accuracy <= 100 for accuracy in metrics["accuracies"][row].values())


def test_it_learns_at_a_tiny_size_already(unbroken: tuple[Path, str, str]) -> None:
    accuracies = metrics_of(unbroken[0])["accuracies"]
    gain = accuracies["trained encoder"]["linear_10"] - accuracies["random encoder"]["linear_10"]
    assert gain > 4  # 11 points were seen; a training that does not start loses some


def test_a_killed_run_goes_on_to_the_same_numbers(
    unbroken: tuple[Path, str, str], tmp_path: Path
) -> None:
    process = start(tmp_path, *TINY)
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    epoch = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"]
    assert 1 <= epoch < 12
    assert not (tmp_path / "metrics.json").exists()
    (tmp_path / "checkpoint.unfinished").write_bytes(b"killed while writing")

    process = start(tmp_path, *TINY, "--resume")
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"going on after epoch {epoch} of 12" in shown
    expected, metrics = metrics_of(unbroken[0]), metrics_of(tmp_path)
    for name in ("losses", "accuracies", "prototype_perplexity"):
        assert metrics[name] == expected[name]


def test_resume_refuses_other_settings_and_other_files(
    unbroken: tuple[Path, str, str], tmp_path: Path, main, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(unbroken[0] / "checkpoint.pt", tmp_path)
    arguments = [*TINY, "--output", str(tmp_path), "--resume"]
    assert main([*arguments, "--queue", "100"]) == 2
    assert "--queue was 200 there, got 100" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert main(arguments) == 2
    assert "is no checkpoint of this program" in capsys.readouterr().err


def test_torchrun_trains_on_two_processes_and_goes_on_with_two(
    tmp_path: Path, main, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--epochs", "2"]
    process = start(tmp_path, *arguments, processes=2)
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    assert shown.count("1437 training and 360 test images of 1x8x8, on cpu, 2 processes") == 1
    metrics = metrics_of(tmp_path)
    assert metrics["processes"] == 2
    assert len(metrics["losses"]) == 2 * (1437 // 64)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    first, second = (own["criterion"] for own in state["processes"])
    torch.testing.assert_close(first["prototypes.weight"], second["prototypes.weight"])
    assert len(first["queue.valid"]) == 100  # half of the slots each, with features of their own
    assert bool(first["queue.valid"].all())
    assert not torch.equal(first["queue.features"], second["queue.features"])

    process = start(tmp_path, *arguments, "--resume", processes=2)
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "going on after epoch 2 of 2" in shown
    assert metrics_of(tmp_path)["accuracies"] == metrics["accuracies"]

    assert main([*arguments, "--output", str(tmp_path), "--resume"]) == 2
    assert "the number of processes was 2 there, got 1" in capsys.readouterr().err


def picture(path: Path, mode: str, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)


FOLDER_RUN = [
    *("--epochs", "1", "--batch-size", "4", "--prototypes", "5", "--image-size", "16"),
    *("--crops", "2x12,2x8", "--threads", "1", "--device", "cpu"),
]  # fmt: skip


def test_a_folder_of_any_images_is_learned_from_and_an_unreadable_one_counted(
    tmp_path: Path, main, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = ["RGB", "L", "RGBA", "P", "CMYK", "1"]
    for label, name in enumerate(("apples", "pears")):
        for index in range(9):
            mode = modes[index % len(modes)]
            ending = "jpg" if mode == "CMYK" else "png"
            size = (20 + 3 * index, 40 - 3 * index)
            path = tmp_path / "data" / name / "deeper" / f"{index}.{ending}"
            picture(path, mode, size, 100 * label + index)
    whole = (tmp_path / "data" / "apples" / "deeper" / "0.png").read_bytes()
    (tmp_path / "data" / "apples" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "apples" / "empty.jpg").write_bytes(b"")
    (tmp_path / "data" / "notes.txt").write_text("no image")
    output = tmp_path / "out"
    assert main(["--data", str(tmp_path / "data"), "--output", str(output), *FOLDER_RUN]) == 0
    shown = capsys.readouterr().out
    assert "14 training and 4 test images of 3x16x16 (2 unreadable ones skipped)" in shown
    metrics = metrics_of(output)
    assert metrics["images"] == {"train": 14, "test": 4, "unreadable": 2}
    assert list(metrics["accuracies"]["trained encoder"]) == ["linear", "knn"]  # < 10 of each


def test_without_labels_the_evaluation_is_left_out(
    tmp_path: Path, main, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(8):
        picture(tmp_path / "data" / f"{index}.png", "RGB", (20, 30), index)
    output = tmp_path / "out"
    assert main(["--data", str(tmp_path / "data"), "--output", str(output), *FOLDER_RUN]) == 0
    assert "no labels" in capsys.readouterr().out
    assert metrics_of(output)["accuracies"] == {}
    assert all((output / name).exists() for name in PICTURES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data must be mnist, digits or a folder, got 'nowhere'"),
        (["--data", "{empty}"], "holds no readable image"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--batch-size", "9999"], "--batch-size must be at most the 1437 training images"),
        (["--learning-rate", "nan"], "--learning-rate must be at least 0, got nan"),
        (["--crops", "2x8"], "--crops and --scales must be like"),
        (["--crops", "2,2"], "--crops and --scales must be like"),
        (["--crops", "1x8", "--scales", "0.5-1"], "--crops must describe at least 2 crops"),
        (["--crops", "2x6,2x8"], "must hold the largest size"),
        (["--scales", "0.5-2,0.5-1"], "scale must be (low, high)"),
        (["--prototypes", "0"], "num_prototypes must be at least 1, got 0"),
        (["--feature-dim", "-3"], "feature_dim must be at least 1, got -3"),
        (["--epsilon", "0"], "epsilon must be a finite number above 0"),
        (["--temperature", "-1"], "temperature must be a finite number above 0"),
        (["--iterations", "0"], "iterations must be at least 1, got 0"),
        (["--queue", "-1"], "--queue must be at least 0, got -1"),
        (["--device", "toaster"], "--device 'toaster' cannot be used"),
        (["--output", "{file}"], "exists"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_argument_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, main, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    arguments = [
        argument.format(empty=tmp_path / "empty", file=tmp_path / "file") for argument in arguments
    ]
    assert main(["--data", "digits", "--output", str(tmp_path / "out"), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pretrain.py: error: ")
    assert message in lines[0]


def test_the_exit_status_of_a_bad_argument_is_2(tmp_path: Path) -> None:
    process = start(tmp_path, "--epochs", "0")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors == "pretrain.py: error: --epochs must be at least 1, got 0\n"


def test_help_documents_every_option(main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    settings = importlib.import_module("settings")
    for name in vars(settings.Settings()):
        assert settings.flag(name) in shown
    assert shown.count("(default: ") == len(vars(settings.Settings()))
