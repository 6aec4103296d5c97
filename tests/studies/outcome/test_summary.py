import io
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from rich.console import Console

from batchcam.config import TrialConfig
from studies.engine.protocol import Objective
from studies.objectives import ACCURACY, SIMILARITY, SPEED
from studies.outcome.confirm import Confirmed
from studies.outcome.export import TrialRecord
from studies.outcome.summary import Outcome, print_summary, write_readme
from studies.settings import StudySettings

BOTH = (ACCURACY, SIMILARITY)

WIDE = TrialConfig(
    backbone="convnextv2_tiny",
    resolution=112,
    metric="ssim",
    lambda_proto=0.87,
    lambda_batch=0.12,
)


@pytest.fixture
def records(make_record: Callable[..., TrialRecord]) -> list[TrialRecord]:
    """Return 20 trials: three on the front, 15 dominated, one failed, one unfinished."""
    front = [
        make_record(f"front-{n}", 0.99 - 0.01 * n, 0.3 + 0.1 * n, config=WIDE) for n in range(3)
    ]
    others = [make_record(f"other-{n}", 0.8 - 0.01 * n, 0.1, config=WIDE) for n in range(15)]
    failed = make_record("failed", 0, 0, metrics={}, state="failed", error="why")
    return [*others, failed, *front, make_record("cut", 0.5, 0.1, state="unfinished")]


@pytest.fixture
def chosen(records: list[TrialRecord]) -> dict[str, TrialRecord]:
    front = records[-4:-1]
    return {"accuracy": front[0], "ssim": front[2], "knee": front[0]}


METRICS = {
    name: {"test_accuracy": 0.9012, "test_cam_ssim": 0.456} for name in ("accuracy", "ssim", "knee")
}


def printed(
    records: list[TrialRecord],
    chosen: dict[str, TrialRecord],
    width: int,
    confirmed: Sequence[Confirmed] = (),
) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width)
    folder = Path("/a/folder/with/quite/a/long/name/so/that/its/path/does/not/fit/a/line/study")
    print_summary(
        console, Outcome(BOTH, records, records[-4:-1], confirmed, chosen, METRICS), folder
    )
    return output.getvalue()


def test_table_fits_eighty_columns(
    records: list[TrialRecord], chosen: dict[str, TrialRecord]
) -> None:
    *table, path, _ = printed(records, chosen, 80).split("\n")
    assert max(map(len, table)) <= 80
    # A path that is split over two lines cannot be copied.
    assert path.startswith("Best bundle: /a/folder")
    assert path.endswith("/study/best/knee")


def test_table_counts_states_and_shows_the_front_first(
    records: list[TrialRecord], chosen: dict[str, TrialRecord]
) -> None:
    text = printed(records, chosen, 160)
    assert "Best of 20 trials (18 completed, 1 failed, 1 unfinished)" in text
    rows = [line for line in text.splitlines() if "convnextv2_tiny" in line]
    assert len(rows) == 12
    # The table shows numbers of trials, because their ids are long.
    assert [int(row.split()[-1]) for row in rows] == [16, 17, 18, *range(9)]
    assert "accuracy" in rows[0]
    assert "(front)" in rows[1]
    assert "ssim" in rows[2]


def test_table_has_the_objectives_of_the_study(records: list[TrialRecord]) -> None:
    slow = Objective("images_per_second", "seconds", "minimize", ".1f")
    for rank, record in enumerate(records):
        record.metrics["images_per_second"] = 1000.0 + rank
    output = io.StringIO()
    outcome = Outcome((slow,), records, records[:1], (), {}, {})
    print_summary(Console(file=output, width=120), outcome, Path("/study"))
    header, *rows = [
        line for line in output.getvalue().splitlines() if "seconds" in line or "convnext" in line
    ]
    assert header.split()[:3] == ["seconds", "epochs", "configuration"]
    assert [row.split()[0] for row in rows] == [f"{1000 + rank}.0" for rank in range(12)]


def test_page_names_the_directions(records: list[TrialRecord], tmp_path: Path) -> None:
    loss = Objective("loss", "loss", "minimize")
    for record in records:
        record.metrics["loss"] = 0.5
    outcome = Outcome((SPEED, ACCURACY, loss), records, records[:1], (), {}, {})
    write_readme(tmp_path / "README.md", StudySettings(study="mine"), outcome, "f" * 64)
    page = (tmp_path / "README.md").read_text()
    assert "maximising images_per_second and val_accuracy, minimising loss; seed" in page


