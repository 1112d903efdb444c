"""One HTML page of several folders of runs: tables, figures, provenance; it needs no other file."""

import base64
import html
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.runs.cost import Cost, minutes
from experiments.runs.experiment import Experiment
from experiments.runs.html import to_html
from experiments.runs.results import Results, read_experiment

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
h1, h2 { line-height: 1.2; } section { border-top: 1px solid var(--line); margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
th.r, td.r { text-align: right; font-variant-numeric: tabular-nums; } td { white-space: nowrap; }
table.published { font-style: italic; background: var(--soft); }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(sections: Sequence[str]) -> str:
    """Put sections into a page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>kreg: results</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        "<h1>Attention as kernel regression: results</h1>\n"
        "<p>Tables in italics are published by others, with where each number comes from.</p>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(find: Callable[[str], Experiment], out: Path) -> str:
    """Return a folder's table, figure, provenance and what others have published.

    Args:
        find: the experiment of a name.

    Raises:
        ValueError: the folder holds no runs of a known experiment, or a damaged file.
    """
    name = read_experiment(out).name
    try:
        experiment = find(name)
    except ValueError as error:
        raise ValueError(f"{out}: {error}") from error
    found = read_experiment(out, experiment.scores)
    parts = [to_html(experiment.table(found)), _figure(experiment, found), _provenance(found)]
    if experiment.published:
        parts.append(to_html(experiment.published))
    return "<section>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _figure(experiment: Experiment, found: Results) -> str:
    """The figure, drawn afresh, as part of the page; a sentence where it cannot be drawn."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            paths = experiment.draw(found, Path(folder) / "figure")
        except ValueError as error:
            return f"<p>No figure: {html.escape(str(error))}.</p>"
        images = [path.read_bytes() for path in paths if path.suffix == ".png"]
    return "\n".join(
        f'<img alt="Figure of {html.escape(experiment.name)}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        for image in images
    )


def _provenance(found: Results) -> str:
    cost = Cost.of(found)
    facts = {
        "folder": "/".join(found.folder.resolve().parts[-2:]),
        "runs": f"{cost.runs}, seeds {', '.join(map(str, cost.seeds))}",
        "unfinished": str(len(found.unfinished)) if found.unfinished else "",
        "parameters": f"{cost.parameters:,}",
        "cost": f"{minutes(cost.seconds)} of training and evaluation"
        + ("" if cost.tokens is None else f", {cost.tokens:.3g} tokens"),
        "machine": ", ".join(cost.machines),
        "commit": ", ".join(cost.commits)
        + (" (* with changes)" if any("*" in commit for commit in cost.commits) else ""),
    }
    items = (f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items() if text)
    return f"<dl>{''.join(items)}</dl>"
