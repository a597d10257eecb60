"""docs/models.md: which architectures of transformers work, are refused, and why.

``python -m kvattic_sim.reports.model_page`` (`make models`) examines all of them, a minute or two, and writes the page;
it fails if one of them goes wrong.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers

from kvattic_sim.lm.support import ANSWER, PROMPT, TOLERANCE, Outcome, Verdict, survey

__all__ = ["PAGE", "listed", "main", "page", "version"]

PAGE = Path("docs") / "models.md"
"""In the repository."""

_HEAD = """# Models

<!-- Written by `make models`; do not edit. -->

Which models of [transformers](transformers.md) can have their KV cache in the drive: every class of transformers
{version} that generates text (causal, sequence to sequence, from speech, from pictures), {total} in all. A small model
of each, with random weights and no download, generates {answer} tokens after {prompt} on the golden device. They must
equal those of the model's own eager attention over K and V rounded alike, and their logits up to {tolerance} of a
standard deviation. Models of pictures and sound get text alone where they generate from it, otherwise random numbers as
sound or a picture; parts for pictures that need the package timm are left empty.

| | architectures |
| --- | --- |
| works: the same tokens | {works} |
| refused by name, before the first step ends | {refused} |
| does anything else | {wrong} |
| transformers themselves cannot build or generate it here | {unavailable} |

That a class works says that its attention does. A model must also fit: its heads have at most 256 elements
([limits](transformers.md#limits)); those whose default configuration has larger ones are among the refused.
"""
_TABLES = ((Verdict.WORKS, "Works", "An empty cell: all attention of the model is in the drive.",
            "what is in the drive"),
           (Verdict.REFUSED, "Refused", "What the error says when the cache is made, or in the first step, of which no "
            "logits came.", "reason"),
           (Verdict.WRONG, "Wrong", "Mistakes of kvattic's, to be mended.", "what happens"),
           (Verdict.UNAVAILABLE, "Not available", "transformers themselves cannot build these here, or not generate "
            "with their own cache and eager attention: nothing is said about kvattic.", "why"))
_LONGEST = 240
"""Characters of a reason, and a few more."""


def version() -> str:
    """Of transformers."""
    found: str = transformers.__version__
    return found


def _cell(text: str) -> str:
    """A reason as it stands in a table."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return text if len(text) <= _LONGEST else text[:_LONGEST].rpartition(" ")[0] + " ..."


def page(outcomes: Sequence[Outcome]) -> str:
    """The page's text.

    Args:
        outcomes: of all architectures.
    """
    by_verdict = {verdict: sorted((one for one in outcomes if one.verdict is verdict),
                                  key=lambda one: one.architecture.name.lower()) for verdict in Verdict}
    text = [_HEAD.format(version=version(), total=len(outcomes), answer=ANSWER, prompt=PROMPT, tolerance=TOLERANCE,
                         **{verdict.value: len(found) for verdict, found in by_verdict.items()})]
    for verdict, title, words, column in _TABLES:
        if by_verdict[verdict]:
            text += [f"## {title}\n", f"{words}\n", f"| class | model type | {column} |\n| --- | --- | --- |"]
            text += [f"| {one.architecture.name} | {one.architecture.model_type} | {_cell(one.detail)} |"
                     for one in by_verdict[verdict]]
            text.append("")
    return "\n".join(text)


def listed(text: str) -> list[str]:
    """Names of the classes on a page, in alphabetical order."""
    rows = re.findall(r"^\| (\w+) \| [\w.-]+ \| .*\|$", text.partition("\n## ")[2], re.MULTILINE)
    return sorted(row for row in rows if row != "class")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if an architecture neither works nor is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=PAGE, help="the page (default: %(default)s)")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    outcomes = survey(progress=lambda one: print(f"{one.verdict:8} {one.architecture.name}: {one.detail}", flush=True))
    options.output.write_text(page(outcomes))
    print(f"Wrote {options.output}.")
    return int(any(one.verdict is Verdict.WRONG for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
