"""The README's code for each kind of user, ready to run: `python examples/quickstart.py` (half a minute on a CPU).

The first part needs the package bcos (pip install bcos==0.1.3) and is left out without it. All use random weights, so
that nothing is downloaded. With a network connection, give `weights="DEFAULT"` instead of
None, and bcos.models.pretrained's models, to start from ImageNet.
"""

import importlib.util
import tempfile

import torch

OUT = tempfile.mkdtemp(prefix="bcos-quickstart-")


def swap_in():
    """You train B-cos models with the package bcos: the same model, the same numbers, our kernels."""
    from bcos.models.resnet import resnet18

    import bcosification

    model = resnet18(pretrained=False, num_classes=10)
    images = torch.rand(2, 6, 64, 64)
    before = model.eval()(images)
    model = bcosification.fuse(model)  # in place; state_dict keys stay the peer's, unfuse() goes back
    after = model(images)
    print(f"fused: largest difference of the logits {(after - before).abs().max():.1e}")
    return before, after


def b_cosify():
    """You have a pretrained network: B-cosify and fine-tune it (or: bcosify finetune --model resnet18 --data DIR)."""
    from torchvision.models import resnet18

    import bcosification
    from bcosification.train.finetuning import FinetuneConfig, finetune

    plain = resnet18(weights=None)
    model = bcosification.bcosify(plain)  # a new model; takes images in [0, 1]
    report = bcosification.verify(plain, model, torch.rand(1, 3, 32, 32))
    print(f"converted: {len(report.layers)} layers, the same as before at B = 1: {report.ok}")

    config = FinetuneConfig(data="digits", output=f"{OUT}/run", epochs=1, lr=1e-3, limit_batches=4)
    result = finetune(config, model=plain)  # converts it and trains
    print(f"fine-tuned: {100 * result.best:.1f} % after {result.history[-1]['step']} steps; saved in {result.output}")
    return result


def explain(result):
    """You want to see why: W(x) is the model's own weight for every pixel, its contributions add up to the logit."""
    import bcosification
    from bcosification.train.data import digits

    model = bcosification.load(result.output / "best")
    images, labels = digits("val").tensors()
    explanation = bcosification.explain(model, images[:8], labels[:8])
    explanation.save(f"{OUT}/pictures", smooth=3)
    total = explanation.contributions.sum((1, 2)) + explanation.constant
    logit = explanation.logits.gather(1, explanation.targets[:, None])[:, 0]
    print(
        f"explained: contributions + constant - logit = {(total - logit).abs().max():.1e}; pictures in {OUT}/pictures"
    )
    return explanation


def measure(result):
    """You compare explanations: do they point at the digit?"""
    import bcosification
    from bcosification.evaluation import energy_pointing_game
    from bcosification.explanation import bcos_contributions
    from bcosification.train.data import scenes

    model = bcosification.load(result.output / "best")
    data = scenes("val", count=16)
    images, labels = data.tensors()
    game = energy_pointing_game(model, images, labels, data.boxes, bcos_contributions)
    print(f"energy pointing game: {game.mean:.2f} of the contributions in the digit's box, chance {game.chance:.2f}")
    return game


def build_on_it():
    """You write your own training code: the B-cos transform as a differentiable function."""
    import bcos_kernels

    x = torch.rand(8, 16, 32, 32, requires_grad=True)
    weight = torch.randn(24, 16, 3, 3, requires_grad=True)
    y = bcos_kernels.conv2d(x, weight, padding=1, b=2)  # (8, 24, 32, 32)
    z = bcos_kernels.batch_norm_uncentered(y, torch.ones(24), training=True, activation="relu")
    logits = bcos_kernels.linear(z.mean((2, 3)), torch.randn(10, 24), b=1.5, normalize_weight=True)
    logits.square().mean().backward()
    print(f"conv2d: {tuple(y.shape)}, ran on\n{bcos_kernels.dispatched()}")
    return logits.detach(), weight.grad


def main():
    if importlib.util.find_spec("bcos") is None:
        print("fused: left out, as the package bcos is not installed (pip install bcos==0.1.3)")
    else:
        swap_in()
    run = b_cosify()
    explain(run)
    measure(run)
    build_on_it()


if __name__ == "__main__":
    main()
