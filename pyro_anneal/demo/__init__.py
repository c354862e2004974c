"""The demonstration that ``python -m pyro_anneal`` runs."""

from .vae import VAE as VAE
from .vae import DemoOutcome as DemoOutcome
from .vae import plot_demo as plot_demo
from .vae import run_demo as run_demo
