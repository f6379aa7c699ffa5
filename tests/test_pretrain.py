"""The example learns, writes what it says, goes on after a kill, and names what is wrong."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from threadpoolctl import threadpool_info

from swavkit import Diagnosis, PrototypeLayer, load_pretrained
from tests.states import same

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
PROGRAM = EXAMPLES / "pretrain.py"
TINY = [
    *("--data", "digits", "--epochs", "12", "--batch-size", "128", "--prototypes", "20"),
    *("--queue", "200", "--warmup-steps", "25", "--freeze-steps", "25"),
    *("--threads", "1", "--device", "cpu"),
]  # fmt: skip
STEPS = 1437 // 128  # of an epoch
PICTURES = ["clusters.png", "crops.png", "loss.png", "map.png", "nearest.png", "prototypes.png"]
ROWS = ["trained encoder", "random encoder", "raw pixels"]
FIGURES = {  # of an epoch
    *("epoch", "loss", "below_ln_k", "above_code_entropy", "code_entropy", "prediction_entropy"),
    *("perplexity", "code_perplexity", "used", "agreement", "marginal_error", "duplicates"),
    *("feature_std", "effective_rank", "nonfinite"),
}
COLUMNS = ["linear_10", "knn_10", "linear", "knn"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def main(example) -> Callable[[list[str]], int]:
    return example("pretrain").main


def without_slow_pictures(example, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("crops", "nearest", "feature_map"):
        monkeypatch.setattr(example("pictures"), name, lambda *_: matplotlib.figure.Figure())


@pytest.fixture
def quick(main, example, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The program without its slow parts, the evaluation and three of the pictures."""
    monkeypatch.setattr(example("evaluation"), "compare", lambda *_: {})
    without_slow_pictures(example, monkeypatch)
    return lambda arguments: main([*TINY, "--epochs", "1", "--prototypes", "2", *arguments])


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


@pytest.mark.slow
def test_a_run_shows_its_progress_and_a_table(unbroken: tuple[Path, str, str]) -> None:
    _, shown, progress = unbroken
    assert "1437 training and 360 test images of 1x8x8" in shown
    for row in ROWS:
        assert row in shown
    assert "images/s" in progress
    line = r"loss \d\.\d\d \(codes \d\.\d\d, ln K 3\.00\), used \d+%, agreement \d+%"
    assert re.search(line, progress)
    for row in ROWS:
        assert f"evaluating {row}" in progress
    for picture in PICTURES:
        assert f"drawing {picture}" in progress


@pytest.mark.slow
def test_a_run_writes_what_it_says(unbroken: tuple[Path, str, str]) -> None:
    output, _, _ = unbroken
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [*PICTURES, "checkpoint.pt", "metrics.json"]
    )
    for picture in PICTURES:
        with Image.open(output / picture) as image:
            assert len(image.convert("L").getcolors()) > 10  # not blank
    metrics = metrics_of(output)
    assert metrics["images"]["classes"] == [str(digit) for digit in range(10)]
    assert metrics["settings"]["queue"] == 200
    assert metrics["seed"] == 0
    assert metrics["versions"]["torch"] == importlib.metadata.version("torch")
    assert metrics["seconds"]["this run"] > metrics["seconds"]["training, all runs"] > 0
    assert len(metrics["losses"]) == 12 * STEPS
    assert metrics["ln_k"] == pytest.approx(np.log(20))
    assert [figures["epoch"] for figures in metrics["figures"]] == list(range(1, 13))
    for figures in metrics["figures"]:
        assert set(figures) == FIGURES
        assert all(np.isfinite(list(figures.values())))
    last = metrics["figures"][-1]
    assert last["loss"] == pytest.approx(np.mean(metrics["losses"][-100:]), rel=1e-5)
    assert last["code_entropy"] < last["loss"] < metrics["ln_k"]
    assert metrics["stopped_by"] == []
    assert list(metrics["accuracies"]) == ROWS
    for row in ROWS:
        assert list(metrics["accuracies"][row]) == COLUMNS
        assert all(10 < accuracy <= 100 for accuracy in metrics["accuracies"][row].values())


