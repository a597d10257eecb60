"""Everything that is known on one page, `make report`: figures, bars, plots, a timeline, area, errors, whole systems.

`python -m kvattic_sim.reports.report` writes build/report.html, which needs no other file.  Figures are those of
build/bench.json; what is missing there is said to be missing.  The system model is computed anew, which takes half a
minute; the RTL does not run.
"""

import argparse
import datetime
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import kvattic
from kvattic.support.files import write_whole
from kvattic.support.terminal import Telling, run_command
from kvattic_sim.reports import figures, report_content
from kvattic_sim.reports.report_content import MISSING, Modelled, Tabular
from kvattic_sim.reports.report_page import Picture, Stamp, page
from kvattic_sim.reports.trace import PATH as TRACE

__all__ = ["PATH", "main", "write"]

PATH = Path("build") / "report.html"
RECORDED = Path("docs") / "timeline.png"
"""The timeline of an earlier run."""
SYSTEM = Path("docs") / "system.md"
WORTH = ("model", "context", "batch")
"""Head of the table of `SYSTEM` that takes minutes."""


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _version() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parent)
    return f"{kvattic.__version__}, commit {done.stdout.strip()}" if done.returncode == 0 else kvattic.__version__


def _stamp(source: Path) -> Stamp:
    known = (f"Figures of {source}, last written {_date(source.stat().st_mtime)}" if source.exists()
             else f"There is no {source}, so all figures are missing: run make bench")
    return Stamp(version=_version(), written=_date(datetime.datetime.now().timestamp()), source=known)


def _picture() -> Picture | None:
    """The timeline of the last `make trace`, or the one of the documentation."""
    drawn = TRACE.with_suffix(".png")
    for path, origin in ((drawn, f"The last make trace, {{}} ({drawn})."),
                         (RECORDED, f"From an earlier run ({RECORDED}); make trace draws it anew.")):
        if path.exists():
            return Picture(path.read_bytes(), origin.format(_date(path.stat().st_mtime)))
    return None


def _worth() -> Tabular | None:
    return report_content.markdown_table(SYSTEM.read_text(), WORTH) if SYSTEM.exists() else None


def write(path: Path, source: Path, modelled: Modelled | None = None) -> dict[str, int]:
    """Write the page.

    Args:
        path: of the page.
        source: a bench.json; without it all figures are missing.
        modelled: what the models say; None: it is computed.

    Returns:
        How many figures have which verdict.

    Raises:
        RequestError: the source is no JSON object of numbers.
        OSError: the page cannot be written.
    """
    found = report_content.entries(report_content.read_figures(source))
    if modelled is None:
        modelled = report_content.model()
    write_whole(path, page(found, modelled, _stamp(source), picture=_picture(), worth=_worth()))
    words = [entry.verdict for entry in found]
    return {word: words.count(word) for word in ("met", "short", "reported", MISSING)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="kvattic_sim.reports.report", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=PATH, metavar="FILE", help=f"the page ({PATH})")
    parser.add_argument("--figures", type=Path, default=figures.PATH, metavar="FILE",
                        help=f"figures by key, as make bench writes them ({figures.PATH})")
    options = parser.parse_args(arguments)
    with Telling(quiet=sys.stdout.isatty()).phase("computing the system model"):
        counts = write(options.output, options.figures)
    print(f"{', '.join(f'{count} {word}' for word, count in counts.items())}; open {options.output}")


if __name__ == "__main__":
    sys.exit(run_command(main, "kvattic_sim.reports.report"))
