"""The base of the package's modes below autograd: called as they are, without torch's compiler."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DispatchMode"]


class DispatchMode(TorchDispatchMode):
    """A mode that sees every operation, and no code of ``torch.compile`` around its own.

    Recent versions of torch wrap each call of a mode to hide it from the compiler. The wrapper costs
    several microseconds per operation, and imports the compiler, a second, in programs that never
    compile. Compiled modules run as they are written while these modes are active.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
