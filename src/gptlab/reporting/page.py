"""Renders the page: template, style, scripts and data in one self-contained HTML file."""

import base64
import hashlib
import json
import math
import re
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

TITLE = "<title>gptlab report</title>"  # in page.html
SCRIPTS = (
    *("tools", "filters", "curves", "loss", "varied", "parallel", "scaling"),
    *("heading", "runs", "tables", "samples", "main"),
)


def render_page(document: dict[str, Any], poll: float | None) -> str:
    """Returns the page as HTML.

    Strings from runs are never parsed as HTML: they are embedded as JSON without "<", and the scripts insert them as
    text. The Content Security Policy in the page's head allows only these scripts and no external resources.

    Args:
        document: Data of the page, from ``ReportDocument.gather``.
        poll: Seconds between requests to the page's server for new data; None for a static file.
    """
    folder = resources.files(__package__) / "page"
    style = (folder / "style.css").read_text(encoding="utf-8")
    script = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    library = get_plotlyjs()
    source = "'none'" if poll is None else "'self'"
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src {_hash(library)} {_hash(script)}; connect-src {source}"
    )
    parts = {
        "policy": policy,
        "style": style,
        "library": library,
        "script": script,
        "data": to_script_json(document | {"poll": poll}),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: parts[match[1]], template)


def to_script_json(document: dict[str, Any]) -> str:
    """Returns JSON that is safe inside a script element for any strings; NaN and infinity become null."""
    text = json.dumps(_finite(document), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()  # lone surrogates cannot be encoded


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _hash(script: str) -> str:
    """Returns the hash of a script in the form that a Content Security Policy uses."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
