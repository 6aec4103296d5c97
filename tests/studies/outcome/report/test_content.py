import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError
from studies.outcome.report.charts import (
    all_charts,
    distinct_bundles,
    filter_options,
    parallel_rows,
)
from studies.outcome.report.content import read, searched_values, split_picture
from studies.outcome.report.page import findings, render

MakeStudy = Any


def test_every_trial_that_reported_is_a_row_and_every_epoch_a_point(make_study: MakeStudy) -> None:
    content = read(make_study(8))
    assert [row["number"] for row in content.rows] == list(range(7))
    assert [row["state"] for row in content.rows].count("stopped") == 1
    assert len(content.curves) == 6 * 4 + 2
    assert sum(point["last"] for point in content.curves) == 7
    assert content.rows[0]["seconds"] == 120
    assert content.rows[3]["seconds"] == 60
    front = {record.trial_id for record in content.front}
    assert {f"abcd-{row['number']}" for row in content.rows if row["front"]} == front


def test_a_study_is_shown_wherever_its_folder_is(make_study: MakeStudy, tmp_path: Path) -> None:
    moved = tmp_path / "made"
    shutil.move(make_study(6), moved)
    content = read(moved)
    assert len(content.pictures) == 5
    shutil.rmtree(moved / "checkpoints")
    content = read(moved)
    assert not content.pictures
    assert [row["picture"] for row in content.rows] == [None] * 5


def test_a_folder_without_reports_is_said(make_study: MakeStudy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no study"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="nothing to show"):
        read(make_study(1))


def test_a_damaged_bundle_is_said(make_study: MakeStudy) -> None:
    folder = make_study(6)
    (folder / "best" / "knee" / "metrics.json").write_text("{")
    with pytest.raises(ConfigError, match=r"damaged.*--resume"):
        read(folder)


def test_a_trial_whose_ssim_is_no_number_is_shown(make_study: MakeStudy) -> None:
    folder = make_study()
    ledger = folder / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    (last,) = [n for n, line in enumerate(lines) if '"number":1,' in line and '"epoch":4' in line]
    lines[last] = re.sub(r'"cam_ssim":[0-9.]+', '"cam_ssim":NaN', lines[last])
    assert "NaN" in lines[last]
    ledger.write_text("\n".join(lines) + "\n")
    page = render(read(folder))
    assert "NaN" not in page.partition('id="content">')[2].partition("</script>")[0]


def test_values_of_a_term_that_is_off_say_so() -> None:
    assert searched_values(TrialConfig(lambda_batch=0.0))["metric"] == "none"
    values = searched_values(TrialConfig(lambda_batch=0.2, metric="l2", resolution=28))
    assert (values["metric"], values["lambda_batch"], values["resolution"]) == ("l2", 0.2, "28")


def test_a_picture_has_prototypes_above_cams() -> None:
    picture = PIL.Image.new("RGB", (30, 20), "white")
    picture.paste((0, 0, 0), (0, 10, 30, 20))
    above, below = split_picture(picture)
    assert above.size == below.size == (30, 10)
    assert above.getcolors() == [(300, (255, 255, 255))]
    assert below.getcolors() == [(300, (0, 0, 0))]


def test_positions_are_in_order_and_off_is_below_the_smallest_weight(
    make_study: MakeStudy,
) -> None:
    content = read(make_study())
    rows, ticks = parallel_rows(content)
    axes = list(dict.fromkeys(tick["axis"] for tick in ticks))
    # Left out: resolution, stride and decay, which have one value; energy, which is not searched.
    assert axes == [
        "backbone",
        "metric",
        "lambda_class",
        "lambda_proto",
        "lambda_batch",
        "learning_rate",
        "accuracy",
        "SSIM",
    ]
    assert len(rows) == len(content.rows) * len(axes)
    assert all(0 <= row["position"] <= 1 for row in rows)
    at = {row["number"]: row["position"] for row in rows if row["axis"] == "lambda_proto"}
    assert at[0] == 0
    assert 0 < at[1] < at[3] == 1
    rates = {row["number"]: row["position"] for row in rows if row["axis"] == "learning_rate"}
    by_rate = sorted(content.rows, key=lambda row: row["of_learning_rate"])
    assert sorted(rates, key=lambda number: rates[number]) == [row["number"] for row in by_rate]


def test_filters_are_of_what_differs(make_study: MakeStudy) -> None:
    content = read(make_study())
    options = filter_options(content)
    assert set(options) == {"backbone", "loss", "metric", "state"}
    assert options["metric"] == ["L1", "L2", "SSIM", "none"]
    for spec in all_charts(content, {}).values():
        names = {param["name"] for param in spec.get("params", [])}
        assert not names or names == {f"filter_{name}" for name in options}


def test_bundles_of_one_trial_are_shown_once_the_baseline_first(make_study: MakeStudy) -> None:
    bundles = distinct_bundles(read(make_study()).chosen)
    assert [name for name, _ in bundles] == ["baseline", "accuracy", "ssim, knee"]


def test_findings_name_the_compromise_and_what_it_costs(make_study: MakeStudy) -> None:
    compromise, baseline, warning = findings(read(make_study()))
    assert compromise.startswith("The best compromise between accuracy and SSIM is simple_cnn")
    assert "95.00%" in compromise
    assert "SSIM 0.900 of 0.990" in compromise
    assert "1.00 points less accurate" in baseline
    assert "one run" in warning
    confirmed = findings(read(make_study(confirmed=True)))
    assert len(confirmed) == 2
    # Compares the means over fresh seeds, which are equal here, not the bundles' own runs.
    assert "0.00 points more accurate" in confirmed[1]
    assert findings(read(make_study(bundles=False))) == ["The study has exported no bundles yet."]


def test_findings_of_one_objective_name_no_compromise(make_study: MakeStudy) -> None:
    content = read(make_study())
    settings = replace(content.settings, objectives=("val_accuracy",))
    best, baseline, _ = findings(replace(content, settings=settings))
    assert best.startswith("The best configuration by accuracy is simple_cnn")
    assert "compromise" not in best + baseline
