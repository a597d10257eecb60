"""Generated files are fresh, the C header compiles, and what README and docs show and link to is there."""

import re
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

from kvattic.spec import commands, registers
from kvattic.spec.commands import Field, Record
from kvattic_sim.reports import reference as docs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", docs.FILES)
def test_a_generated_file_is_fresh(name):
    assert (ROOT / name).read_text() == docs.FILES[name](), f"{name} is stale: run `make docs` and commit it"


def test_only_stale_files_are_written(tmp_path):
    written = docs.write(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == list(docs.FILES)
    assert docs.write(tmp_path) == []
    written[1].write_text("something else")
    assert docs.write(tmp_path) == [written[1]]


def test_the_command_line_refuses_a_folder_that_is_no_repository(tmp_path, capsys):
    with pytest.raises(SystemExit):
        docs.main(["--root", str(tmp_path)])
    assert "no pyproject.toml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_strings_under_members_are_their_docs():
    class Colour(IntEnum):
        """What it looks like."""

        RED = 1
        """Of a
        rose."""
        GREEN = 2
        BLUE = 3
        """Of the sky."""

    assert docs.member_docs(Colour) == {"RED": "Of a\nrose.", "BLUE": "Of the sky."}
    assert docs.member_docs(commands.Status)["INVALID_OPCODE"] == "where: the opcode."
    assert docs.member_docs(commands.Status)["OK"]


RECORDS = (commands.COMMAND, commands.TABLE_ENTRY, commands.SKETCH_ENTRY, commands.FLASH_COMMAND, commands.DATA_COMMAND,
           commands.QUEUE_COMMAND, commands.GRANT_COMMAND, commands.ROW, commands.TRAILER, commands.COMPLETION)
ENUMERATIONS = {"CONTROL": registers.Control, "STATUS_BIT": registers.StatusBit, "OPCODE": commands.Opcode,
                "MODE": commands.Mode, "STATUS": commands.Status, "GRANT": commands.Grant,
                "FLAG": commands.CompletionFlag, "MEDIA_CAUSE": commands.MediaCause, "KIND": commands.Kind,
                "TABLE_FLAG": commands.TableFlag}
DOORBELLS = ("SUBMISSION_TAIL", "COMPLETION_HEAD")


def test_the_reference_has_every_register_and_field():
    text = docs.reference()
    for register in registers.REGISTERS:
        if not register.name.startswith(DOORBELLS):
            assert f"| {register.address:#04x} | `{register.name}` |" in text
    # One row for the doorbells of all queues.
    assert "| 0x1000 + 2q * 0x800 | `SUBMISSION_TAIL_q` | 32 | wo | 0 | doorbell: queue q has commands" in text
    assert "| 0x1000 + (2q + 1) * 0x800 | `COMPLETION_HEAD_q` | 32 | wo | 0 | doorbell: the host has taken" in text
    assert "SUBMISSION_TAIL_0" not in text
    for record in RECORDS:
        for field in record.fields:
            if not field.name.startswith("reserved"):
                doc = field.doc.replace("|", "\\|")
                assert f"| `{field.name}` | {doc} |" in text
    for enumeration in ENUMERATIONS.values():
        for member in enumeration:
            assert f"| `{member.name}` |" in text
    for counter in registers.COUNTERS:
        assert f"`{counter.name}`" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    columns = 0
    for text in docs.reference().splitlines():
        if not text.startswith("|"):
            columns = 0
        else:
            cells = len(re.findall(r"(?<!\\)\|", text))
            assert columns in (0, cells), text
            columns = cells
    assert all(len(text) < 121 or text.startswith("|") for text in docs.reference().splitlines())


@pytest.mark.parametrize("field", [Field("odd", 2, 4, ""), Field("wide", 0, 16, "")])
def test_a_field_that_no_c_type_fits_is_refused(field):
    with pytest.raises(ValueError, match=f"Broken.{field.name} must be 1, 2, 4 or 8 bytes at a multiple of its size"):
        docs._struct(Record("Broken", 64, (field,)), "")


# C.


def compile_c(source: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "gcc is among the requirements: g++ needs it too"
    file = folder / "source.c"
    file.write_text(source)
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{ROOT / 'include'}"]
    return subprocess.run([*command, *options, str(file)], capture_output=True, text=True)


@pytest.mark.parametrize("standard", ["-std=c99", "-std=c11"])
def test_the_header_is_c(tmp_path, standard):
    # Twice: the guard works.
    done = compile_c('#include "kvattic.h"\n#include "kvattic.h"\n', tmp_path, standard, "-fsyntax-only")
    assert done.returncode == 0, done.stderr


def test_the_header_says_to_c_what_the_tables_say_to_python(tmp_path):
    pairs = {f"KVATTIC_REG_{r.name}": r.address for r in registers.REGISTERS if not r.name.startswith(DOORBELLS)}
    for q in range(registers.QUEUES):
        pairs |= {f"KVATTIC_REG_{name}({q})": registers.REGISTER_MAP[f"{name}_{q}"].address for name in DOORBELLS}
    for prefix, enumeration in ENUMERATIONS.items():
        pairs |= {f"KVATTIC_{prefix}_{m.name}": int(m) for m in enumeration}
    pairs |= {"sizeof(struct kvattic_counters)": commands.lines(8 * len(registers.COUNTERS)) * commands.LINE_BYTES,
              "KVATTIC_STATUS(7u << 9 | 27u << 1 | 1u)": 27, "KVATTIC_PHASE(27u << 1 | 1u)": 1,
              "KVATTIC_PHASE(27u << 1)": 0, "KVATTIC_STATUS_TYPE(7u << 9 | 27u << 1 | 1u)": 7}
    pairs |= {f"offsetof(struct kvattic_counters, {r.name.lower()})": 8 * i for i, r in enumerate(registers.COUNTERS)}
    prints = "\n".join(f'    printf("%lld\\n", (long long){name});' for name in pairs)
    source = f'#include <stdio.h>\n#include "kvattic.h"\nint main(void) {{\n{prints}\n    return 0;\n}}\n'
    program = tmp_path / "program"
    done = compile_c(source, tmp_path, "-o", str(program))
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(pairs, map(int, printed), strict=True)) == pairs


def test_c_packs_the_commands_that_python_packs(tmp_path):
    values = {"opcode": 0x81, "identifier": 0x1234, "rows": 3, "base_token": 0x010203, "end_token": 0xFFFFFE,
              "domain": 255, "scale": 0x3F800000, "table": 1 << 40}
    sets = [f"    KVATTIC_PUT24(c.{n}, {v}u);" if commands.COMMAND[n].size == 3 else f"    c.{n} = {v}u;"
            for n, v in values.items() if n != "table"]
    source = f"""#include <stdio.h>
#include "kvattic.h"
int main(void) {{
    struct kvattic_command c = {{0}};
    unsigned char *byte = (unsigned char *)&c;
{chr(10).join(sets)}
    c.table = UINT64_C({values["table"]});
    for (unsigned i = 0; i < sizeof c; i++) printf("%02x", byte[i]);
    printf("\\n%u\\n", (unsigned)KVATTIC_GET24(c.end_token));
    return 0;
}}
"""
    program = tmp_path / "program"
    done = compile_c(source, tmp_path, "-o", str(program))
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [commands.COMMAND.pack(**values).hex(), str(values["end_token"])]


def test_a_wrong_size_does_not_compile(tmp_path):
    source = '#include "kvattic.h"\nKVATTIC_ASSERT(wrong, sizeof(struct kvattic_command) == 63);\n'
    assert compile_c(source, tmp_path, "-fsyntax-only").returncode != 0


# Pages.


def code(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_example_is_the_one_in_examples():
    _, _, example = (ROOT / "examples" / "attend.py").read_text().partition('"""\n\n')
    assert example in code(ROOT / "docs" / "getting_started.md", "python")


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert target.is_relative_to(ROOT), f"{page.name} links out of the repository: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}: no such heading"


def test_make_targets_in_the_readme_exist():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", readme, re.MULTILINE))
    assert {"sim", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README names make {target}, Makefile has none"
