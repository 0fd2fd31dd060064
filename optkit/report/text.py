"""Foreign text made safe for the place where it is shown. It changes how a name looks, never what the record says."""

from __future__ import annotations

import re
import unicodedata

_FORMULA = ("=", "+", "-", "@")


def plain(text: str, limit: int = 400) -> str:
    """Return one line without control characters (terminal escapes, direction marks), cut to ``limit`` characters."""
    clean = "".join(_visible(letter) for letter in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def for_markdown(text: str, limit: int = 400) -> str:
    """Return the text so that Markdown shows it as it is: no markup, no HTML, no cell border."""
    clean = plain(text, limit).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    clean = re.sub(r"([`*|\[\]~]|^>|^[#+-](?=.))", r"\\\1", clean)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", clean)


def for_csv(text: str) -> str:
    """Return the text so that a spreadsheet does not take it for a formula: such text gets a leading apostrophe."""
    clean = plain(text)
    return f"'{clean}" if clean.startswith(_FORMULA) else clean


def _visible(letter: str) -> str:
    if letter in "\t\n\r":
        return " "
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") else letter
