"""What a family tells, and the table of families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bcosification.convert.class_change import ChangedForward
from bcosification.convert.rules import Options, type_name


class Family:
    """What the conversion must know of one architecture. The base class serves models that no family knows.

    Names are those of ``model.named_modules()`` and ``model.named_parameters()``. Nothing here may change the model,
    except ``prepare``, which gets the copy that is being converted.
    """

    name = "generic"
    """Written into config.json; `load` finds the family by it."""
    title = "any other network"
    """What people call its models; by default ``name`` with spaces."""
    converts = "every layer that has a rule"
    """What becomes B-cos, or constant when explaining, in a few words. By default the layers that have rules."""
    keeps = "activations, linear layers of gates, q, k and v projections"
    """What stays as it is, in a few words."""
    cannot = "move the head before the pooling; save without model= to load"
    """What the conversion cannot do or does not keep exactly, in a few words; "" where there is nothing to say."""
    example_options: dict[str, Any] = {"mean": 0.5, "std": 0.25, "head": "keep"}
    """Options of ``bcosify`` that ``example``'s conversion needs; by default none."""
    example_size: tuple[int, int] | None = None
    """Height and width of images for ``example``; None: ``input_size``, or 32 x 32."""
    preprocessing: str | None = None
    """"imagenet", "openai": the library's weights were trained with ImageNet's, with OpenAI's CLIP's mean and std."""
    embeds: bool = False
    """Whether the model is an image tower of CLIP's kind: it returns embeddings to be compared with those of texts."""
    reads_text: bool = False
    """Whether the model reads tokens of a text instead of images: a ``TextFamily``."""

    def check(self, model: nn.Module) -> None:
        """ValueError for a model of the class that cannot be converted all the same, saying why."""

    def tower(self, model: nn.Module) -> nn.Module:
        """The part of the model that is converted: of an image and text model the image tower, else all of it."""
        return model

    def output(self, value: Any) -> Any:
        """The tensor among what the original model's forward returns."""
        return value

    def comparable(self, model: nn.Module) -> tuple[nn.Module, str | None]:
        """What a conversion is the same as at B = 1 with all else kept, and, in words, how that differs from the
        original (None: not at all). A copy where it is another model."""
        return model, None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:  # what is said of networks that no family knows does not hold for one
            defaults = {"title": cls.name.replace("_", " "), "cannot": "", "example_options": {}}
            for attribute, default in defaults.items():
                if getattr(cls, attribute) is Family.__dict__[attribute]:
                    setattr(cls, attribute, default)

    def input_layer(self, model: nn.Module) -> str | None:
        """The layer that reads the image: a Conv2d, or a Linear on pixels. None: unknown."""
        readers = [name for name, module in model.named_modules() if type(module) is nn.Conv2d]
        return readers[0] if readers else None

    def channels_innermost(self, model: nn.Module) -> bool:
        """Where a Linear reads the image: whether its pixels have their channels innermost; else outermost."""
        return False

    def head(self, model: nn.Module) -> str | None:
        """The classifier, whose outputs are the logits: an nn.Linear, or a Conv2d before the pooling already.

        None: the model has none.
        """
        heads = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        return heads[-1] if heads else None

    def moves_head(self, model: nn.Module) -> bool:
        """Whether global pooling comes before the head, so that head="before_pool" moves it."""
        raise ValueError(
            f"bcosify: no family knows the forward of {type_name(type(model))}, so its head cannot be moved before the "
            "global pooling: expected head='keep', or a family registered for this class, got head='before_pool'"
        )

    def moved_head_is_convolution(self, model: nn.Module) -> bool:
        """Whether a moved head becomes a 1x1 convolution, on maps (N, C, H, W); else it stays linear, on tokens."""
        return True

    def other_heads(self, model: nn.Module) -> list[str]:
        """Further classifiers, with as many outputs as the head; a new head replaces them, too."""
        return []

    def head_move_changes(self, model: nn.Module) -> str | None:
        """Why a moved head gives other logits even at B = 1 with all else kept, in words; None: it gives the same."""
        return None

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        """Change the forward of the copy where replacing layers is not enough; returns the model to convert."""
        return model

    def additive_parameters(self, model: nn.Module) -> list[str]:
        """Parameters that are no layer's and are added to the activations (or put beside them), leading dim 1."""
        return []

    def input_size(self, model: nn.Module) -> tuple[int, int] | None:
        """Height and width the model was made for, when it is known."""
        return None

    def architecture(self, model: nn.Module) -> dict[str, Any] | None:
        """Arguments (JSON) from which ``build`` makes a model of the same structure. None: not possible."""
        return None

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        """A model with random weights, from what ``architecture`` returned."""
        raise NotImplementedError(f"{self.name}: models of this family are not built from a description")

    def example(self) -> nn.Module | None:
        """A small model of the family with random weights, for `bcosify families --check`. None: nobody wrote one.

        Everything that the family handles should be in it once; images are of ``example_size``. A library that is not
        installed may raise its ImportError.
        """
        if type(self) is not Family:
            return None
        return _AnyNetwork()

    def example_inputs(self, model: nn.Module) -> Any:
        """What ``verify`` is given for the example: two images."""
        size = self.example_size or self.input_size(model) or (32, 32)
        return torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TextFamily(Family):
    """Base of the families of classifiers of texts, which read tokens (N, T) and become a BcosifiedText."""

    reads_text = True

    def word_embeddings(self, model: nn.Module) -> nn.Embedding:
        """The embedding of tokens, whose outputs (N, T, D) are what W is a map of."""
        raise NotImplementedError(f"{self.name}: a family of texts has to define word_embeddings")

    def max_tokens(self, model: nn.Module) -> int:
        """The most tokens of a text that the model has positions for."""
        raise NotImplementedError(f"{self.name}: a family of texts has to define max_tokens")

    def position_ids(self, model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Positions (N, T) that the model gives to tokens (N, T) where embeddings alone do not tell them. None: do."""
        return None


class _AnyNetwork(nn.Module):
    """A network of no family: layers that have rules, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.body, self.act, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.SiLU(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head((x + self.act(self.body(x))).mean((2, 3)))


def enlarged(model: nn.Module) -> nn.Module:
    """``model`` with random weights of a size at which a B = 2 network passes its signal on, in place.

    Of n inputs, weights of size s make outputs of s^2 n^(1/2) times the size of the inputs. For examples that have no
    norms: with the usual initialisation nothing of the image would be left after a few layers.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0, module.weight[0].numel() ** -0.25)
    return model


FAMILIES: dict[str, Family] = {}
"""Dotted class name -> its family."""


SIBLINGS: dict[str, str] = {}
"""Beginning of dotted class names (a library's) -> what of these classes can be converted; the others are refused."""


def register(*class_names: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family for models of exactly these classes (dotted names: the library need not be importable)."""

    def decorate(family: type[Family]) -> type[Family]:
        for class_name in class_names:
            FAMILIES[class_name] = family()
        return family

    return decorate


def family_of(model: nn.Module) -> Family:
    """The family of a model, by its exact class, or the generic one.

    A subclass counts as its base when it defines no method but ``__init__``: then it computes what the base computes.
    """
    for kind in type(model).__mro__:
        if type_name(kind) in FAMILIES:
            return FAMILIES[type_name(kind)]
        if any(callable(value) and not name.startswith("__") for name, value in vars(kind).items()):
            break
    return Family()


class HeadBeforePool(ChangedForward):
    """Base of the mixins whose forward runs the classifier before the global pooling; see ``change_class``."""
