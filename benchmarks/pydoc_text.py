"""Python's own documentation as a corpus: every interpreter carries it, so the benchmark needs no network.

``pydoc_data.topics`` holds parts of the language reference and of the library reference, as plain text under some 80
topics. The class of a passage is the part of the manuals that its topic was taken from: six classes of some 70 to 220
passages. Chapters there contain other topics whole, so a paragraph counts once, for the first topic that has it, and no
paragraph is both trained on and held out.
"""

import re

TOPICS_BY_CLASS: dict[str, tuple[str, ...]] = {
    # Language reference 2, and the library's string formatting, which speaks of the same literals.
    "literals and formatting": (
        "strings", "numbers", "integers", "floating", "imaginary", "identifiers", "id-classes", "formatstrings",
    ),
    # Language reference 3.
    "data model": (
        "objects", "types", "specialnames", "customization", "attribute-access", "callable-types", "sequence-types",
        "numeric-types", "context-managers",
    ),
    # Language reference 4 (and 8's account of tracebacks), and the debugger, which looks at running frames.
    "execution and debugging": ("execmodel", "naming", "dynamic-features", "exceptions", "debugger"),
    # Language reference 6.
    "expressions": (
        "atom-identifiers", "atom-literals", "attribute-references", "await", "binary", "bitwise", "booleans", "calls",
        "comparisons", "conversions", "dict", "exprlists", "in", "lambda", "lists", "operator-summary", "power",
        "shifting", "slicings", "subscriptions", "unary",
    ),
    # Language reference 7 and 8.
    "statements": (
        "assert", "assignment", "augassign", "break", "continue", "del", "global", "import", "nonlocal", "pass",
        "raise", "return", "yield", "compound", "async", "class", "else", "for", "function", "if", "try", "while",
        "with",
    ),
    # Library reference, built-in types.
    "built-in types": (
        "bltin-code-objects", "bltin-ellipsis-object", "bltin-null-object", "bltin-type-objects", "specialattrs",
        "string-methods", "truth", "typesfunctions", "typesmapping", "typesmethods", "typesmodules", "typesseq",
        "typesseq-mutable",
    ),
}  # fmt: skip
_UNDERLINE = re.compile(r"^\s*([*=\-^~\"])\1{2,}\s*$", re.MULTILINE)


def passages(longest: int = 500) -> tuple[list[str], list[str]]:
    """Passages of up to ``longest`` characters (single paragraphs may be longer), and the class of each."""
    from pydoc_data.topics import topics

    texts: list[str] = []
    classes: list[str] = []
    seen: set[str] = set()
    for name, members in TOPICS_BY_CLASS.items():
        for topic in members:
            # Interpreters differ in their topics: one that is missing is passed over.
            found = _pack(_new_paragraphs(topics.get(topic, ""), seen), longest)
            texts += found
            classes += [name] * len(found)
    return texts, classes


def _new_paragraphs(text: str, seen: set[str]) -> list[str]:
    paragraphs = []
    for raw in re.split(r"\n\s*\n", _UNDERLINE.sub("", text)):
        paragraph = raw.strip("\n")
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            paragraphs.append(paragraph)
    return paragraphs


def _pack(paragraphs: list[str], longest: int) -> list[str]:
    packed: list[str] = []
    for paragraph in paragraphs:
        if packed and len(packed[-1]) + len(paragraph) + 2 <= longest:
            packed[-1] += "\n\n" + paragraph
        else:
            packed.append(paragraph)
    return packed
