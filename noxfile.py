"""The versions that the package is tested with: ``pipx run nox`` (or ``nox`` in any environment).

``nox -s oldest`` and ``nox -s newest`` run the default tests at both ends of the supported range,
``nox -s pinned`` with ``constraints.txt``, ``nox -s package`` builds the wheel, checks it and
imports it in an empty environment. Interpreters that are absent are skipped.
"""

import os

import nox

nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["oldest", "pinned", "newest", "package"]

# What the oldest end needs of others, as they were at that time.
OLDEST = ["torch==2.4.1", "pyro-ppl==1.9.0", "numpy<2", "arviz==0.23.0"]
TESTS = ["-n", "2", "-q"]


def _test(session: nox.Session, *requirements: str) -> None:
    session.install(*requirements)
    session.install(*requirements, "-e", ".[test]")
    threads = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    session.run("python", "-m", "pytest", *(session.posargs or TESTS), env=threads)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """Tests with the oldest versions that are supported."""
    _test(session, *OLDEST)


@nox.session(python="3.11")
def pinned(session: nox.Session) -> None:
    """Tests with the versions of ``constraints.txt``, as every change does."""
    _test(session, "-c", "constraints.txt", "torch==2.13.0")


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Tests with the newest versions at hand; set TORCH to choose another build of torch."""
    _test(session, os.environ.get("TORCH", "torch"))


@nox.session(python=["3.10", "3.13"])
def package(session: nox.Session) -> None:
    """Builds wheel and source archive, checks them, and imports the wheel alone."""
    session.install("build", "twine")
    folder = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", folder, ".")
    archives = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    session.run("twine", "check", "--strict", *archives)
    old = ["torch==2.4.1", "numpy<2"] if session.python == "3.10" else []
    session.install(*old, *(name for name in archives if name.endswith(".whl")))
    session.chdir(folder)
    session.run("python", "-c", "import pyro_anneal; print(pyro_anneal.losses.TVO(10))")
