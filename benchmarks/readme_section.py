"""The text below a heading of README.md or a file of docs/, which a script draws from results: found and replaced."""

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def _section(heading: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=^{re.escape(heading)}\n)(.*?)(?=^#)", re.MULTILINE | re.DOTALL)


def text_below(heading: str, readme: str) -> str:
    """The text between a heading and the next one."""
    return _section(heading).search(readme).group(1).strip()


def show(drawn: dict[str, str], document: Path = README) -> None:
    """Print the text for each heading; with --write on the command line, put it into `document` too."""
    print("\n\n".join(drawn.values()))
    if sys.argv[1:] == ["--write"]:
        content = document.read_text()
        for heading, text in drawn.items():
            content = _section(heading).sub(lambda _, text=text: f"\n{text}\n\n", content)
        document.write_text(content)