@pytest.mark.slow
def test_its_checkpoint_gives_encoder_head_and_prototypes(
    unbroken: tuple[Path, str, str], example
) -> None:
    file = unbroken[0] / "checkpoint.pt"
    saved = torch.load(file, weights_only=True)
    network = example("encoder").Network(channels=1, feature_dim=64)
    weight = saved["processes"][0]["criterion"]["prototypes.weight"]
    prototypes = PrototypeLayer(64, len(weight))
    load_pretrained(file, network=network.encoder)
    load_pretrained(file, projection_head=network.head, prototypes=prototypes)
    assert same(network.state_dict(), saved["network"])
    assert torch.equal(prototypes.weight, weight)


@pytest.mark.slow
def test_it_learns_at_a_tiny_size_already(unbroken: tuple[Path, str, str]) -> None:
    accuracies = metrics_of(unbroken[0])["accuracies"]
    gain = accuracies["trained encoder"]["linear_10"] - accuracies["random encoder"]["linear_10"]
    assert gain > 4  # 11 points were seen; a training that does not start loses some


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(
    unbroken: tuple[Path, str, str], tmp_path: Path, main, example, monkeypatch, capsys
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

    without_slow_pictures(example, monkeypatch)
    assert main([*TINY, "--output", str(tmp_path), "--resume"]) == 0
    assert f"continuing after epoch {epoch} of 12" in capsys.readouterr().out
    expected, metrics = metrics_of(unbroken[0]), metrics_of(tmp_path)
    for name in ("losses", "figures", "accuracies", "prototype_perplexity"):
        assert metrics[name] == expected[name]


@pytest.mark.slow
def test_a_checkpoint_without_figures_goes_on(
    unbroken: tuple[Path, str, str], tmp_path: Path, main, example, monkeypatch
) -> None:
    monkeypatch.setattr(example("evaluation"), "compare", lambda *_: {})
    without_slow_pictures(example, monkeypatch)
    arguments = [*TINY, "--output", str(tmp_path), "--resume"]
    state = torch.load(unbroken[0] / "checkpoint.pt", weights_only=True)
    del state["figures"], state["settings"]["keep_going"]
    for own in state["processes"]:
        del own["monitor"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert main(arguments) == 0
    assert metrics_of(tmp_path)["figures"] == []
    assert not (tmp_path / "clusters.png").exists()


@pytest.mark.slow
def test_resume_refuses_other_settings_and_other_files(
    unbroken: tuple[Path, str, str], tmp_path: Path, main, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(unbroken[0] / "checkpoint.pt", tmp_path)
    arguments = [*TINY, "--output", str(tmp_path), "--resume"]
    assert main([*arguments, "--queue", "100"]) == 2
    assert "--queue was 200 there, got 100" in capsys.readouterr().err
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for size in (0, 20, 1000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "checkpoint.pt").write_bytes(whole[:size])
        assert main(arguments) == 2
        message = f"({size} bytes) is damaged or no checkpoint of this program"
        assert message in capsys.readouterr().err


def picture(path: Path, mode: str, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path)


FOLDER_RUN = [
    *("--epochs", "1", "--batch-size", "4", "--prototypes", "5", "--image-size", "16"),
    *("--crops", "2x12,2x8", "--threads", "1", "--device", "cpu"),
]  # fmt: skip


UNIFORM_CODES = ["--epsilon", "1", "--warmup-steps", "0", "--freeze-steps", "0"]


@pytest.mark.slow
def test_torchrun_trains_two_processes_stops_them_together_and_goes_on_with_two(
    tmp_path: Path, main, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(40):
        picture(tmp_path / "data" / f"{index % 2}" / f"{index}.png", "RGB", (16, 16), index)
    output = tmp_path / "out"
    arguments = ["--data", str(tmp_path / "data"), *FOLDER_RUN, *UNIFORM_CODES, "--queue", "16"]
    arguments += ["--epochs", "26"]  # of 8 steps
    process = start(output, *arguments, processes=2)
    shown, errors = process.communicate()
    assert process.returncode == 1, errors  # of torchrun
    assert shown.count("32 training and 8 test images of 3x16x16, on cpu, 2 ranks") == 1
    assert shown.count("stuck_at_ln_k: ") == 1
    assert "exitcode  : 3" in errors
    assert errors.count("training stopped after epoch 25 of 26") == 1
    metrics = metrics_of(output)
    assert metrics["processes"] == 2
    assert len(metrics["losses"]) == 25 * (32 // 4)
    assert len(metrics["figures"]) == 25
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 25
    first, second = (own["criterion"] for own in state["processes"])
    torch.testing.assert_close(first["prototypes.weight"], second["prototypes.weight"])
    assert len(first["queue.valid"]) == 8  # half of the slots each, with features of their own
    assert bool(first["queue.valid"].all())
    assert not torch.equal(first["queue.features"], second["queue.features"])

    process = start(output, *arguments, "--resume", "--keep-going", processes=2)
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continuing after epoch 25 of 26" in shown
    assert shown.count("warning: stuck_at_ln_k: ") == 1
    whole = metrics_of(output)
    assert len(whole["losses"]) == 26 * (32 // 4)
    assert whole["losses"][:200] == metrics["losses"]
    assert whole["figures"][:25] == metrics["figures"]
    assert list(whole["accuracies"]) == ROWS

    assert main([*arguments, "--output", str(output), "--resume"]) == 2
    assert "the number of ranks was 2 there, got 1" in capsys.readouterr().err


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
    assert "skipped apples/cut.png: " in shown
    metrics = metrics_of(output)
    unreadable = metrics["images"].pop("unreadable")
    assert metrics["images"] == {"train": 14, "test": 4, "classes": ["apples", "pears"]}
    assert sorted(unreadable) == ["apples/cut.png", "apples/empty.jpg"]
    assert unreadable["apples/empty.jpg"].startswith("cannot identify image file")
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
        (["--data", "{empty}"], "holds no readable image: no file ends in .bmp"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--batch-size", "9999"], "--batch-size must be at most the 1437 training images"),
        (["--learning-rate", "nan"], "--learning-rate must be at least 0, got nan"),
        (["--crops", "2x8"], "must hold as many resolutions, got 1 (2x8) and 2 (0.7-1,0.5-0.9)"),
        (["--crops", "2,2"], "--crops must be like 2x28,2x20, got '2,2'"),
        (["--scales", "1,x"], "--scales must be like 0.7-1,0.5-0.9, got '1,x'"),
        (["--resume", "--overwrite"], "--resume and --overwrite cannot be combined"),
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


def ramp(dtype: str, most: float) -> np.ndarray:
    """16 gray levels, which 8 bits hold as 0, 17, ..., 255."""
    return np.broadcast_to(np.linspace(0, most, 16), (16, 16)).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "most", "ending"),
    [
        ("<u2", 65535, "png"),
        ("<u2", 65535, "tif"),
        (">u2", 65535, "tif"),
        ("<u2", 65535, "pgm"),
        ("<i4", 65535, "tif"),
        ("<f4", 1, "tif"),
    ],
)
def test_gray_images_of_many_bits_keep_their_levels(
    dtype: str, most: float, ending: str, tmp_path: Path, example
) -> None:
    levels = ramp(dtype, most)
    if ending == "pgm":  # which older versions of PIL read but do not write
        (tmp_path / "gray.pgm").write_bytes(b"P5 16 16 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(tmp_path / f"gray.{ending}")
    pixels, _, unreadable = example("images").read_folder(tmp_path, 16)
    assert unreadable == {}
    np.testing.assert_array_equal(pixels[0], np.broadcast_to(np.arange(16) * 17, (3, 16, 16)))


def test_gray_images_of_another_range_are_named(tmp_path: Path, example, main, capsys) -> None:
    bad = {"a": ("<i4", 65536), "b": ("<i4", -1), "c": ("<f4", 255), "d": ("<f4", np.nan)}
    for name, (dtype, most) in bad.items():
        Image.fromarray(ramp(dtype, most)).save(tmp_path / f"{name}.tif")
    with pytest.raises(example("settings").UserError, match=r"holds no readable image: a\.tif: "):
        example("images").read_folder(tmp_path, 16)
    picture(tmp_path / "good.png", "L", (16, 16), 0)
    pixels, _, unreadable = example("images").read_folder(tmp_path, 16)
    assert len(pixels) == 1
    assert unreadable["a.tif"] == "values of mode I must be in [0, 65535], got 0 to 65536"
    assert unreadable["c.tif"] == "values of mode F must be in [0, 1], got 0 to 255"
    assert list(unreadable) == ["a.tif", "b.tif", "c.tif", "d.tif"]
    images = example("images").load_images(str(tmp_path), validation=False, image_size=16)
    assert str(images).splitlines()[-2:] == [
        f"  skipped c.tif: {unreadable['c.tif']}",
        "  skipped 1 more",
    ]


@pytest.mark.parametrize("dtype", ["u1", "<u2"])
def test_the_rotation_that_a_camera_noted_is_applied(dtype: str, tmp_path: Path, example) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    levels = ramp(dtype, np.iinfo(dtype).max)
    Image.fromarray(levels).save(tmp_path / "turned.png", exif=exif)
    pixels, _, _ = example("images").read_folder(tmp_path, 16)
    np.testing.assert_array_equal(pixels[0, 0], (np.arange(16) * 17)[:, None].repeat(16, axis=1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_an_image_without_opaque_pixels_is_white(mode: str, example) -> None:
    image = example("images").to_rgb(Image.new(mode, (4, 4)))
    assert image.getcolors() == [(16, (255, 255, 255))]


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB", "I;16"])
def test_the_color_that_a_file_calls_transparent_is_white(
    mode: str, tmp_path: Path, example
) -> None:
    black = (0, 0, 0) if mode == "RGB" else 0
    Image.new(mode, (16, 16), black).save(tmp_path / "clear.png", transparency=black)
    pixels, _, _ = example("images").read_folder(tmp_path, 16)
    assert (pixels == 255).all()


def test_half_transparent_pixels_are_mixed_with_white(example) -> None:
    image = Image.new("RGBA", (1, 1), (100, 0, 200, 51))
    assert example("images").to_rgb(image).getpixel((0, 0)) == (224, 204, 244)


def test_links_are_followed_and_end(tmp_path: Path, example) -> None:
    for name in ("apples", "pears"):
        for index in range(5):
            picture(tmp_path / "elsewhere" / name / f"{index}.png", "RGB", (20, 20), index)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("apples", "pears"):
        (data / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "apples" / "around").symlink_to(data)
    (tmp_path / "elsewhere" / "pears" / "self").symlink_to("self")
    (data / "plums").symlink_to(tmp_path / "nowhere")
    images = example("images").load_images(str(data), validation=False, image_size=16)
    assert images.classes == ["apples", "pears"]
    assert len(images.train) + len(images.held_out) == 10
    assert images.unreadable["plums"] == "No such file or directory"
    assert sorted(images.unreadable) == ["pears/self", "plums"]


def test_too_few_images_for_a_second_split_are_one_line(tmp_path: Path, main, capsys) -> None:
    for label in range(10):
        for index in range(5):
            picture(tmp_path / "data" / str(label) / f"{index}.png", "RGB", (20, 20), index)
    arguments = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), *FOLDER_RUN]
    assert main([*arguments, "--validation"]) == 2
    assert "--validation: too few images (40) to split again" in capsys.readouterr().err


def test_a_short_training_is_not_judged(tmp_path: Path, quick, capsys) -> None:
    arguments = ["--output", str(tmp_path), "--batch-size", "150", "--learning-rate", "0"]
    assert quick(arguments) == 0
    shown = capsys.readouterr().out
    assert "9 steps are too few to tell whether training works" in shown
    assert "warning:" not in shown


def test_too_few_samples_are_told_of_before_the_first_epoch(tmp_path: Path, quick, capsys) -> None:
    arguments = ["--output", str(tmp_path), "--queue", "0", "--prototypes", "300"]
    assert quick(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("warning: too_few_samples: the codes see 128 samples for 300") == 1
    assert "  - a queue" in shown


def test_a_stuck_training_stops_with_its_diagnosis_and_can_go_on(
    tmp_path: Path, quick, capsys
) -> None:
    arguments = ["--output", str(tmp_path), "--epochs", "6", "--batch-size", "32"]  # 44 steps each
    arguments += [*UNIFORM_CODES, "--prototypes", "20", "--crops", "2x6", "--scales", "0.7-1"]
    assert quick(arguments) == 3
    shown, progress = capsys.readouterr()
    assert "codes_near_uniform: code entropy" in shown
    assert "  - a smaller epsilon" in shown
    error = progress.splitlines()[-1]
    stopped = "training stopped after epoch 5 of 6 (codes_near_uniform)"
    assert error.startswith(f"pretrain.py: error: {stopped}")
    metrics = metrics_of(tmp_path)
    assert metrics["stopped_by"] == ["codes_near_uniform", "stuck_at_ln_k"]
    assert metrics["accuracies"] == {}
    assert len(metrics["figures"]) == 5
    assert all((tmp_path / name).exists() for name in PICTURES)

    assert quick([*arguments, "--resume", "--keep-going"]) == 0
    shown = capsys.readouterr().out
    assert "continuing after epoch 5 of 6" in shown
    assert shown.count("warning: codes_near_uniform") == 1
    metrics = metrics_of(tmp_path)
    assert metrics["stopped_by"] == []
    assert len(metrics["figures"]) == 6


def test_a_warning_is_printed_once(example, capsys) -> None:
    monitoring = example("monitoring")
    found = [Diagnosis("duplicates", "many", ("this", "that"))]
    told: set[str] = set()
    for _ in range(2):
        monitoring.warn(found, told)
    assert capsys.readouterr().out == "warning: duplicates: many\n  - this\n  - that\n"
    assert not monitoring.hopeless(found)


@pytest.mark.parametrize(
    ("bad_step", "message"),
    [
        (STEPS + 5, f"the loss is nan at step {STEPS + 6}"),
        (2 * STEPS, f"the weights after step {2 * STEPS} are not finite"),
    ],
)
def test_training_stops_where_it_is_not_finite_and_keeps_the_checkpoint(
    bad_step: int, message: str, tmp_path: Path, main, monkeypatch, capsys
) -> None:
    step, steps = torch.optim.AdamW.step, []

    def diverge(self, *arguments):
        step(self, *arguments)
        steps.append(None)
        if len(steps) == bad_step:
            self.param_groups[0]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    assert main([*TINY, "--output", str(tmp_path)]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"pretrain.py: error: {message}: training stopped")
    assert "the checkpoint of epoch 1 stays" in lines[-1]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(bool(weight.isfinite().all()) for weight in state["network"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_learning_rate_of_a_billion_ends_with_status_3(tmp_path: Path, main, capsys) -> None:
    assert main([*TINY, "--output", str(tmp_path), "--learning-rate", "1e9"]) == 3
    assert "try a smaller --learning-rate" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_folder_without_room_is_told_of_before_the_first_epoch(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="resource is not installed")
    process = start(tmp_path / "out", *TINY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))  # before it has imported
    _, errors = process.communicate()
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "cannot write" in errors
    assert "checkpoint.pt': File too large" in errors
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("written", ["checkpoint.pt", "loss.png", "metrics.json"])
def test_a_disk_that_fills_up_leaves_no_half_file(
    written: str, tmp_path: Path, quick, monkeypatch, capsys
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == written:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert quick(["--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"{written}': No space left on device")
    names = {path.name for path in tmp_path.iterdir()}
    assert written not in names
    assert not any(name.endswith(".unfinished") for name in names)


@pytest.mark.slow
def test_a_second_run_into_the_folder_is_refused(
    unbroken: tuple[Path, str, str], tmp_path: Path, quick, capsys
) -> None:
    for name in ("checkpoint.pt", "metrics.json"):
        shutil.copy(unbroken[0] / name, tmp_path)
    arguments = ["--output", str(tmp_path)]
    assert quick(arguments) == 2
    error = capsys.readouterr().err
    assert "holds a run already (checkpoint.pt, metrics.json)" in error
    assert "--resume" in error
    assert metrics_of(tmp_path) == metrics_of(unbroken[0])
    assert quick([*arguments, "--overwrite"]) == 0
    assert metrics_of(tmp_path)["settings"]["epochs"] == 1


@pytest.mark.slow
def test_an_interrupted_run_names_resume(tmp_path: Path) -> None:
    # A background job ignores the signal, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path, *TINY, "--epochs", "1000")
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        "pretrain.py: interrupted; --resume goes on after the last finished epoch"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_more_threads_are_for_the_network_alone(tmp_path: Path, main, example, monkeypatch) -> None:
    threads = []

    def compare(*_):
        threads.extend([torch.get_num_threads(), threadpool_info()])
        raise example("settings").UserError("seen")

    monkeypatch.setattr(example("pretrain"), "train", lambda *_: None)
    monkeypatch.setattr(example("evaluation"), "compare", compare)
    try:
        assert main([*TINY, "--output", str(tmp_path), "--threads", "2"]) == 2
    finally:
        torch.set_num_threads(1)
    assert threads[0] == 2
    blas = [library for library in threads[1] if library["user_api"] == "blas"]
    assert blas
    assert all(library["num_threads"] == 1 for library in blas)


def sentence_of(figure: matplotlib.figure.Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def test_every_picture_says_what_one_sees(example) -> None:
    pictures = example("pictures")
    scores, images = torch.rand(30, 5), torch.rand(30, 1, 8, 8)
    figures = [
        pictures.crops([images[:3]], 0.5, 0.5),
        pictures.loss([3.0, 2.0], 2.3),
        pictures.usage(torch.tensor([0.5, 0.3, 0.2]), 2.8),
        pictures.nearest(images, scores),
        pictures.feature_map(scores, None, [], "training"),
    ]
    for figure in figures:
        assert len(figure.get_suptitle()) > 8
        assert sentence_of(figure).endswith(".")
        figure.savefig(os.devnull, format="png")
    for figure in [*figures[1:3], figures[4]]:
        assert figure.axes[0].get_xlabel()
        assert figure.axes[0].get_ylabel()


@pytest.mark.parametrize("steps", [1, 9, 49])
def test_the_loss_of_a_short_run_is_a_visible_line(steps: int, example) -> None:
    figure = example("pictures").loss([4.0] * steps, 4.6)
    (line,) = [line for line in figure.axes[0].lines if line.get_label().startswith("loss")]
    assert len(line.get_xdata()) > 1 or line.get_marker() == "o"


@pytest.mark.parametrize("count", [2, 10, 12, 100])
def test_the_legend_names_every_class(count: int, example) -> None:
    classes = [f"class {index}" for index in range(count)]
    classes[:2] = ["_hidden", "a$b$ of a very long name indeed"]
    labels = torch.arange(2 * count) % count
    figure = example("pictures").feature_map(torch.rand(len(labels), 5), labels, classes, "test")
    figure.savefig(os.devnull, format="png")
    legend = figure.axes[0].get_legend()
    shown = [text.get_text().strip() for text in legend.get_texts()]
    assert shown == ["_hidden", r"a\$b\$ of a very long nam…", *classes[2:]]
    looks = {
        (tuple(group.get_facecolor()[0]), group.get_paths()[0].vertices.tobytes())
        for group in figure.axes[0].collections
    }
    assert len(looks) == count


def test_too_many_classes_are_told_of(example) -> None:
    labels = torch.arange(240) % 120
    classes = [str(label) for label in range(120)]
    figure = example("pictures").feature_map(torch.rand(240, 5), labels, classes, "test")
    assert figure.axes[0].get_legend() is None
    assert "Several classes share a color and marker." in sentence_of(figure)
