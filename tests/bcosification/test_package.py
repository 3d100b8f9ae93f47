"""The package itself: imports without extras, and layers that import downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import bcosification

WITHOUT_EXTRAS = """
import sys

class Absent:
    names = {"torchvision", "timm", "open_clip", "safetensors", "lightning", "pytorch_lightning", "torchmetrics",
             "webdataset", "sklearn", "yaml", "matplotlib", "captum", "PIL", "gradio", "bcos", "scipy",
             "huggingface_hub", "transformers"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import bcosification
from torch import nn

assert not any(name.startswith("bcosification.") for name in sys.modules)
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, 3)).eval()
images = torch.rand(2, 3, 8, 8)
model = bcosification.bcosify(network, mean=0.5, std=0.25)
assert bcosification.explain(model, images).weights.shape == (2, 6, 8, 8)
assert bcosification.verify(network, model, images).ok
assert bcosification.fuse(model) is model
for call in (lambda: model.save_pretrained("out"), lambda: bcosification.resolve("resnet18")):
    try:
        call()
    except RuntimeError as error:
        assert "pip install 'bcos-kernels[train]'" in str(error), error
    else:
        raise AssertionError("expected a RuntimeError that names the pip line")
print("done")
"""


def test_works_without_extras(tmp_path):
    root = Path(bcosification.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{WITHOUT_EXTRAS}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"
    assert not (tmp_path / "out").exists()


# A package may import those after it, and itself.
LAYERS = ["cli", "train", "evaluation", "explanation", "convert", "models", "nn"]


def test_imports_run_downwards():
    folder = Path(bcosification.__file__).parent
    wrong = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] not in LAYERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                inside = name.split(".")
                if inside[0] == "bcosification" and len(inside) > 1 and inside[1] in LAYERS:
                    if LAYERS.index(inside[1]) < LAYERS.index(parts[0]):
                        wrong.append(f"{path.name}: {name}")
    assert wrong == []


def test_no_module_hides_a_public_function():
    folder = Path(bcosification.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert modules & set(bcosification.__all__) == {"nn"}
