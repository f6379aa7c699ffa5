"""The shortest example stays short, and learns."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "minimal.py"


def test_it_has_at_most_60_lines() -> None:
    assert len(EXAMPLE.read_text("utf-8").splitlines()) <= 60


@pytest.mark.slow
def test_it_learns_in_a_quarter_of_its_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    settings = "SEED, EPOCHS, BATCH_SIZE = 0, {}, 64"
    source = EXAMPLE.read_text("utf-8")
    assert settings.format(12) in source
    source = source.replace(settings.format(12), settings.format(3))
    exec(compile(source, str(EXAMPLE), "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^epoch . of 3: loss (.+)$", shown, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[-1] < math.log(100) - 0.8  # ln K is the loss of a training that does not start
    accuracies = dict(re.findall(r"^5-NN accuracy of (.+): (.+)%$", shown, re.MULTILINE))
    assert list(accuracies) == ["features", "raw pixels"]
    # Untrained features give 88 %, these about 92 %.
    assert float(accuracies["features"]) > 90
