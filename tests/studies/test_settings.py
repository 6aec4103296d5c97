import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tyro

from batchcam.errors import ConfigError, FormatError
from studies import paths
from studies.engine.optuna_storage import STORAGE_VARIABLE
from studies.objectives import OBJECTIVES
from studies.settings import FORMAT, StudySettings
from studies.space import SearchSpace
from studies.study import main


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"study": ""}, "study='' names a folder; choose"),
        ({"study": "a/b"}, "study='a/b' names a folder; choose"),
        ({"study": "../other"}, "study='../other' names a folder; choose"),
        ({"study": "."}, r"study='\.' names a folder; choose"),
        ({"resume": True}, "--resume and --extend need --study"),
        ({"extend": 3}, "--resume and --extend need --study"),
        ({"study": "s", "extend": -1}, "extend=-1 must be 0 or more"),
        ({"storage": "s3://key:secret@bucket"}, "--storage must hold no key .*AWS_ACCESS_KEY_ID"),
        (
            {"storage": "s3://bucket?scheme=http"},
            "must be an address without options; .*AWS_ENDPOINT_URL",
        ),
        ({"num_trials": 0}, "num_trials=0 must be at least 1"),
        ({"max_epochs": 0}, "max_epochs=0 must be at least 1"),
        ({"min_epochs": -1}, "min_epochs=-1 must be at least 1"),
        ({"max_failures": -1}, "max_failures=-1 must be 0 or more"),
        ({"objectives": ()}, f"objectives is empty; choose among {', '.join(OBJECTIVES)}"),
        ({"objectives": ("accuracy",)}, "'accuracy' is unknown; .* Did you mean val_accuracy"),
        ({"cpus_per_trial": math.nan}, "cpus_per_trial=nan must be a finite number >= 0"),
        ({"cpus_per_trial": 0.0}, "cpus_per_trial=0 .* set it above 0"),
        ({"gpus_per_trial": -0.5}, "gpus_per_trial=-0.5 must be a finite number >= 0"),
        ({"gpus_per_trial": math.nan}, "gpus_per_trial=nan must be a finite number >= 0"),
        ({"gpus_per_trial": 1.5}, "gpus_per_trial=1.5 is more than one GPU and not a whole number"),
        ({"gpus_per_trial": 1e-5}, "gpus_per_trial=1e-05 is less than Ray's smallest part"),
        ({"gpus_per_trial": math.inf}, "gpus_per_trial=inf must be a finite number >= 0"),
        ({"dataset": "digit"}, "dataset='digit' is unknown; .* Did you mean digits"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"precision": "fp8"}, "precision='fp8' is unknown; choose one of fp32, bf16, fp16"),
        ({"seed": -1}, "seed=-1 must be between 0 and"),
    ],
)
def test_bad_value_is_refused_with_the_remedy(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudySettings(**fields)  # type: ignore[arg-type]


def test_objective_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objectives=.* names a value twice"):
        StudySettings(objectives=("cam_ssim", "cam_ssim"))


def test_command_line_sets_the_study_and_its_space() -> None:
    words = (
        "--study s --num-trials 7 --max-epochs 2 --objectives val_accuracy images_per_second "
        "--backbones resnet18 simple_cnn --resolutions 28 112 --metrics ssim "
        "--lambda-batch 0.1 1.0 --cpus-per-trial 0.5"
    )
    settings = tyro.cli(StudySettings, args=words.split())
    assert settings.study == "s"
    assert settings.num_trials == 7
    assert settings.objectives == ("val_accuracy", "images_per_second")
    assert settings.space.backbones == ("resnet18", "simple_cnn")
    assert settings.space.resolutions == (28, 112)
    assert settings.space.metrics == ("ssim",)
    assert asdict(settings.space)["lambda_batch"] == (0.1, 1.0)
    assert settings.cpus_per_trial == 0.5


def test_nothing_needs_to_be_said_on_the_command_line() -> None:
    assert tyro.cli(StudySettings, args=[]) == StudySettings()


def test_unknown_flag_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--num-trial", "3"])
    assert ended.value.code == 2
    assert "--num-trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "digit"], "invalid choice 'digit' for argument '--dataset'"),
        (["--metrics", "sim"], "invalid choice 'sim' for argument '--metrics'"),
        (["--backbones", "resnet_18"], "backbone 'resnet_18' is unknown"),
    ],
)
def test_bad_value_ends_the_command_without_a_traceback(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "results")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("results/*"))


def test_study_without_a_name_is_named_after_data_set_and_time() -> None:
    named = StudySettings(dataset="mnist").named()
    assert named.study is not None
    assert named.study.startswith("bcpl-mnist-2")
    assert named.folder == Path("results").resolve() / named.study


def test_given_name_is_kept() -> None:
    settings = StudySettings(study="mine", out=Path("/somewhere"))
    assert settings.named() is settings
    assert settings.folder == Path("/somewhere/mine")


def test_base_configuration_is_what_all_trials_share() -> None:
    settings = StudySettings(
        dataset="mnist", data_root="files", max_epochs=9, batch_size=7, precision="bf16", seed=3
    )
    config = settings.base_config()
    assert (config.dataset, config.epochs, config.batch_size) == ("mnist", 9, 7)
    assert (config.precision, config.seed) == ("bf16", 3)
    # The path is absolute, because trials run in other folders than the driver.
    assert config.data_root == str(Path("files").resolve())


@pytest.fixture
def begun(tmp_path: Path) -> StudySettings:
    """Return the saved settings of a started study; they differ from the defaults."""
    space = SearchSpace(resolutions=(14, 28), lambda_batch=(0.1, 1.0))
    settings = StudySettings(
        study="s",
        out=tmp_path,
        max_epochs=9,
        objectives=("cam_ssim",),
        space=space,
        storage="s3://bucket/folder",
        warm_start=(tmp_path / "earlier" / "best" / "knee",),
    ).begun()
    settings.folder.mkdir()
    settings.save()
    return settings


