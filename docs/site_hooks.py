"""What MkDocs does to this repository's Markdown, which reads well on its own, too.

README.md is the site's first page.  Files outside docs/ that a page links to (sources, examples, the C header) become
pages under source/, so that no link of the site leads out of it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {".py": "python", ".sv": "systemverilog", ".h": "c", ".json": "json", ".toml": "toml", ".yml": "yaml"}
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
COMMENT = re.compile(r"^<!-- (?:run:\n.*?^-->|not run: [^\n]*-->)\n", re.MULTILINE | re.DOTALL)
KEY = re.compile(r" <!-- [\w.]+ -->")
OPTIONS = "---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n"


def source_page(path: Path) -> str:
    """The page of a file or folder outside docs/."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        # What Git ignores is no part of it.
        files = sorted(file for file in path.iterdir() if file.name not in ("__pycache__",) and file.name[0] != ".")
        return f"{OPTIONS}# {name}/\n\n" + "\n".join(f"- `{file.name}{'/' * file.is_dir()}`" for file in files) + "\n"
    text = path.read_text()
    language = LANGUAGES.get(path.suffix, "text")
    fence = "`" * 5
    return f"{OPTIONS}# {name}\n\n{fence}{language}\n{text}\n{fence}\n"


def relocate(markdown: str, page: str, found: set[Path]) -> str:
    """Links of a page as they are on the site.

    Args:
        markdown: the page's text.
        page: where it is in the repository, such as ``docs/host.md``.
        found: is given the linked files that lie outside docs/.
    """
    here = "index.md" if page == "README.md" else posixpath.relpath(page, "docs")

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if re.match(r"[a-z]+:", target):
            return target
        name = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if name.startswith("docs/"):
            place = name.removeprefix("docs/")
        elif name == "README.md":
            place = "index.md"
        elif (ROOT / name).exists():
            found.add(ROOT / name)
            place = f"source/{name}.md"
        else:
            return target   # the strict build names it
        return posixpath.relpath(place, posixpath.dirname(here) or ".")

    return LINK.sub(link, KEY.sub("", COMMENT.sub("", markdown)))


def on_files(files: Any, config: Any) -> Any:
    """Add the first page, and those of linked sources."""
    from mkdocs.structure.files import File

    found: set[Path] = set()
    first = relocate((ROOT / "README.md").read_text(), "README.md", found)
    files.append(File.generated(config, "index.md", content=first))
    for file in files.documentation_pages():
        if file.src_uri != "index.md":
            relocate(Path(file.abs_src_path).read_text(), f"docs/{file.src_uri}", found)
    for path in sorted(found):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, f"source/{name}.md", content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links, for each page but those that were made above."""
    uri = page.file.src_uri
    if uri == "index.md" or uri.startswith("source/"):
        return markdown
    return relocate(markdown, f"docs/{uri}", set())
