"""Stands in for torchvision, which SGLang imports for models with images and a text model never calls."""

from stub import Missing, submodules

__version__ = "0.0.0"
__getattr__ = Missing
submodules(__name__, "io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional", "ops")