def test_study_is_resumed_by_the_settings_it_was_started_with(
    begun: StudySettings, tmp_path: Path
) -> None:
    resumed = StudySettings(study="s", out=tmp_path, resume=True, cpus_per_trial=2.0).resumed()
    assert resumed == replace(begun, resume=True, cpus_per_trial=2.0)


def test_recording_may_be_turned_off_on_resuming(begun: StudySettings, tmp_path: Path) -> None:
    """A backbone that cannot be recorded ends in an error with this remedy."""
    assert begun.base_config().cuda_graphs
    resumed = StudySettings(study="s", out=tmp_path, resume=True, cuda_graphs=False).resumed()
    assert not resumed.base_config().cuda_graphs


def test_settings_may_be_repeated_on_resuming(begun: StudySettings) -> None:
    again = replace(begun, resume=True)
    assert again.resumed() == again
    # The command line has no flag for the key.
    assert replace(again, key="").resumed() == again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_epochs": 4}, "was started with max_epochs=9, not 4; resume it without that setting"),
        ({"space": SearchSpace(resolutions=(56,))}, r"was started with space=.*\(14, 28\)"),
        ({"num_trials": 99}, "was started with num_trials=8, not 99; use --extend to add trials"),
        ({"storage": "elsewhere"}, r"was started with storage='s3://bucket/folder"),
    ],
)
def test_other_settings_are_refused_on_resuming(
    begun: StudySettings, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    del begun
    with pytest.raises(ConfigError, match=message):
        StudySettings(study="s", out=tmp_path, resume=True, **changes).resumed()


def test_study_is_extended_again_and_again(begun: StudySettings, tmp_path: Path) -> None:
    for count in (11, 14):
        extended = StudySettings(study="s", out=tmp_path, extend=3).resumed()
        assert extended.resumes
        assert extended.num_trials == count
        assert extended.key == begun.key
        extended.save()


def test_only_resume_and_extend_go_on_with_a_study() -> None:
    assert not StudySettings(study="s").resumes
    assert StudySettings(study="s", resume=True).resumes
    assert StudySettings(study="s", extend=1).resumes


def test_study_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/s holds no study to resume; check --study, --out and"):
        StudySettings(study="s", out=tmp_path, resume=True).resumed()


def test_another_kind_of_storage_is_refused_without_its_address(
    begun: StudySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, "postgresql+psycopg://me:secret@host/database")
    with pytest.raises(ConfigError) as error:
        replace(begun, resume=True).resumed()
    assert "trials in journal, but BATCHCAM_OPTUNA_STORAGE names postgresql" in str(error.value)
    assert "secret" not in str(error.value)


def test_address_of_the_storage_is_not_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, "postgresql+psycopg://me:secret@host/database")
    settings = StudySettings(study="s", out=tmp_path).begun()
    settings.folder.mkdir()
    settings.save()
    text = (settings.folder / paths.SETTINGS).read_text()
    assert '"optuna_storage": "postgresql"' in text
    assert "secret" not in text
    assert replace(settings, resume=True).resumed() == replace(settings, resume=True)


def test_every_study_has_a_key_of_its_own() -> None:
    keys = {StudySettings(study="s").begun().key for _ in range(3)}
    assert len(keys) == 3
    assert all(keys)


def test_bundles_to_start_from_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = StudySettings(study="s", out=tmp_path, warm_start=(Path("earlier/knee"),)).begun()
    settings.folder.mkdir()
    settings.save()
    resumed = StudySettings(study="s", out=tmp_path, resume=True).resumed()
    assert resumed.warm_start == (tmp_path / "earlier/knee",)


@pytest.mark.parametrize(
    ("storage", "checkpoints"),
    [
        (None, "/out/s/checkpoints"),
        ("/shared/", "/shared/s/checkpoints"),
        ("s3://bucket/folder", "s3://bucket/folder/s/checkpoints"),
    ],
)
def test_checkpoints_are_in_the_studys_folder_or_in_its_storage(
    storage: str | None, checkpoints: str
) -> None:
    assert StudySettings(study="s", out=Path("/out"), storage=storage).checkpoints == checkpoints


@pytest.mark.parametrize("content", ["{", "[]", '{"out": "."}', "null"])
def test_damaged_settings_are_named(begun: StudySettings, content: str) -> None:
    (begun.folder / paths.SETTINGS).write_text(content)
    with pytest.raises(ConfigError, match=r"study\.json does not hold the settings of a study"):
        replace(begun, resume=True).resumed()


def test_settings_carry_a_format_and_are_read_without_one(begun: StudySettings) -> None:
    path = begun.folder / paths.SETTINGS
    content = json.loads(path.read_text())
    assert content.pop("format") == FORMAT
    path.write_text(json.dumps(content))
    assert replace(begun, resume=True).resumed() == replace(begun, resume=True)


def test_newer_settings_are_refused_with_the_remedy(begun: StudySettings) -> None:
    path = begun.folder / paths.SETTINGS
    content = json.loads(path.read_text()) | {"format": FORMAT + 1, "of_tomorrow": 1}
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"study\.json has the format 2, .* up to 1; upgrade"):
        replace(begun, resume=True).resumed()


def test_study_in_a_database_has_a_name_that_no_other_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = StudySettings(study="s")
    assert settings.begun().optuna_name == "s"
    monkeypatch.setenv(STORAGE_VARIABLE, "sqlite:///file")
    names = {settings.begun().optuna_name for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("s-") for name in names)
