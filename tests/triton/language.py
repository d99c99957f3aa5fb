"""A faster interpreter: it prepares `triton.language` once per module, not at every call."""

from triton.runtime import interpreter

_prepare = interpreter._patch_lang
_prepared: set[int] = set()


class _Kept:
    """What the interpreter restores after a launch: nothing."""

    def restore(self) -> None:
        pass


def _prepare_once(function) -> _Kept:
    module = id(function.__globals__)
    if module not in _prepared:
        _prepared.add(module)
        _prepare(function)
    return _Kept()


def prepare_once() -> None:
    """For the rest of the process `triton.language` is the interpreter's."""
    interpreter._patch_lang = _prepare_once
