"""English that every CPython ships: the prose of the language reference in `pydoc_data.topics`.

It needs no download, so it is the default for training and evaluation. How much there is depends on the Python version.
"""

from __future__ import annotations

from regla.data.text import Text
from regla.runtime.errors import OptionError

NAME = "pydoc_data.topics"
_SHORTEST = 60  # characters; shorter paragraphs are headings and signatures
_LETTERS = 0.8  # least share of letters and spaces in prose; code, grammar and tables stay below


def embedded_text() -> Text:
    """The prose paragraphs of all topics, one document per topic, in alphabetical order.

    Topics repeat each other, so each paragraph is kept only where it stands first: a held-out part then shares none
    with the part before it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise OptionError(
            "This Python comes without pydoc_data.topics, the default text; give text with {data}."
        ) from error
    seen: set[str] = set()
    documents = []
    for topic in sorted(topics):
        paragraphs = []
        for block in topics[topic].split("\n\n"):
            paragraph = " ".join(block.split())
            if _is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    return Text(NAME, tuple(documents))


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < _SHORTEST or paragraph[-1] not in '.:;!?)"' or "::=" in paragraph or ">>>" in paragraph:
        return False
    return sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph) >= _LETTERS
