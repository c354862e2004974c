"""Images to train on: scikit-learn's digits, MNIST and Omniglot from local files or loaders."""

from .images import Digits, load_digits, load_mnist, load_omniglot

__all__ = ["Digits", "load_digits", "load_mnist", "load_omniglot"]
