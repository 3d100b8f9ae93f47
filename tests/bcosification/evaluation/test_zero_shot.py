"""Zero-shot accuracy against cosines sorted here; names of classes."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from bcosification import bcosify, evaluate_zero_shot
from bcosification.convert.clip import StandardCLIP
from bcosification.evaluation.zero_shot import texts_of_classes
from tests.bcosification.small_clip import MEAN, STD, clip, images

NAMES = ["cat", "dog", "digit seven", "house", "tree", "lake", "moon", "sun"]


def loader(name):
    x = images(name, 30)
    labels = torch.randint(len(NAMES), (30,), generator=torch.Generator().manual_seed(0))
    return [(x[:20], labels[:20]), (x[20:], labels[20:])], x, labels


@pytest.mark.parametrize("kind", ["standard", "pool", "unpool", "vit"])
def test_top_1_and_top_5_are_those_of_the_sorted_cosines(kind):
    name = "vit" if kind == "vit" else "resnet"
    original = clip(name)
    model = StandardCLIP(original, MEAN, STD).double() if kind == "standard" else bcosify(original)
    if kind == "unpool":
        model.set_attention_pool("unpool", p=2)
    batches, x, labels = loader(name)
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    parts = [tokenizer([f"{start} {cls}" for cls in NAMES]) for start in ("a", "the")]
    texts = torch.stack([F.normalize(original.encode_text(part), dim=-1) for part in parts]).mean(0)
    texts = F.normalize(texts, dim=-1)
    with torch.no_grad():
        features = model.image_features(x)
        cosines = F.normalize(features, dim=-1) @ texts.T
        if kind == "unpool":
            cosines = (cosines * cosines.abs()).mean(1)
    ranked = cosines.argsort(1, descending=True)
    result = evaluate_zero_shot(model, batches, NAMES, ["a {}", "the {}"], progress=False)
    for k in (1, 5):
        expected = (ranked[:, :k] == labels[:, None]).any(1).float().mean()
        assert result[f"top{k}"] == pytest.approx(float(expected))
    assert result["images"] == 30
    given = evaluate_zero_shot(model, batches, texts.detach(), progress=False)
    assert given == result


def test_what_is_refused():
    batches, _, _ = loader("vit")
    with pytest.raises(TypeError, match="expected a BcosifiedCLIP or a StandardCLIP, got CLIP"):
        evaluate_zero_shot(clip("vit"), batches, NAMES)
    with pytest.raises(ValueError, match="expected a model with a text tower"):
        evaluate_zero_shot(bcosify(clip("vit").visual), batches, NAMES)


def test_names_of_classes():
    assert texts_of_classes(["golden_retriever", "cat"]) == ["golden retriever", "cat"]
    folders = [f"n{i:08d}" for i in range(1000)]
    names = texts_of_classes(folders)
    assert (len(names), names[0], names[207].lower()) == (1000, "tench", "golden retriever")
    with pytest.raises(ValueError, match=r"ImageNet's 1000 folders, got 2 WordNet numbers \(n01440764 …\) among 2"):
        texts_of_classes(["n01440764", "n01443537"])
