"""Texts that end a completion, found in the stream of its text however tokens cut it."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for `stop` in one completion's text.

    A text ends with the first character that completes one of them, and is cut where that one begins; of several that
    are complete at once, the longest counts. Text that may yet turn out to begin one is held back, so that nothing is
    ever shown and then taken back: what `push` returns depends on the text alone, not on how it was cut in pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str, *, ends: bool = True) -> tuple[str, bool]:
        """Add text; return what is certain to be shown, and whether the completion has ended.

        With `ends` False what is complete within this text ends nothing (`min_tokens`), though what begins in it may.
        """
        num_held = len(self._held)
        text = self._held + text
        if ends:
            places = ((s, text.find(s, max(0, num_held - len(s) + 1))) for s in self._stop)
            found = [(at + len(s), at) for s, at in places if at >= 0]
            if found:
                self._held = ""
                return text[: min(found)[1]], True
        longest = max((self._beginning(s, text) for s in self._stop), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest], False

    def flush(self) -> str:
        """Return what was held back, at the end of the completion."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(stop: str, text: str) -> int:
        """How many of the text's last characters begin `stop`, at most all but one of it."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
