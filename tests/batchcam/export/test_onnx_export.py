"""Tests that timm and onnxruntime reproduce the outputs of an exported model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from batchcam.cli.main import main
from batchcam.config import Cam, TrialConfig
from batchcam.data.preprocessing import Preprocess
from batchcam.errors import BundleError
from batchcam.export.formats import export
from batchcam.export.loaded_model import LoadedModel
from batchcam.export.onnx_export import write_onnx
from batchcam.extras import MissingPackageError
from batchcam.models import create_model

SIDE = 32


def _loaded(backbone: str, stride: int | None = None, cam: Cam = "grad_cam") -> LoadedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(backbone, 3, 1, stride)
        for part in model.modules():  # As after training, not the initial identity.
            if isinstance(part, torch.nn.BatchNorm2d):
                assert part.running_mean is not None
                part.running_mean.uniform_(-0.1, 0.1)
    return LoadedModel(
        config=TrialConfig(backbone=backbone, resolution=SIDE, output_stride=stride, cam=cam),
        metrics={},
        class_names=("ape", "bee", "cat"),
        model=model.eval(),
        preprocess=Preprocess(SIDE, (0.3,), (0.2,)),
        channels=1,
    )


def _images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("backbone", "stride", "cam"),
    [
        ("simple_cnn", None, "grad_cam"),
        pytest.param("simple_cnn", None, "hires_cam", marks=pytest.mark.faults),
        pytest.param("resnet18", 8, "grad_cam", marks=pytest.mark.faults),
    ],
)
def test_onnx_gives_the_same_probabilities_and_cams(
    backbone: str, stride: int | None, cam: Cam, tmp_path: Path
) -> None:
    loaded = _loaded(backbone, stride, cam)
    written = export(loaded, tmp_path)
    assert "model.onnx" in written
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 5):
        images = _images(count)
        probabilities, cams = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(probabilities, loaded.probabilities(images), atol=1e-5, rtol=0)
        np.testing.assert_allclose(cams, loaded.explain(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", ["convnextv2_atto"])
def test_timm_loads_its_own_format_without_this_project(backbone: str, tmp_path: Path) -> None:
    loaded = _loaded(backbone, 8)
    assert export(loaded, tmp_path) == ["config.json", "model.safetensors"]
    images = _images(3)
    np.save(tmp_path / "x.npy", loaded.preprocess(images).numpy())
    code = (
        "import sys, timm, torch, numpy as np\n"
        f"model = timm.create_model('local-dir:{tmp_path}', pretrained=True).eval()\n"
        f"x = torch.from_numpy(np.load('{tmp_path}/x.npy'))\n"
        "with torch.no_grad():\n"
        f"    np.save('{tmp_path}/y.npy', model(x).numpy())\n"
        "assert 'batchcam' not in sys.modules\n"
        "print(*model.pretrained_cfg['input_size'], *model.pretrained_cfg['mean'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"1 {SIDE} {SIDE} 0.3"
    with torch.no_grad():
        expected = loaded.model(loaded.preprocess(images)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-5, rtol=1e-5)
    names = json.loads((tmp_path / "config.json").read_text())["label_names"]
    assert names == ["ape", "bee", "cat"]


def test_a_head_that_is_not_linear_has_no_onnx(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="needs the gradient of its head"):
        write_onnx(_loaded("convnextv2_atto", 8), tmp_path / "model.onnx")


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match=r"model.onnx needs the package onnxscript.*onnx"):
        write_onnx(_loaded("simple_cnn"), tmp_path / "model.onnx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_command_writes_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(__file__).parents[3] / "results" / "mnist" / "bcpl_l1" / "seed0"
    for status in (0, 2):  # The second run refuses the folder, which is not empty.
        with pytest.raises(SystemExit) as ended:
            main(["export", str(bundle), "--out", str(tmp_path / "portable")])
        assert ended.value.code == status
    said = capsys.readouterr()
    assert said.out.startswith("model.onnx written to ")
    assert "is not empty" in said.err