def test_test_metrics_are_those_of_the_bundles(
    records: list[TrialRecord], chosen: dict[str, TrialRecord]
) -> None:
    text = printed(records, chosen, 80)
    for name in METRICS:
        assert f"  {name:<9} accuracy 0.9012  SSIM 0.456\n" in text


@pytest.fixture
def confirmed(records: list[TrialRecord]) -> list[Confirmed]:
    """Return the first two trials of the front, trained again with two seeds."""
    intervals = {"val_accuracy": (0.98, 0.97, 0.99), "cam_ssim": (0.25, 0.2, 0.3)}
    return [
        Confirmed(
            candidate,
            [
                replace(candidate, trial_id=f"again-{seed}", config=replace(WIDE, seed=seed))
                for seed in (1000, 1001)
            ],
            intervals,
        )
        for candidate in records[-4:-2]
    ]


def test_confirmed_means_are_printed_with_their_intervals(
    records: list[TrialRecord], confirmed: list[Confirmed]
) -> None:
    chosen = dict.fromkeys(METRICS, confirmed[0].as_record)
    text = printed(records, chosen, 120, confirmed)
    assert "Confirmed with 2 fresh seeds: mean ± 95 % confidence interval" in text
    _, table = text.split("Confirmed with")
    rows = [line for line in table.splitlines() if "convnextv2_tiny" in line]
    assert len(rows) == 2
    assert all("0.9800 ± 0.0100" in row and "0.250 ± 0.050" in row for row in rows)
    # The numbers are those of the confirmed trials, as in the table above.
    assert [row.split()[-1] for row in rows] == ["16", "17"]
    assert max(map(len, printed(records, chosen, 80, confirmed).split("\n")[:-2])) <= 80


def test_page_says_how_the_best_were_confirmed(
    records: list[TrialRecord], confirmed: list[Confirmed], tmp_path: Path
) -> None:
    chosen = dict.fromkeys(METRICS, confirmed[0].as_record)
    outcome = Outcome(BOTH, records, records[-4:-1], confirmed, chosen, METRICS)
    settings = StudySettings(study="mine", num_trials=20)
    write_readme(tmp_path / "README.md", settings, outcome, "f" * 64)
    page = (tmp_path / "README.md").read_text()
    assert "fresh runs (seeds 1000, 1001) of the best of the front" in page
    run = "convnextv2_tiny 112px Prototype Loss 0.87 (SSIM) + BCPL 0.12 (SSIM)"
    assert f"| front-1 | {run} | 0.9800 ± 0.0" in page


@pytest.fixture
def page(
    records: list[TrialRecord],
    chosen: dict[str, TrialRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    monkeypatch.setattr("sys.argv", ["studies/bcpl_sweep.py", "--study", "mine"])
    settings = StudySettings(study="mine", out=Path("some/results"), num_trials=20)
    outcome = Outcome(BOTH, records, records[-4:-1], (), chosen, METRICS)
    write_readme(tmp_path / "README.md", settings, outcome, "f" * 64)
    return (tmp_path / "README.md").read_text()


def test_page_names_the_command_and_the_data(page: str) -> None:
    (command,) = [line for line in page.splitlines() if line.startswith("    ")]
    words = shlex.split(command)
    start = next(index for index, word in enumerate(words) if word.endswith("bcpl_sweep.py"))
    assert tyro.cli(StudySettings, args=words[start + 1 :]).study == "mine"
    assert "ffffffffffffffff…" in page
    assert "20 trials on digits" in page


def test_page_has_the_front_and_the_best(page: str) -> None:
    for n in range(3):
        run = "convnextv2_tiny 112px Prototype Loss 0.87 (SSIM) + BCPL 0.12 (SSIM)"
        assert f"| front-{n} | {run} |" in page
    assert "| [knee](best/knee) | front-0 |" in page
    assert "other-" not in page


def test_page_says_how_to_reuse_the_best(page: str) -> None:
    assert "\nbatchcam verify some/results/mine/best/knee\n" in page
    assert "\nbatchcam train --config some/results/mine/best/knee/config.yaml --out DIR\n" in page
